"""CIFAR-10 and other 32x32 classification sets from tensorflow-datasets, decoded once and cached as arrays.

TensorFlow is needed only for decoding: the functions that decode import it, with its log silenced and accelerators
hidden from it. If the arrays of the same source files are already in the cache, it is not imported at all.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import requests

from cifar_jax.data.dataset import Dataset, Splits, check
from cifar_jax.errors import UserError
from cifar_jax.files import cache_root, load_arrays, save_arrays, sha256_of_file

# TFDS's own ten retries with growing waits are three and a half minutes of silence without a network.
DOWNLOAD_RETRIES = 3
IMAGE_SHAPE = (32, 32, 3)

logger = logging.getLogger(__name__)


def data_root(data_dir: str | None) -> Path:
    """Returns the TFDS data directory: the argument, $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return Path(os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def find_prepared(name: str, data_dir: str | None) -> Path | None:
    """Returns the directory of the newest prepared version of a data set, or None."""
    versions = _versions(data_root(data_dir) / name, "*")
    return max(versions, key=lambda path: [int(number) for number in path.name.split(".")], default=None)


def prepared_in(directory: Path) -> Path | None:
    """Returns the prepared set that a directory is, or the newest version in it; None if there is none."""
    if (directory / "dataset_info.json").is_file():
        return directory
    versions = _versions(directory, "*")
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
    """Reads a TFDS data set with `train` and `test` splits and the features `image` and `label`.

    If the set is not prepared in the data directory, TFDS downloads and prepares it there. The decoded arrays are
    cached under a fingerprint of the source files, and memory-mapped from then on.

    Raises:
      UserError: if the set is neither prepared nor downloadable, is corrupt, or does not consist of 32x32x3 images.
    """
    directory = Path(os.path.expanduser(name))
    source = prepared_in(directory) if directory.is_dir() else find_prepared(name, data_dir)
    source = source or _download(name, data_root(data_dir))
    files = sorted(path for path in source.iterdir() if path.is_file())
    fingerprint = hashlib.sha256(
        "".join(f"{path.name} {sha256_of_file(path)}\n" for path in files).encode()
    ).hexdigest()
    kept = cache_root(cache_dir) / "data" / f"{name}-{source.name}-{fingerprint[:16]}"
    try:
        return _splits(*load_arrays(kept))
    except FileNotFoundError:
        pass
    except ValueError as error:
        logger.info(f"{error}; decoding {source} again.")
        shutil.rmtree(kept, ignore_errors=True)
    splits = _decode(name, source)
    about = {
        "name": splits.name,
        "version": splits.version,
        "class_names": list(splits.class_names),
        "source_sha256": fingerprint,
    }
    try:
        save_arrays(kept, _arrays(splits), about)
    except OSError as error:
        logger.info(
            f"The decoded images cannot be cached in {kept.parent} ({error}); they will be decoded again next time."
        )
    return splits


def _arrays(splits: Splits) -> dict[str, np.ndarray]:
    parts = {"train": splits.train, "test": splits.test}
    return {f"{name}_{field}": array for name, part in parts.items() for field, array in part._asdict().items()}


def _splits(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> Splits:
    """Reverses `_arrays`."""
    train, test = (Dataset(arrays[f"{name}_images"], arrays[f"{name}_labels"]) for name in ("train", "test"))
    return Splits(train, test, tuple(about["class_names"]), about["name"], about["version"])


def _decode(name: str, source: Path) -> Splits:
    with _tensorflow(source) as tfds:
        try:
            builder = tfds.builder_from_directory(source)
            info = builder.info
            missing = {"train", "test"} - set(info.splits)
            if missing or not {"image", "label"} <= set(info.features):
                raise UserError(
                    f"The data set in {source} cannot be used: it must have the splits train and test and the features "
                    f"image and label, but has {sorted(info.splits)} and {sorted(info.features)}; give another "
                    "--dataset."
                )
            if info.features["image"].shape != IMAGE_SHAPE or not hasattr(info.features["label"], "names"):
                raise UserError(
                    f"The data set in {source} cannot be used: it has {info.features['image'].shape} images and "
                    f"{type(info.features['label']).__name__} labels, but {IMAGE_SHAPE} and ClassLabel are needed; "
                    "give another --dataset."
                )
            class_names = tuple(info.features["label"].names)
            train, test = (_read_split(tfds, builder, split) for split in ("train", "test"))
        except UserError:
            raise
        except Exception as error:  # TFDS, TensorFlow and protobuf raise all kinds of errors on corrupt files
            raise UserError(
                f"The data set in {source} is corrupt ({_cause(error)}); delete it and prepare it again."
            ) from error
    for split, dataset in (("train", train), ("test", test)):
        expected = info.splits[split].num_examples
        if len(dataset.labels) != expected:
            raise UserError(
                f"The {split} split in {source} has {len(dataset.labels)} examples, but its dataset_info.json lists "
                f"{expected}; delete it and prepare it again."
            )
        check(dataset, len(class_names), f"The {split} split in {source}")
    return Splits(train, test, class_names, name, str(info.version))


def _read_split(tfds: Any, builder: Any, split: str) -> Dataset:
    # Files are read one after the other, so that the order is always the order on disk.
    config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    read = builder.as_dataset(split=split, shuffle_files=False, read_config=config)
    pairs = read.map(lambda example: (example["image"], example["label"])).batch(1024).prefetch(2)
    batches = list(pairs.as_numpy_iterator())
    if not batches:
        raise ValueError(f"the {split} split is empty")
    images, labels = zip(*batches, strict=True)
    return Dataset(np.concatenate(images), np.concatenate(labels).astype(np.int32))


def _download(name: str, root: Path) -> Path:
    logger.info(f"{name} is not prepared in {root}; downloading and preparing it there with tensorflow-datasets.")
    with (
        _tensorflow(root) as tfds,
        _few_retries(),
        _removing_empty_directories(root, name),
        contextlib.redirect_stdout(sys.stderr),
    ):
        try:
            builder = tfds.builder(name, data_dir=root)
            builder.download_and_prepare()
        except tfds.core.registered.DatasetNotFoundError as error:
            raise UserError(
                f"There is no data set {name!r} in {root} or TFDS; give another --dataset, such as cifar10 or shapes, "
                "or the --data-dir in which it was prepared."
            ) from error
        except Exception as error:  # TFDS passes on whatever its network and file layers raise
            raise UserError(
                f"The data set {name!r} is not in {root} and could not be downloaded ({_cause(error)}). Prepare it on "
                f"a machine with a network by `tfds build {name} --data_dir {root}`, copy it here and give its "
                "directory with --data-dir or TFDS_DATA_DIR, or use synthetic images: --dataset shapes."
            ) from error
    return Path(builder.data_dir)


@contextlib.contextmanager
def _tensorflow(place: Path) -> Iterator[Any]:
    """Imports TensorFlow and yields TFDS, with their logs silenced and the accelerators, which JAX needs, hidden."""
    # Read when TensorFlow is first imported. Only log lines are lost, as decoding does not use oneDNN's kernels.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow as tf
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"Reading {place} needs TensorFlow, which cannot be imported ({_cause(error)}); install it with "
            "`pip install -r requirements.txt`, or use synthetic images, which do not need it: --dataset shapes."
        ) from error
    for kind in ("GPU", "TPU"):
        with contextlib.suppress(RuntimeError):  # raised if the caller has already initialised TensorFlow on them
            tf.config.set_visible_devices([], kind)
    noisy = [logging.getLogger(name) for name in ("absl", "urllib3")]
    levels = [other.level for other in noisy]
    for other in noisy:
        other.setLevel(logging.ERROR)
    handlers = list(logging.root.handlers)
    tfds.disable_progress_bar()
    try:
        yield tfds
    finally:
        for other, level in zip(noisy, levels, strict=True):
            other.setLevel(level)
        # absl, which TFDS logs with, adds a handler to a root logger without one, which would print every log record.
        for handler in set(logging.root.handlers).difference(handlers):
            logging.root.removeHandler(handler)


@contextlib.contextmanager
def _removing_empty_directories(root: Path, name: str) -> Iterator[None]:
    """Removes the empty directories that the block created if it fails."""
    own = (root / "downloads", root / name, root, *root.parents)
    made = [path for path in own if not path.exists()]
    try:
        yield
    except BaseException:
        for top in made:
            for directory in (*sorted(top.rglob("*"), reverse=True), top):
                with contextlib.suppress(OSError):  # a file, or a directory that contains one
                    directory.rmdir()
        raise


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    from tensorflow_datasets.core.download import downloader

    usual = downloader.MAX_RETRIES
    downloader.MAX_RETRIES = DOWNLOAD_RETRIES
    try:
        yield
    finally:
        downloader.MAX_RETRIES = usual


def _cause(error: Exception) -> str:
    """Returns the cause of an error in one line."""
    if isinstance(error, requests.ConnectionError) and error.request is not None:
        return f"no connection to {error.request.url!r}"
    # TensorFlow puts the graph location before the cause and the operation after it.
    text = re.sub(r"^\{\{.*?\}\} | \[Op:\w+\].*", "", str(error).strip())
    lines = text.splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".:")[:200]
