"""Where an export is written: checks before any work is done, and directories that appear whole or not at all.

A directory has `SHA256SUMS`, which `sha256sum --check` reads. By it `--overwrite` knows what `export` wrote, and leaves
alone what somebody has put there or changed since.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from cifar_jax.errors import UserError, some_of
from cifar_jax.files import check_target, sha256_of_file

SUMS = "SHA256SUMS"
# Endings of files that a directory is not to be mistaken for.
OF_FILES = (".onnx", ".keras", ".html", ".htm", ".h5", ".pth", ".pt", ".safetensors", ".stablehlo", ".zip")


def check_out(path: Path, form: str, suffix: str, overwrite: bool) -> None:
    """Checks before any work is done that an export can be written.

    Args:
      path: the file or directory.
      form: the format, for messages.
      suffix: ending of files of the format; empty for a directory.
      overwrite: whether an earlier export may be replaced.

    Raises:
      UserError: if the ending is another format's, there is already something, or the directory is read-only.
    """
    if suffix:
        if path.suffix.lower() != suffix:
            raise UserError(f"--out must be a file name that ends in {suffix} for --format {form}, got {path}.")
        check_target(path, overwrite)
        return
    if path.suffix.lower() in OF_FILES:
        raise UserError(f"--out is a directory for --format {form}; leave out the ending {path.suffix} of {path}.")
    if not os.path.lexists(path):
        check_target(path, overwrite)
    elif path.is_symlink() or not path.is_dir():
        raise UserError(f"{path} already exists and is not a directory. Choose another --out.")
    elif any(path.iterdir()):
        if not (path / SUMS).is_file():
            raise UserError(
                f"{path} is not a directory that `export` wrote, so it is not replaced. Choose another --out."
            )
        if not overwrite:
            raise UserError(f"{path} already exists. Pass --overwrite to replace it.")
        if changed := changes_in(path):
            raise UserError(
                f"{path} has changed since it was exported ({some_of(changed)}), so it is not replaced. Move it away, "
                "or choose another --out."
            )


def changes_in(directory: Path) -> list[str]:
    """Names the files of an exported directory that were added or changed since it was written."""
    try:
        lines = (directory / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    return sorted(
        path.name
        for path in directory.iterdir()
        if path.name != SUMS
        and (path.name not in sums or not path.is_file() or sha256_of_file(path) != sums[path.name])
    )


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Writes a directory atomically: yields a temporary one beside it, and renames that if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(temporary.iterdir())
        sums = "".join(f"{sha256_of_file(file)}  {file.name}\n" for file in files)
        (temporary / SUMS).write_text(sums, encoding="utf-8")
        _put(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(new: Path, path: Path) -> None:
    """Renames a directory to a path, at which there may be an older one, which comes back if that fails."""
    if not path.exists() or not any(path.iterdir()):
        new.rename(path)
        return
    old = new.with_name(f"{new.name}.old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old)
