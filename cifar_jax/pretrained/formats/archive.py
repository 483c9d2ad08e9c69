"""Zip archives with uncompressed entries, the container of PyTorch checkpoints and Keras's `.keras` files."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cifar_jax.errors import WeightsError


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a zip file after validating its table of entries; `read` checks an entry's CRC.

    Nothing is unpacked to disk, so names are only keys, never paths.

    Raises:
      WeightsError: if it is corrupt, also while the block reads it; an entry is compressed or encrypted; two entries
        have one name; or the entries together are larger than the file.
    """
    try:
        with zipfile.ZipFile(path) as file:
            _validate_entries(file.infolist(), path)
            yield file
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{path} is corrupt or truncated ({error}). Get a fresh copy of the file.") from error


def _validate_entries(infos: list[zipfile.ZipInfo], path: Path) -> None:
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise WeightsError(
                f"{path} has a compressed or encrypted entry {info.filename!r}, which neither PyTorch nor Keras "
                "writes. Unpack the archive and use the weights file inside it."
            )
    if len({info.filename for info in infos}) < len(infos):
        raise WeightsError(f"{path} has two entries of one name, so its content is ambiguous. Get a fresh copy.")
    # Overlapping entries would together be larger than the file.
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise WeightsError(f"{path} is corrupt: its entries are larger than the file. Get a fresh copy of the file.")
