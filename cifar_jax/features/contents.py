"""What lies in the cache and how it goes: only files that the project writes, and none behind a symbolic link."""

import contextlib
import json
import logging
import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from cifar_jax.features.store import ABOUT, locked

logger = logging.getLogger(__name__)

FEATURES, DATA, XLA, WEIGHTS = "features", "data", "xla", "weights"
# What can be made again: the files of each folder, and the directories that may be empty, as paths below the folder.
# The last of the features are an earlier version's; a name that begins with a dot is what a kill may leave.
_OWN = {
    FEATURES: re.compile(
        r"[0-9a-f]{32}/(c/(\d+/(0(\.__lock)?)?)?|zarr\.json(\.__lock)?|\.?about\.json(\.\w+\.json)?|lock"
        r"|features\.npy|index\.json)?"
    ),
    DATA: re.compile(r"[^/]+/(\w+\.npy|\.?index\.json(\.\w+\.json)?)"),
    XLA: re.compile(r"[^/]+\.xla|xla_gpu_per_fusion_autotune_cache_dir/.*"),
}


class Kept(NamedTuple):
    """Something that the cache holds."""

    what: str
    path: Path
    size: int  # bytes
    used: float  # seconds since 1970
    images: int | None = None
    backbone: str = ""


def contents(root: Path) -> list[Kept]:
    """What the cache holds, kind by kind."""
    kept = [_features(path) for path in _directories(root / FEATURES)]
    kept += [_other("decoded images", path) for path in _directories(root / DATA)]
    kept += [_other("weights", path) for path in _directories(root / WEIGHTS)]
    if (root / XLA).is_dir():
        kept.append(_other("compiled functions", root / XLA))
    return kept


def clear(root: Path) -> int:
    """Removes what can be made again: features, decoded images and compiled functions, but no downloaded weights.

    What another process is using stays, and what the cache did not write; either is logged.

    Returns:
      How many bytes that was.
    """
    freed, in_use = 0, []
    for path in _removable(root):
        try:
            freed += _remove_features(path)
        except BlockingIOError:
            in_use.append(path)
            logger.info(f"{path} stays, as another process is using it.")
    freed += _remove(root / DATA, root / DATA, _OWN[DATA]) + _remove(root / XLA, root / XLA, _OWN[XLA])
    for folder in (root / kind for kind in _OWN):
        others = [folder] if folder.is_symlink() else sorted(set(folder.glob("*")).difference(in_use))
        if others:
            logger.info(f"{others[0]} stays, as the cache did not write it, or not all that is in it.")
    return freed


def limit_features(root: Path, limit: float, in_use: Collection[str]) -> None:
    """Removes the features that were used least recently, as long as there are more than `limit` bytes of them.

    Args:
      root: of the cache.
      limit: in bytes.
      in_use: names of entries that stay, as do those that another process is using.
    """
    kept = sorted((_features(path) for path in _removable(root)), key=lambda entry: entry.used)
    total, freed = sum(entry.size for entry in kept), 0
    for entry in kept:
        if total - freed > limit and entry.path.name not in in_use:
            with contextlib.suppress(OSError):
                freed += _remove_features(entry.path)
    if freed:
        logger.info(
            f"{freed / 1e9:.2f} GB of features that were used least recently left the cache, as --cache-limit says."
        )


def _removable(root: Path) -> list[Path]:
    folder = root / FEATURES
    ours = [path for path in _directories(folder) if re.fullmatch(r"[0-9a-f]{32}", path.name)]
    return [] if folder.is_symlink() else ours


def _directories(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if path.is_dir() and not path.is_symlink()]


def _features(path: Path) -> Kept:
    """An entry as its about.json tells it; where that is damaged, little is known."""
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        what = (
            f"features of {about['data']}, {about['image_size']} pixels, {about['precision']}, kept in {about['dtype']}"
        )
        return _other(what, path, path / ABOUT)._replace(images=int(about["images"]), backbone=str(about["backbone"]))
    except (OSError, ValueError, KeyError, TypeError):
        return _other("features", path)


def _other(what: str, path: Path, stamp: Path | None = None) -> Kept:
    files = [os.lstat(os.path.join(here, name)) for here, _, names in os.walk(path) for name in names]
    used = (stamp or path).stat().st_mtime
    return Kept(what, path, sum(about.st_size for about in files), used)


def _remove_features(path: Path) -> int:
    """Removes an entry, and returns its bytes.

    Raises:
      BlockingIOError: when another process is using it.
    """
    with locked(path):
        return _remove(path, path.parent, _OWN[FEATURES])


def _remove(top: Path, folder: Path, own: re.Pattern[str]) -> int:
    """Removes what is ours below a directory. Whatever stands behind a symbolic link is not looked at."""
    freed, emptied = 0, set()
    if not top.exists():
        return 0
    for here, directories, names, handle in os.fwalk(top, topdown=False):
        place = Path(here).relative_to(folder)
        for name in names:
            about = os.stat(name, dir_fd=handle, follow_symlinks=False)
            if own.fullmatch(str(place / name)) and stat.S_ISREG(about.st_mode):
                os.unlink(name, dir_fd=handle)
                freed += about.st_size
                emptied.add(here)
        for name in directories:
            path = os.path.join(here, name)
            if path in emptied or own.fullmatch(f"{place / name}/"):
                with contextlib.suppress(OSError):  # it holds something else
                    os.rmdir(name, dir_fd=handle)
                    emptied.add(here)
    if top != folder and str(top) in emptied:
        with contextlib.suppress(OSError):
            top.rmdir()
    return freed
