"""Atomic writes, file locks, JSON files with a checksum, and directories of arrays with checksums."""

import contextlib
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from cifar_jax.errors import UserError

MAX_JSON_BYTES = 2**26
_INDEX, _SEAL = "index.json", "own_sha256"


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the cache directory: the argument, $CIFAR_JAX_CACHE, or ~/.cache/cifar_jax."""
    if cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cache_dir = os.environ.get("CIFAR_JAX_CACHE") or os.path.join(base, "cifar_jax")
    return Path(os.path.expanduser(cache_dir))


def check_target(path: Path, overwrite: bool) -> None:
    """Checks before any work is done that a file can be written.

    Raises:
      UserError: if its directory is missing or read-only, or there is already something at the path.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a directory. Choose a file name.")
    if not os.path.isdir(path.parent):
        raise UserError(f"{path} is in a directory that does not exist. Create {path.parent} or choose another path.")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path} already exists. Pass --overwrite to replace it.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written, as {path.parent} is read-only. Choose another directory.")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Writes a file atomically: yields a temporary path beside it, and renames that to `path` if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def lock(file: IO[bytes] | int, on_waiting: Callable[[], None]) -> bool:
    """Locks a file until it is closed or the process ends.

    Args:
      file: an open file, or its descriptor.
      on_waiting: called before waiting for another process that holds the lock; an exception it raises ends the wait.

    Returns:
      Whether the file is locked: some file systems do not support locks, and Windows has none of this kind.
    """
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        on_waiting()
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def locked_directory(path: Path, on_waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Locks a directory itself, without leaving a lock file behind, until the block ends; see `lock`."""
    if sys.platform == "win32":
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield lock(descriptor, on_waiting)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, a link or a directory; it need not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(directory: Path, pattern: str) -> None:
    """Removes temporary files left by killed processes. The caller must be the only one that writes there."""
    for path in directory.glob(pattern):
        remove(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically.

    Raises:
      ValueError: for NaN and infinities, which JSON does not have.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json_value(path: Path) -> Any:
    """Reads a JSON file of at most 64 MB, more than this project ever writes.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is not JSON, or is too large.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"it is larger than {MAX_JSON_BYTES // 2**20} MB")
    return json.loads(content.decode("utf-8"))


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON with a checksum of itself, atomically, for `read_sealed`. NaN and infinities are kept."""
    write_text(path, json.dumps({**value, _SEAL: _sha256_of_json(value)}, indent=1) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads a file written by `write_sealed` and verifies its checksum.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is corrupt.
    """
    value = read_json_value(path)
    if not isinstance(value, dict) or value.pop(_SEAL, None) != _sha256_of_json(value):
        raise ValueError(f"checksum mismatch in {path.name}")
    return value


def without_nan(value: Any) -> Any:
    """Replaces NaN and infinities, such as the accuracy of a class without examples, by None for valid JSON."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def sha256_of_file(path: Path) -> str:
    """Returns the SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_arrays(*arrays: np.ndarray) -> str:
    """Returns the SHA-256 of the dtypes, shapes and bytes of arrays, in hex; equal arrays have equal digests."""
    digest = hashlib.sha256()
    for array in arrays:
        update_digest(digest, array)
    return digest.hexdigest()


def update_digest(digest: "hashlib._Hash", array: np.ndarray) -> None:
    """Adds the dtype, shape and bytes of an array to a digest."""
    digest.update(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)


def save_arrays(directory: Path, arrays: Mapping[str, np.ndarray | Path], about: Mapping[str, Any]) -> None:
    """Saves arrays as .npy files in a new directory, atomically.

    Args:
      directory: must not exist; its parents are created.
      arrays: arrays by name, or .npy files of them on the same file system, which are moved.
      about: JSON values saved with them, which `load_arrays` returns.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with locked_directory(directory.parent) as locked:
        if locked:
            remove_leftovers(directory.parent, f".{glob.escape(directory.name)}.*")
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as parent:
            temporary = Path(parent) / "arrays"
            temporary.mkdir()
            digests = {}
            for name, array in arrays.items():
                path = temporary / f"{name}.npy"
                if isinstance(array, Path):
                    array = np.load(array.rename(path), mmap_mode="r")
                else:
                    np.save(path, array)
                digests[name] = sha256_of_arrays(array)
            write_sealed(temporary / _INDEX, {"about": dict(about), "sha256": digests})
            try:
                temporary.rename(directory)
            except OSError:
                # Another process may have created the directory meanwhile; its content is the same.
                if not directory.is_dir():
                    raise


def load_arrays(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Memory-maps arrays saved by `save_arrays` and verifies their checksums.

    Returns:
      The arrays by name, read-only, and the JSON values saved with them.

    Raises:
      FileNotFoundError: if the directory does not exist.
      ValueError: if anything in it is missing or corrupt.
    """
    try:
        index = read_sealed(directory / _INDEX)
        arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in index["sha256"]}
        about = index["about"]
    except (FileNotFoundError, NotADirectoryError):
        if directory.is_dir():
            raise ValueError(f"{directory} is incomplete") from None
        raise FileNotFoundError(f"{directory} does not exist") from None
    except Exception as error:  # NumPy raises all kinds of errors on a corrupt .npy header
        raise ValueError(f"{directory} is corrupt ({error})") from error
    for name, array in arrays.items():
        if sha256_of_arrays(array) != index["sha256"][name]:
            raise ValueError(f"{directory / name}.npy is corrupt (checksum mismatch)")
    return arrays, about


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
