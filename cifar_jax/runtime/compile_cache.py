"""JAX's persistent compilation cache, inside the project's cache, so that later commands start without compiling.

JAX writes entries in place: an entry truncated by a kill stays, with a warning at each start. With JAX's own size
limit, a kill between writing the two files of an entry stops all further writes
(https://github.com/jax-ml/jax/issues/39880). So each command removes truncated entries and enforces the limit itself.
"""

import contextlib
import importlib
import logging
import os
import zlib
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from cifar_jax.files import cache_root
from cifar_jax.runtime.caches import XLA

MAX_BYTES = 2**30
_CHECKED = "checked"  # modified when entries were last checked, as reading all of them at each start is slow
_OVERLAP = 2.0  # seconds before the last check in which another process may still have been writing
_ZSTD = b"\x28\xb5\x2f\xfd"  # magic number of a zstandard frame

logger = logging.getLogger(__name__)


def use_compile_cache(cache_dir: str | None = None) -> None:
    """Enables JAX's persistent compilation cache in the project's cache directory.

    Commands call this; importing the library does not. If JAX_COMPILATION_CACHE_DIR is set, that directory is used
    unchanged; JAX_ENABLE_COMPILATION_CACHE=false disables either. If the directory is not usable, that is logged once.

    Args:
      cache_dir: the project's cache directory; if None, $CIFAR_JAX_CACHE, or else ~/.cache/cifar_jax.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    path = cache_root(cache_dir).absolute() / XLA
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_usable(path)
        _tidy(path)
    except OSError as error:
        logger.info(f"Cannot save compiled functions in {path} ({error}); the next command will recompile them.")
        return
    reset_cache()  # this process may have used another cache directory
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _require_usable(path: Path) -> None:
    about = path.stat()
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise PermissionError("others can write there, and its contents would be executed")
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError("it is read-only")


def _tidy(path: Path) -> None:
    """Removes truncated entries written since the last check, and the least recently used ones above MAX_BYTES."""
    stamp = path / _CHECKED
    since = stamp.stat().st_mtime - _OVERLAP if stamp.exists() else 0.0
    whole, num_cut = [], 0
    for entry in path.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            about = entry.stat()
            if about.st_mtime < since or _is_whole(entry):
                whole.append((max(about.st_atime, about.st_mtime), about.st_size, entry))
            else:
                entry.unlink()
                num_cut += 1
    stamp.touch()
    if num_cut:
        logger.info(f"Removed {num_cut:,} truncated compiled functions from {path}; they will be recompiled.")
    excess = sum(size for _, size, _ in whole) - MAX_BYTES
    for _, size, entry in sorted(whole):
        if excess > 0:
            entry.unlink(missing_ok=True)
            excess -= size


def _is_whole(entry: Path) -> bool:
    """Returns whether an entry can be decompressed; JAX uses zstandard if it is installed, otherwise zlib."""
    try:
        content = entry.read_bytes()
        if not content.startswith(_ZSTD):
            zlib.decompress(content)
        else:
            for name in ("compression.zstd", "zstandard"):
                with contextlib.suppress(ImportError):
                    importlib.import_module(name).decompress(content)
    except OSError:
        return True  # unreadable, which does not mean truncated
    except Exception:  # each library raises its own type
        return False
    return True
