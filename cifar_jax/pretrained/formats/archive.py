"""Zip archives that keep their entries as they are, which PyTorch's checkpoints and Keras's `.keras` files do."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cifar_jax.errors import WeightsError

MOST_ENTRIES = 20_000  # a ResNet152 with its optimizer's state has 3,000


class Archive:
    """The entries of a zip file by name. Nothing is unpacked to the disk, so a name is a key and never a path."""

    def __init__(self, file: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], path: Path):
        self._file, self._entries, self._path = file, entries, path

    @property
    def names(self) -> list[str]:
        """All entries."""
        return list(self._entries)

    def size(self, name: str) -> int:
        """Bytes of an entry."""
        return self._entries[name].file_size

    def read(self, name: str) -> bytes:
        """An entry's bytes, held against its CRC."""
        try:
            return self._file.read(self._entries[name])
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            raise _damaged(self._path, error) from error


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Opens a zip file after looking at what it claims.

    Raises:
      WeightsError: when it is damaged, an entry is compressed or encrypted, names an absolute path or one above, is
        there twice, or all of them together are larger than the file.
    """
    try:
        file = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _damaged(path, error) from error
    with file:
        yield Archive(file, _checked(file.infolist(), path), path)


def _checked(infos: list[zipfile.ZipInfo], path: Path) -> dict[str, zipfile.ZipInfo]:
    if len(infos) > MOST_ENTRIES:
        raise WeightsError(
            f"{path} is an archive of {len(infos)} entries, which no weights file is; give another file."
        )
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise WeightsError(
                f"{path} keeps {name!r} compressed or encrypted, as neither PyTorch nor Keras does; unpack the archive "
                "and give the weights file in it."
            )
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
            raise WeightsError(f"{path} names an entry {name!r} that lies outside of the archive; get the file again.")
        if name in entries:
            raise WeightsError(f"{path} holds {name!r} twice; it cannot be told which one is meant.")
        entries[name] = info
    # Entries that overlap in the file would together be larger than it.
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise WeightsError(f"{path} is damaged: its entries claim more bytes than it has; get the file again.")
    return entries


def _damaged(path: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path} is damaged or cut short ({error}); get the file again.")
