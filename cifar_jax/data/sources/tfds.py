"""CIFAR-10 and other classification sets from tensorflow-datasets, read once and kept in the cache.

TensorFlow is needed only for reading TFRecord files. If what was read of the same source files is already in the cache,
it is not imported at all.
"""

import fnmatch
import glob
import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.data.dataset import Dataset, Splits
from cifar_jax.data.sources.tfds_contents import Contents
from cifar_jax.data.sources.tfds_library import download
from cifar_jax.data.sources.tfds_records import pictures_of, read_set
from cifar_jax.errors import UserError
from cifar_jax.files import cache_root, load_arrays, locked_directory, remove_leftovers, save_arrays, sha256_of_file

LAYOUT = 2  # of what is kept in the cache
UNKNOWN = -1  # label of an image without one

logger = logging.getLogger(__name__)


def data_root(data_dir: str | None) -> Path:
    """Returns the TFDS data directory: the argument, $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return Path(os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def find_prepared(name: str, data_dir: str | None) -> Path | None:
    """Returns the directory of the newest prepared version of a data set, or None.

    Args:
      name: `name`, `name/config`, or either followed by `:version`, such as `3.0.2` or `3.*.*`.
      data_dir: the TFDS data directory.
    """
    base, _, version = name.partition(":")
    return _newest(data_root(data_dir) / base, version or "*")


def prepared_in(directory: Path) -> Path | None:
    """Returns the prepared set that a directory is, or the newest version in it; None if there is none."""
    return directory if (directory / "dataset_info.json").is_file() else _newest(directory)


def _newest(directory: Path, version: str = "*") -> Path | None:
    versions = [path for path in _versions(directory, "*") if fnmatch.fnmatchcase(path.name, version)]
    return max(versions, key=lambda path: [int(number) for number in path.name.split(".")], default=None)


def prepared_names(data_dir: str | None) -> set[str]:
    """Returns the names of all data sets prepared in the data directory, as `--dataset` takes them."""
    root = data_root(data_dir)
    return {str(path.parent.relative_to(root)) for depth in ("*/*", "*/*/*") for path in _versions(root, depth)}


def _versions(root: Path, depth: str) -> list[Path]:
    found = [info.parent for info in root.glob(f"{depth}/dataset_info.json")]
    # Directories of interrupted preparations are named otherwise: 1.0.0.incompleteXXXXXX, incomplete.XXXXXX_1.0.0.
    return [path for path in found if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]


def known_to_tfds() -> list[str]:
    """Returns the names of all data sets that TFDS can prepare, without TensorFlow or a network; none without TFDS."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        return []
    return list(tfds.list_builders(with_community_datasets=False))


def load_tfds(
    name: str, data_dir: str | None = None, cache_dir: str | None = None, label_key: str | None = None
) -> Splits:
    """Reads a TFDS data set of images with one class each.

    If the set is not prepared in the data directory, TFDS downloads and prepares it there. Images of one small size
    are decoded into arrays. Other pictures stay encoded: those in TFRecord files are packed for random access, those
    in ArrayRecord files are read there. The result is cached under a fingerprint of the source files, and
    memory-mapped from then on.

    Args:
      name: see `find_prepared`, or the directory of a prepared set or of its versions.
      data_dir: the TFDS data directory.
      cache_dir: the cache directory.
      label_key: feature that is the label; `label`, or the only one that is a class, if None.

    Returns:
      The splits `train`, `test` and, of a set that has both, `val`; `test` is empty if there are no labelled test
      images, in which case `val` may be there. Images without a label are left out.

    Raises:
      UserError: if the set is neither prepared nor downloadable, is corrupt, or does not consist of images and classes.
    """
    directory = Path(os.path.expanduser(name))
    source = prepared_in(directory) if directory.is_dir() else find_prepared(name, data_dir)
    source = source or download(name, data_root(data_dir))
    files = sorted(path for path in source.iterdir() if path.is_file())
    lines = [f"layout {LAYOUT}", *(f"{path.name} {sha256_of_file(path)}" for path in files)]
    fingerprint = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    kept = cache_root(cache_dir) / "data" / f"{source.parent.name}-{source.name}-{fingerprint[:16]}"
    found = _cached(kept, source)
    if found is None:
        waiting = partial(logger.info, f"Waiting for another process that reads {source}.")
        with locked_directory(source, waiting) as locked:
            if locked:
                remove_leftovers(kept.parent, f".{glob.escape(kept.name)}-*")
            found = _cached(kept, source) or _read(kept, source, label_key)
    return _splits(source, *found, label_key)


def _cached(kept: Path, source: Path) -> tuple[Contents, dict[str, np.ndarray]] | None:
    try:
        arrays, about = load_arrays(kept)
        return Contents(**about), arrays
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.info(f"{error}; decoding {source} again.")
        shutil.rmtree(kept, ignore_errors=True)
        return None


def _read(kept: Path, source: Path, label_key: str | None) -> tuple[Contents, dict[str, Any]]:
    """Reads a prepared set, and keeps what was read."""
    packed = kept.parent / f".{kept.name}-{secrets.token_hex(4)}" / "content.npy"
    try:
        contents, arrays = read_set(source, lambda contents: _choose_label(contents, label_key, source), packed)
        save_arrays(kept, arrays, contents._asdict())
    except OSError as error:
        if contents.kind == "packed":
            raise UserError(
                f"The pictures in {source} cannot be packed into {kept.parent} ({error}); make room, or name another "
                "--cache-dir."
            ) from error
        logger.info(
            f"The decoded images cannot be cached in {kept.parent} ({error}); they will be decoded again next time."
        )
    else:
        if contents.kind == "packed":
            arrays, _ = load_arrays(kept)
    finally:
        shutil.rmtree(packed.parent, ignore_errors=True)
    return contents, arrays


def _choose_label(contents: Contents, label_key: str | None, source: Path) -> str:
    keys = list(contents.labels)
    if label_key is not None and label_key not in keys:
        raise UserError(
            f"--label-key {label_key}: the data set in {source} has no such class; it has {' and '.join(keys)}."
        )
    key = label_key or ("label" if "label" in keys else keys[0] if len(keys) == 1 else None)
    if key is None:
        raise UserError(
            f"The data set in {source} has several labels, {' and '.join(keys)}; choose one by --label-key."
        )
    if len(contents.labels[key]) == 1:
        raise UserError(
            f"The data set in {source} has a single class, {contents.labels[key][0]!r}: there is nothing to tell apart."
        )
    return key


def _splits(source: Path, contents: Contents, arrays: Mapping[str, Any], label_key: str | None) -> Splits:
    key = _choose_label(contents, label_key, source)
    column = list(contents.labels).index(key)
    if contents.kind == "pixels":
        images: Mapping[str, Any] = {split: arrays[f"{split}_images"] for split in contents.splits}
    else:
        images = pictures_of(source, contents, arrays)
    notes = [] if key == "label" else [f"classes are those of {key}"]
    parts = {}
    for split, name in contents.splits.items():
        part = Dataset(images[split], arrays[f"{split}_labels"][:, column])
        known = part.labels != UNKNOWN
        if known.all():
            parts[split] = part
        elif known.any():
            parts[split] = part.take(np.flatnonzero(known))
            notes.append(f"{np.sum(~known):,} of {len(known):,} {name} images left out, as they have no label")
        else:
            notes.append(f"the {name} images have no labels and are not used")
    if "train" not in parts:
        raise UserError(f"The training images of the data set in {source} have no labels; give another --dataset.")
    if contents.ignored:
        logger.info(f"{contents.name} has further splits, which are not used: {', '.join(contents.ignored)}.")
    train = parts["train"]
    return Splits(
        train,
        parts.get("test", train.take(slice(0, 0))),
        tuple(contents.labels[key]),
        contents.name,
        contents.version,
        parts.get("val"),
        tuple(notes),
    )
