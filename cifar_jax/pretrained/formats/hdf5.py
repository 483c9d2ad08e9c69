"""What is read from an HDF5 file: this file's own groups and arrays, and no others."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cifar_jax.errors import WeightsError

# What a file of unknown origin may cost the library that reads it: seconds of a processor, and bytes of memory beside
# those of its size.
PROBE_SECONDS, PROBE_BYTES = 1, 500_000_000
PROBE_WALL_SECONDS = 60.0  # for a machine that is busy with other things
AT_MOST = 2  # times its own size a file may unpack to; weights hardly compress


def probe(source: Path | bytes, path: Path) -> None:
    """Lets another process read a file first, as the HDF5 library may hang or crash in a damaged one.

    Args:
      source: the file, or its content.
      path: the file, for the error.

    Raises:
      WeightsError: when the other process did not come to an end.
    """
    content, argument = (source, "-") if isinstance(source, bytes) else (None, str(source))
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    allowed = [str(PROBE_SECONDS + size // 100_000_000), str(PROBE_BYTES + AT_MOST * size)]
    script = str(Path(__file__).with_name("hdf5_probe.py"))
    command = [sys.executable, "-I", script, argument, *allowed]
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=PROBE_WALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode < 0:
        raise WeightsError(
            f"{path} is damaged: the HDF5 library hangs or crashes in it, as another process found out; get the file "
            "again."
        )


def own(group: h5py.Group, name: str, path: Path) -> Any:
    """What a group holds under a name, read from this file and no other: that one was asked for and hashed."""
    at: Any = group
    for part in filter(None, name.split("/")):
        link = at.get(part, getlink=True) if isinstance(at, h5py.Group) else None
        if not isinstance(link, h5py.HardLink):
            raise WeightsError(f"{path} has no {group.name.rstrip('/')}/{name} of its own; get the file again.")
        at = at[part]
    return at


class TensorReader:
    """Reads the arrays of one file, together no more than it can hold."""

    def __init__(self, path: Path):
        """Takes the file, for errors and for its size."""
        self._path, self._left = path, AT_MOST * path.stat().st_size

    def __call__(self, group: h5py.Group, weight: str) -> np.ndarray:
        """An array of floating-point numbers of this very file, in float32.

        Raises:
          WeightsError: when it is something else, lies in another file, or claims more bytes than the file can hold.
        """
        data, path = own(group, weight, self._path), self._path
        if not isinstance(data, h5py.Dataset) or data.dtype.kind != "f" or data.size is None:
            raise WeightsError(
                f"{path} holds {group.name}/{weight}, which is not an array of floating-point numbers; get the file "
                "again."
            )
        if data.external or data.is_virtual:
            raise WeightsError(f"{path} keeps {group.name}/{weight} in another file; get the file again.")
        self._left -= data.nbytes
        if self._left < 0:
            raise WeightsError(
                f"{path} is damaged: with {group.name}/{weight} {data.shape} it claims more numbers than a file of its "
                "size can hold; get the file again."
            )
        return np.asarray(data[()], np.float32)
