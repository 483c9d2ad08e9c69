"""The chunks of a feature matrix on disk: a zarr array whose chunks are files that appear whole and carry a CRC-32C."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from cifar_jax.files import lock, remove_leftovers, write_json

# 8 MB of 2048 features in float32, 1 MB of 256. A multiple of the usual numbers of images at a time.
CHUNK_ROWS = 1024
ABOUT, METADATA, LOCK = "about.json", "zarr.json", "lock"

logger = logging.getLogger(__name__)


def chunks_of(num: int) -> list[slice]:
    """The rows of each chunk of `num`."""
    return [slice(start, min(start + CHUNK_ROWS, num)) for start in range(0, num, CHUNK_ROWS)]


def num_rows(chunks: Sequence[slice]) -> int:
    """How many rows chunks have together."""
    return sum(rows.stop - rows.start for rows in chunks)


def num_absent(path: Path, num: int) -> int:
    """How many of `num` rows have no chunk in an entry's directory; what the chunks hold is not looked at."""
    return num_rows(
        [rows for rows in chunks_of(num) if not (path / "c" / str(rows.start // CHUNK_ROWS) / "0").exists()]
    )


@contextlib.contextmanager
def open_entry(path: Path, shape: tuple[int, int], dtype: str, about: Mapping[str, Any]) -> Iterator["Entry"]:
    """The chunks in a directory, locked until the block ends; where they cannot be kept that is logged.

    Args:
      path: of the directory, which is made if need be.
      shape: images and features of an image.
      dtype: what they are kept in.
      about: JSON values kept beside them for people.
    """
    with contextlib.ExitStack() as stack:
        array = None
        try:
            if stack.enter_context(locked(path, waits=True)):
                remove_leftovers(path, f".{ABOUT}.*")
                remove_leftovers(path, "**/*.__lock")
            array = _open_array(path, shape, dtype)
            _describe(path, {"images": shape[0], "features": shape[1], "dtype": dtype, **about})
        except (OSError, ValueError) as error:
            logger.info(_not_kept(path, error))
        entry = Entry(path, array)
        try:
            yield entry
        finally:
            entry.flush()


@contextlib.contextmanager
def locked(path: Path, waits: bool = False) -> Iterator[bool]:
    """Holds the lock of an entry, whose directory is made if need be. The kernel frees it when a process ends.

    Its value is whether it holds, as some file systems have no locks.

    Args:
      path: of the entry.
      waits: for a lock that is another's, which is logged; without it, that raises BlockingIOError.
    """

    def on_waiting() -> None:
        if not waits:
            raise BlockingIOError(f"another process is using {path}")
        logger.info(f"Another process is computing the features in {path}; waiting for it.")

    while True:
        path.mkdir(parents=True, exist_ok=True)
        with open(path / LOCK, "ab") as file:
            held = lock(file, on_waiting)
            try:
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(path / LOCK)):
                    continue
            except FileNotFoundError:
                continue  # whoever had it has removed the entry
            yield held
            return


def _open_array(path: Path, shape: tuple[int, int], dtype: str) -> Any:
    """Opens the zarr array or makes it. Metadata that are damaged are written again, as they say nothing new."""
    import tensorstore

    metadata = {
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [min(CHUNK_ROWS, shape[0]), shape[1]]}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": metadata,
        # Otherwise a chunk that was never written is read as zeros, and one of zeros never written.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }
    try:
        return tensorstore.open(spec, open=True, create=True).result()
    except ValueError as error:
        if not (path / METADATA).exists():
            raise
        logger.info(f"{path / METADATA} is damaged ({_reason(error)}): it is written again.")
        (path / METADATA).unlink()
        return tensorstore.open(spec, open=True, create=True).result()


def _describe(path: Path, about: Mapping[str, Any]) -> None:
    """Writes `about.json`, whose time of change says when the entry was used last."""
    try:
        unchanged = json.loads((path / ABOUT).read_text(encoding="utf-8")) == about
    except (OSError, ValueError):
        unchanged = False
    if unchanged:
        os.utime(path / ABOUT)
    else:
        write_json(path / ABOUT, about)


class Entry:
    """The chunks of one feature matrix on disk; without an array it holds none and takes none."""

    def __init__(self, path: Path, array: Any):
        """Takes what `_open_array` returned, or None."""
        self.path, self._array = path, array
        self._pending: Any = None

    def read(self, features: Float32[np.ndarray, "n features"], chunks: Sequence[slice]) -> list[slice]:
        """Copies chunks to their rows of `features`, in parallel. Returns those that are missing or damaged."""
        if self._array is None:
            return list(chunks)
        import tensorstore

        target, source = tensorstore.array(features), self._array.astype(tensorstore.float32)
        copies = [(rows, target[rows].write(source[rows])) for rows in chunks]
        left: list[slice] = []
        damaged: dict[int, ValueError] = {}
        for rows, copy in copies:
            try:
                copy.result()
            except ValueError as error:
                left.append(rows)
                if not str(error).startswith("NOT_FOUND"):
                    damaged[rows.start] = error
                    # The last chunk, which the array does not fill, would be read once more before it is written.
                    with contextlib.suppress(OSError):
                        (self.path / "c" / str(rows.start // CHUNK_ROWS) / "0").unlink()
        if damaged:
            again = num_rows([rows for rows in left if rows.start in damaged])
            first = _reason(next(iter(damaged.values())))
            logger.info(f"The cache is damaged ({first}): the features of {again:,} images are computed again.")
        return left

    def write(self, rows: slice, values: Float[np.ndarray, "rows features"]) -> None:
        """Starts to write a chunk. If that fails, it is logged, and nothing more is kept."""
        self.flush()
        if self._array is not None:
            self._pending = self._array[rows].write(values)

    def flush(self) -> None:
        """Waits until what was written is on disk."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except ValueError as error:
            logger.info(_not_kept(self.path, error))
            self._array = None


def _not_kept(path: Path, error: Exception) -> str:
    return f"The features could not be kept in {path.parent} ({_reason(error)}); they will be computed again next time."


def _reason(error: Exception) -> str:
    """The heart of what tensorstore says: its status before it and its settings behind it mean nothing to a user."""
    return re.sub(r"^[A-Z_]+: (Error opening \"zarr3\" driver: )?| \[\w+='.*", "", str(error), flags=re.DOTALL)
