"""The project's cache: listing, locking and removal.

Only files that the project writes are removed, and symlinks are not followed.
"""

import contextlib
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cifar_jax.files import lock

FEATURES, DATA, XLA, WEIGHTS = "features", "data", "xla", "weights"
ABOUT, _LOCK = "about.json", "lock"
# Everything that can be recomputed: paths, relative to the folder, of files and of directories (with a trailing slash).
# A killed process may leave names that begin with a dot or end in __lock; zarr.json and .xla are from older versions.
_OWN = {
    FEATURES: re.compile(
        r"[0-9a-f]{32}/(c/(\d+/(0(\.__lock)?)?)?|\.?about\.json(\.\w+\.json)?|lock|zarr\.json(\.__lock)?)?"
    ),
    DATA: re.compile(r"[^/]+/(\w+\.npy|\.?index\.json(\.\w+\.json)?)?"),
    XLA: re.compile(r"[^/]+-[0-9a-f]{64}-cache|checked|[^/]+\.xla|xla_gpu_per_fusion_autotune_cache_dir/.*"),
}

logger = logging.getLogger(__name__)


class Kept(NamedTuple):
    """An entry of the cache; `about`, read from its about.json, may be empty."""

    what: str
    path: Path
    size: int  # bytes
    used: float  # seconds since 1970
    about: dict[str, Any]


def contents(root: Path) -> list[Kept]:
    """Lists the entries of the cache, grouped by kind."""
    kinds = {FEATURES: "features", DATA: "decoded images", WEIGHTS: "weights"}
    kept = [_kept(what, path) for kind, what in kinds.items() for path in _directories(root / kind)]
    return kept + [_kept("compiled functions", path) for path in [root / XLA] if path.is_dir()]


def clear(root: Path) -> int:
    """Removes everything that can be recomputed: features, decoded images and compiled functions, but not weights.

    Entries in use by another process and files that the cache did not write are kept and logged.

    Returns:
      The number of bytes freed.
    """
    freed, in_use = _remove(root / DATA) + _remove(root / XLA), []
    for path in _entries(root):
        try:
            freed += _remove_entry(path)
        except BlockingIOError:
            in_use.append(path)
            logger.info(f"{path} is kept: another process is using it.")
    for folder in (root / kind for kind in _OWN):
        others = [folder] if folder.is_symlink() else sorted(set(folder.glob("*")).difference(in_use))
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
    kept = sorted((_kept("features", path) for path in _entries(root)), key=lambda entry: entry.used)
    total, freed = sum(entry.size for entry in kept), 0
    for entry in kept:
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


def _entries(root: Path) -> list[Path]:
    """The directories of cached features that may be removed."""
    folder = root / FEATURES
    ours = [path for path in _directories(folder) if _OWN[FEATURES].fullmatch(f"{path.name}/")]
    return [] if folder.is_symlink() else ours


def _directories(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if path.is_dir() and not path.is_symlink()]


def _kept(what: str, path: Path) -> Kept:
    files = [os.lstat(os.path.join(here, name)) for here, _, names in os.walk(path) for name in names]
    used = (path / ABOUT if (path / ABOUT).exists() else path).stat().st_mtime
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = None  # corrupt or missing
    return Kept(what, path, sum(file.st_size for file in files), used, about if isinstance(about, dict) else {})


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
    if not (folder / name).exists():
        return 0
    for here, directories, files, handle in os.fwalk(folder / name, topdown=False):
        place = Path(here).relative_to(folder)
        for file in files:
            about = os.stat(file, dir_fd=handle, follow_symlinks=False)
            if own.fullmatch(str(place / file)) and stat.S_ISREG(about.st_mode):
                os.unlink(file, dir_fd=handle)
                freed += about.st_size
        for directory in directories:
            if own.fullmatch(f"{place / directory}/"):
                with contextlib.suppress(OSError):  # a symlink, or not empty
                    os.rmdir(directory, dir_fd=handle)
    if name:
        with contextlib.suppress(OSError):
            (folder / name).rmdir()
    return freed
