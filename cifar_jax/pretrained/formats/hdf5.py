"""Safe reading of HDF5 files: only groups and arrays stored in the file itself, within bounds of time and memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cifar_jax.errors import WeightsError

# Limits for the HDF5 library on a file of unknown origin: CPU seconds, and bytes of memory in addition to those that
# the file's size justifies.
PROBE_SECONDS, PROBE_BYTES = 1, 500_000_000
PROBE_WALL_SECONDS = 60.0  # generous, because the machine may be busy
MAX_EXPANSION = 2  # maximum ratio of unpacked size to file size; weights hardly compress


def probe(source: Path | bytes, path: Path) -> None:
    """Reads a file in a separate process first, because the HDF5 library may hang or crash on a corrupt one.

    Args:
      source: path of the file, or its content.
      path: path of the file for error messages.

    Raises:
      WeightsError: if the process hangs or crashes.
    """
    content, argument = (source, "-") if isinstance(source, bytes) else (None, str(source))
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    allowed = [str(PROBE_SECONDS + size // 100_000_000), str(PROBE_BYTES + MAX_EXPANSION * size)]
    script = str(Path(__file__).with_name("hdf5_probe.py"))
    command = [sys.executable, "-I", script, argument, *allowed]
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=PROBE_WALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode < 0:
        raise WeightsError(
            f"{path} is corrupt: the HDF5 library hangs or crashes on it in a separate process. Get a fresh copy of "
            "the file."
        )


def get_member(group: h5py.Group, name: str, path: Path) -> Any:
    """Returns a member of a group, following no links to other files: only this file was requested and hashed."""
    at: Any = group
    for part in filter(None, name.split("/")):
        link = at.get(part, getlink=True) if isinstance(at, h5py.Group) else None
        if not isinstance(link, h5py.HardLink):
            raise WeightsError(
                f"{path} does not itself contain {group.name.rstrip('/')}/{name}. Get a fresh copy of the file."
            )
        at = at[part]
    return at


class TensorReader:
    """Reads the arrays of one file, refusing more data in total than a file of its size can hold."""

    def __init__(self, path: Path):
        """Stores the file's path for error messages and derives the limit from its size."""
        self._path, self._left = path, MAX_EXPANSION * path.stat().st_size

    def __call__(self, group: h5py.Group, weight: str) -> np.ndarray:
        """Reads a floating-point array as float32.

        Raises:
          WeightsError: if it is something else, is stored in another file, or exceeds the limit.
        """
        data, path = get_member(group, weight, self._path), self._path
        if not isinstance(data, h5py.Dataset) or data.dtype.kind != "f" or data.size is None:
            raise WeightsError(
                f"{group.name}/{weight} in {path} is not an array of floating-point numbers. Get a fresh copy of the "
                "file."
            )
        if data.external or data.is_virtual:
            raise WeightsError(f"{path} stores {group.name}/{weight} in another file. Get a fresh copy of the file.")
        self._left -= data.nbytes
        if self._left < 0:
            raise WeightsError(
                f"{path} is corrupt: with {group.name}/{weight} {data.shape} it claims more data than a file of its "
                "size can hold. Get a fresh copy of the file."
            )
        return np.asarray(data[()], np.float32)
