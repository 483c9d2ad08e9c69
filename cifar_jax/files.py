"""Files that appear whole or not at all, and arrays kept on disk with a digest."""

import contextlib
import glob
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

MAX_JSON_BYTES = 2**26
_INDEX, _SEAL = "index.json", "own_sha256"


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where the project keeps what it can make again: the argument, $CIFAR_JAX_CACHE, or ~/.cache/cifar_jax."""
    if cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cache_dir = os.environ.get("CIFAR_JAX_CACHE") or os.path.join(base, "cifar_jax")
    return Path(os.path.expanduser(cache_dir))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary file beside `path` to write to, and moves it into place if the block ends without an error."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that only their owner may read; a result is as public as its directory.
        temporary.chmod(0o666 & ~_umask())
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def lock(file: IO[bytes] | int, on_waiting: Callable[[], None]) -> bool:
    """Locks a file until it is closed, as the end of the process does too.

    Args:
      file: that is open, or its descriptor.
      on_waiting: is called when another process holds the lock, before it is waited for; what it raises ends that.

    Returns:
      Whether it is locked: some file systems have no locks, and some systems none of this kind.
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
    """Locks a directory itself, so that no file for it is left behind, until the block ends; see `lock`."""
    if sys.platform == "win32":
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield lock(descriptor, on_waiting)
    finally:
        os.close(descriptor)


def remove_leftovers(directory: Path, pattern: str) -> None:
    """Removes what killed processes left of files they were writing; to be called by who alone writes there."""
    for path in directory.glob(pattern):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that a person can read, whole or not at all. NaN has no place in JSON and raises ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json_value(path: Path) -> Any:
    """Reads a JSON file that the project wrote, or may have; one of more than 64 MB it did not.

    Raises:
      OSError: when it cannot be read.
      ValueError: when it is no JSON, or too large.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES // 2**20} MB")
    return json.loads(content.decode("utf-8"))


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON with a digest of its own, for `read_sealed`. Numbers that are not finite are kept as they are."""
    write_text(path, json.dumps({**value, _SEAL: _sha256_of_json(value)}, indent=1) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what `write_sealed` wrote.

    Raises:
      OSError: when it cannot be read.
      ValueError: when it is damaged.
    """
    value = read_json_value(path)
    if not isinstance(value, dict) or value.pop(_SEAL, None) != _sha256_of_json(value):
        raise ValueError(f"{path.name} does not have the digest it should have")
    return value


def without_nan(value: Any) -> Any:
    """The same with null for numbers that JSON does not have, such as the accuracy of a class without examples."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_arrays(*arrays: np.ndarray) -> str:
    """SHA-256 over dtype, shape and bytes of arrays, in hex: equal arrays, equal digest, wherever they came from."""
    digest = hashlib.sha256()
    for array in arrays:
        update_digest(digest, array)
    return digest.hexdigest()


def update_digest(digest: "hashlib._Hash", array: np.ndarray) -> None:
    """Adds dtype, shape and bytes of an array to a digest."""
    digest.update(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)


def save_arrays(directory: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Keeps arrays as .npy files in a directory that appears whole or not at all.

    Args:
      directory: must not exist; its parents are made.
      arrays: by name.
      about: JSON values kept beside them, for the reader of the directory and for `load_arrays`.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with locked_directory(directory.parent) as alone:
        if alone:
            remove_leftovers(directory.parent, f".{glob.escape(directory.name)}.????????")  # as mkdtemp names them
        _save_arrays(directory, arrays, about)


def _save_arrays(directory: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        digests = {name: sha256_of_arrays(array) for name, array in arrays.items()}
        write_sealed(temporary / _INDEX, {"about": dict(about), "sha256": digests})
        temporary.chmod(0o777 & ~_umask())
        # Another process may have made the same directory meanwhile; its content is the same, so the first one stays.
        try:
            os.replace(temporary, directory)
        except OSError:
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_arrays(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Memory-maps what `save_arrays` kept, every byte checked against its digest.

    Returns:
      The arrays by name, read-only, and what was kept beside them.

    Raises:
      FileNotFoundError: when the directory is not there.
      ValueError: when anything in it is missing or damaged.
    """
    try:
        index = read_sealed(directory / _INDEX)
        arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in index["sha256"]}
        about = index["about"]
    except (FileNotFoundError, NotADirectoryError):
        if directory.is_dir():
            raise ValueError(f"{directory} is incomplete") from None
        raise FileNotFoundError(f"{directory} does not exist") from None
    except Exception as error:  # a damaged .npy header fails as a number, a literal or a line of Python may fail
        raise ValueError(f"{directory} is damaged ({error})") from error
    for name, array in arrays.items():
        if sha256_of_arrays(array) != index["sha256"][name]:
            raise ValueError(f"{directory / name}.npy is damaged: its bytes do not have the digest kept beside it")
    return arrays, about


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
