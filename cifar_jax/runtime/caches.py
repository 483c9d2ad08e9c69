"""The project's cache: listing, locking and removal.

Only files that the project writes are removed, and symlinks are not followed.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cifar_jax.files import lock

FEATURES, DATA, XLA, WEIGHTS = "features", "data", "xla", "weights"
ABOUT, _LOCK = "about.json", "lock"
# Everything that can be recomputed: paths, relative to the folder, of files and of directories (with a trailing slash).
# A killed process may leave names that begin with a dot or end in __lock.
_OWN = {
    FEATURES: re.compile(r"[0-9a-f]{32}/(c/(\d+/(0(\.__lock)?)?)?|\.?about\.json(\.\w+\.json)?|lock)?"),
    DATA: re.compile(r"[^/]+/(\w+\.npy|\.?index\.json(\.\w+\.json)?)?"),
    XLA: re.compile(r"[^/]+-[0-9a-f]{64}-cache|checked|xla_gpu_per_fusion_autotune_cache_dir/.*"),
}

logger = logging.getLogger(__name__)


class CacheEntry(NamedTuple):
    """An entry of the cache; `about`, read from its about.json, may be empty."""

    kind: str
    path: Path
    size: int  # bytes
    last_used: float  # seconds since 1970
    about: dict[str, Any]


def contents(root: Path) -> list[CacheEntry]:
    """Lists the entries of the cache, grouped by kind."""
    kinds = {FEATURES: "features", DATA: "decoded images", WEIGHTS: "weights"}
    entries = [_entry(kind, path) for folder, kind in kinds.items() for path in _directories(root / folder)]
    return entries + [_entry("compiled functions", path) for path in [root / XLA] if path.is_dir()]


def clear(root: Path) -> int:
    """Removes everything that can be recomputed: features, decoded images and compiled functions, but not weights.

    Entries in use by another process and files that the cache did not write are kept and logged.

    Returns:
      The number of bytes freed.
    """
    freed, in_use = _remove(root / DATA) + _remove(root / XLA), set()
    for path in _feature_entries(root):
        try:
            freed += _remove_entry(path)
        except BlockingIOError:
            in_use.add(path)
            logger.info(f"{path} is kept: another process is using it.")
    for folder in (root / kind for kind in _OWN):
        others = [folder] if folder.is_symlink() else sorted(set(folder.glob("*")) - in_use)
        if others:
            logger.info(f"{others[0]} is kept: the cache did not write it, or not everything in it.")
    return freed


def limit_features(root: Path, limit: float, in_use: Collection[str]) -> None:
    """Removes the least recently used features until at most `limit` bytes of features remain.

    Args:
      root: root of the cache.
      limit: maximum size in bytes.
      in_use: names of entries to keep; those in use by another process are kept too.
    """
    entries = sorted((_entry("features", path) for path in _feature_entries(root)), key=lambda entry: entry.last_used)
    total, freed = sum(entry.size for entry in entries), 0
    for entry in entries:
        if total - freed > limit and entry.path.name not in in_use:
            with contextlib.suppress(OSError):
                freed += _remove_entry(entry.path)
    if freed:
        logger.info(f"Evicted {freed / 1e9:.2f} GB of least recently used features (--cache-limit).")


@contextlib.contextmanager
def locked(path: Path, on_waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the lock of a directory, created if necessary, on file systems with locks; for `on_waiting` see `lock`."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        with open(path / _LOCK, "ab") as file:
            lock(file, on_waiting)
            try:
                is_there = os.path.samestat(os.fstat(file.fileno()), os.stat(path / _LOCK))
            except FileNotFoundError:
                is_there = False  # the previous holder of the lock has removed the directory
            if is_there:
                yield
                return


def _feature_entries(root: Path) -> list[Path]:
    """The directories of cached features that may be removed."""
    folder = root / FEATURES
    ours = [path for path in _directories(folder) if _OWN[FEATURES].fullmatch(f"{path.name}/")]
    return [] if folder.is_symlink() else ours


def _directories(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if path.is_dir() and not path.is_symlink()]


def _entry(kind: str, path: Path) -> CacheEntry:
    files = [os.lstat(os.path.join(here, name)) for here, _, names in os.walk(path) for name in names]
    last_used = (path / ABOUT if (path / ABOUT).exists() else path).stat().st_mtime
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = None  # corrupt or missing
    about = about if isinstance(about, dict) else {}
    return CacheEntry(kind, path, sum(file.st_size for file in files), last_used, about)


def _remove_entry(path: Path) -> int:
    """Removes an entry of features, and returns the bytes freed.

    Raises:
      BlockingIOError: if another process is using it.
    """

    def refuse() -> None:
        raise BlockingIOError(f"another process is using {path}")

    with locked(path, refuse):
        return _remove(path.parent, path.name)


def _remove(folder: Path, name: str = "") -> int:
    """Removes the files that the cache wrote to a folder, or to `name` in it, and returns the bytes freed."""
    freed, own = 0, _OWN[folder.name]
    if folder.is_symlink():
        return 0
    for here, directories, files in os.walk(folder / name, topdown=False):  # follows no symlinks below
        for path in (Path(here, file) for file in files):
            if own.fullmatch(str(path.relative_to(folder))) and not path.is_symlink():
                freed += path.stat().st_size
                path.unlink()
        for path in (Path(here, directory) for directory in directories):
            if own.fullmatch(f"{path.relative_to(folder)}/"):
                with contextlib.suppress(OSError):  # a symlink, or not empty
                    path.rmdir()
    if name:
        with contextlib.suppress(OSError):
            (folder / name).rmdir()
    return freed
