"""JAX's persistent compilation cache, below the project's own, so that a second command starts at once.

JAX writes entries in place: one that a kill cut short it keeps, and warns of it at each start. With its own limit on
their size, a kill between the two files of an entry stops it from writing for good
(https://github.com/jax-ml/jax/issues/39880). So what is cut short goes at the start of a command, and what is too much.
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
_CHECKED = "checked"  # its time of change says when entries were looked at last: to read all takes long at each start
_OVERLAP = 2.0  # seconds, in which another process may have been writing
_ZSTD = b"\x28\xb5\x2f\xfd"  # how its frames begin

logger = logging.getLogger(__name__)


def use_compile_cache(cache_dir: str | None = None) -> None:
    """Keeps what JAX compiles from now on, below the project's cache, and takes from there what is there already.

    Commands call this; importing the library does not. Where JAX_COMPILATION_CACHE_DIR names a place, that is used, as
    it is; JAX_ENABLE_COMPILATION_CACHE=false turns either off. Where nothing can be kept, that is logged, once.

    Args:
      cache_dir: of the project; else $CIFAR_JAX_CACHE, else ~/.cache/cifar_jax.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    path = cache_root(cache_dir).absolute() / XLA
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_usable(path)
        _tidy(path)
    except OSError as error:
        logger.info(f"Compiled functions cannot be kept in {path} ({error}): the next command compiles them again.")
        return
    reset_cache()  # this process may have used another one
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _require_usable(path: Path) -> None:
    about = path.stat()
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise PermissionError("others can write there, and what they put there would be run")
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError("it is read-only")


def _tidy(path: Path) -> None:
    """Removes entries that are cut short, of those written since it last looked, and the oldest beyond MAX_BYTES."""
    stamp = path / _CHECKED
    since = stamp.stat().st_mtime - _OVERLAP if stamp.exists() else 0.0
    whole, num_cut = [], 0
    for entry in path.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            about = entry.stat()
            if about.st_mtime < since or _is_whole(entry):
                whole.append((max(about.st_atime, about.st_mtime), about.st_size, entry))
            else:
                entry.unlink()
                num_cut += 1
    stamp.touch()
    if num_cut:
        logger.info(f"{num_cut:,} compiled functions in {path} are cut short, as by a kill: they are compiled again.")
    excess = sum(size for _, size, _ in whole) - MAX_BYTES
    for _, size, entry in sorted(whole):
        if excess > 0:
            entry.unlink(missing_ok=True)
            excess -= size


def _is_whole(entry: Path) -> bool:
    """Whether an entry can be decompressed; JAX compresses by zstandard where that is installed, else by zlib."""
    try:
        content = entry.read_bytes()
        if not content.startswith(_ZSTD):
            zlib.decompress(content)
        else:
            for name in ("compression.zstd", "zstandard"):
                with contextlib.suppress(ImportError):
                    importlib.import_module(name).decompress(content)
    except OSError:
        return True  # that is another matter
    except Exception:  # each library has an error of its own
        return False
    return True
