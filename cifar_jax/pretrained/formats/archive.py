"""Zip archives with uncompressed entries, the container of PyTorch checkpoints and Keras's `.keras` files."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cifar_jax.errors import WeightsError

MAX_ENTRIES = 20_000  # a ResNet152 with optimizer state has 3,000


class Archive:
    """The entries of a zip file by name. Nothing is unpacked to disk, so names are only keys, never paths."""

    def __init__(self, file: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], path: Path):
        self._file, self._entries, self._path = file, entries, path

    @property
    def names(self) -> list[str]:
        """Names of all entries."""
        return list(self._entries)

    def size(self, name: str) -> int:
        """Returns the size of an entry in bytes."""
        return self._entries[name].file_size

    def read(self, name: str) -> bytes:
        """Returns an entry's bytes after checking its CRC."""
        try:
            return self._file.read(self._entries[name])
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            raise _corrupt(self._path, error) from error


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Opens a zip file after validating its table of entries.

    Raises:
      WeightsError: if it is corrupt; an entry is compressed, encrypted, duplicated, or named by an absolute path or one
        with `..`; or the entries together are larger than the file.
    """
    try:
        file = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _corrupt(path, error) from error
    with file:
        yield Archive(file, _validate_entries(file.infolist(), path), path)


def _validate_entries(infos: list[zipfile.ZipInfo], path: Path) -> dict[str, zipfile.ZipInfo]:
    if len(infos) > MAX_ENTRIES:
        raise WeightsError(
            f"{path} is an archive of {len(infos):,} entries, too many for a weights file. Use another file."
        )
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise WeightsError(
                f"{path} has a compressed or encrypted entry {name!r}, which neither PyTorch nor Keras writes. Unpack "
                "the archive and use the weights file inside it."
            )
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
            raise WeightsError(
                f"{path} has an entry {name!r} that points outside the archive. Get a fresh copy of the file."
            )
        if name in entries:
            raise WeightsError(f"{path} holds {name!r} twice, which is ambiguous. Get a fresh copy of the file.")
        entries[name] = info
    # Overlapping entries would together be larger than the file.
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise WeightsError(f"{path} is corrupt: its entries are larger than the file. Get a fresh copy of the file.")
    return entries


def _corrupt(path: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path} is corrupt or truncated ({error}). Get a fresh copy of the file.")
