"""JAX's persistent compilation cache with entries that are checked, so that a second command starts at once.

JAX's own keeps an entry that a kill cut short for ever and warns of it at each start, and with a size limit a kill
between the two files of an entry stops it from writing at all (https://github.com/jax-ml/jax/issues/39880). Here an
entry is one file that appears whole; it begins with the digest of the rest, and goes when that does not fit.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from cifar_jax.files import cache_root, locked_directory, remove_leftovers, replacing
from cifar_jax.runtime.caches import XLA

MAX_BYTES = 2**30
_SUFFIX = ".xla"
_DIGEST_BYTES = hashlib.sha256().digest_size

logger = logging.getLogger(__name__)


def use_compile_cache(cache_dir: str | None = None) -> None:
    """Keeps what JAX compiles from now on, below the project's cache, and takes from there what is there already.

    Commands call this; importing the library does not. Where JAX_COMPILATION_CACHE_DIR names a place, JAX's own cache
    is used, there; JAX_ENABLE_COMPILATION_CACHE=false turns either off. Where nothing can be
    kept, that is logged, once.

    Args:
      cache_dir: of the project; else $CIFAR_JAX_CACHE, else ~/.cache/cifar_jax.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    path = cache_root(cache_dir).absolute() / XLA
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_usable(path)
        _give_to_jax(path, CheckedCache(path))
    except (OSError, ImportError, AttributeError) as error:
        logger.info(_not_kept(path, error))


def _give_to_jax(path: Path, cache: "CheckedCache") -> None:
    """JAX has no public way to be given a cache; where its private one has gone, there is none."""
    from jax._src import compilation_cache

    if not hasattr(compilation_cache, "get_file_cache"):
        raise ImportError(f"JAX {jax.__version__} takes no cache of another's")
    compilation_cache.reset_cache()
    compilation_cache.get_file_cache = lambda place: (cache, place)  # type: ignore[assignment, return-value]
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _require_usable(path: Path) -> None:
    about = path.stat()
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise PermissionError("others can write there, and what they put there would be run")
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError("it is read-only")


def _not_kept(path: Path, error: Exception) -> str:
    return f"Compiled functions cannot be kept in {path} ({error}): the next command compiles them again."


class CheckedCache:
    """Compiled functions by key, each in a file, all of them within a limit; what JAX calls a `CacheInterface`."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES):
        """Takes the directory, which exists."""
        self._path, self._max_bytes = path, max_bytes
        self._size = self._make_room(0)

    def get(self, key: str) -> bytes | None:
        """What was put under a key; None where it is not, or not all of it is, which is removed."""
        path = self._path / (key + _SUFFIX)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        digest, value = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(value).digest() != digest:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # what was used last goes last
        return value

    def put(self, key: str, value: bytes) -> None:
        """Keeps a compiled function. If that fails, it is logged, and nothing more is kept."""
        content = hashlib.sha256(value).digest() + value
        if len(content) > self._max_bytes:
            return
        try:
            with locked_directory(self._path) as alone:
                if alone:
                    remove_leftovers(self._path, f".*{_SUFFIX}")
                if self._size + len(content) > self._max_bytes:
                    self._size = self._make_room(len(content))
                with replacing(self._path / (key + _SUFFIX)) as temporary:
                    temporary.write_bytes(content)
            self._size += len(content)
        except OSError as error:
            self._max_bytes = 0
            logger.info(_not_kept(self._path, error))

    def _make_room(self, num_bytes: int) -> int:
        """Removes what was used least recently, until so many bytes fit in. Returns how many there are then."""
        files = sorted((about.st_mtime, about.st_size, path) for path, about in _files(self._path))
        size = sum(num for _, num, _ in files)
        for _, num, path in files:
            if size + num_bytes <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            size -= num
        return size


def _files(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in directory.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            yield path, path.stat()
