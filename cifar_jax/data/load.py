"""Loading of data sets by name, cut down to the requested number of examples."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import PRNGKeyArray

from cifar_jax.data.dataset import Dataset, Splits, balanced_subset
from cifar_jax.data.sources import shapes
from cifar_jax.data.sources.tfds import data_root, find_prepared, known_to_tfds, load_tfds, prepared_names
from cifar_jax.errors import UserError, did_you_mean
from cifar_jax.rng import stream_key

# Number of synthetic images by default, the same as in CIFAR-10.
SHAPES_TRAIN, SHAPES_TEST = 50_000, 10_000
SHAPES_VERSION = "1.0.0"
MAX_SHAPES = 1_000_000  # 3 GB; there is no natural limit to synthetic images

# TFDS sets of 32x32 images, which need no lookup.
OF_TFDS = ("cifar10", "cifar100", "svhn_cropped", "cifar10_corrupted", "cmaterdb")
TAKES = "cifar10, shapes, or another TFDS data set of 32x32 images"


def check_name(name: str, data_dir: str | None = None) -> None:
    """Checks that a data set of this name exists, without any download and without importing TensorFlow.

    Args:
      name: `shapes`, a set prepared in the data directory, or one that TFDS knows, such as `svhn_cropped`,
        `cifar10_corrupted/fog_1` or `cifar10:3.0.2`.
      data_dir: the TFDS data directory.

    Raises:
      UserError: if it is a path or there is no such set; the message suggests a similar name.
    """
    if name in ("shapes", *OF_TFDS) or name in (prepared := prepared_names(data_dir)):
        return
    has_separator = "/" in name or os.sep in name
    if has_separator and os.path.exists(os.path.expanduser(name)):
        raise UserError(_not_a_path(name))
    known = known_to_tfds()
    # Without TFDS the names are unknown, and names with a colon may be community data sets; TFDS itself decides later.
    if not known or ":" in name or name.partition("/")[0] in known:
        return
    if has_separator or os.path.lexists(name):
        raise UserError(_not_a_path(name))
    # Sets that fit are suggested before the hundreds of others in TFDS: `cifar-10` most likely means cifar10.
    meant = did_you_mean(name, ["shapes", *OF_TFDS, *prepared]) or did_you_mean(name, known)
    raise UserError(
        f"There is no data set {name!r} in {data_root(data_dir)} or TFDS.{meant} --dataset takes {TAKES}; for a TFDS "
        "data set of your own, give its directory with --data-dir."
    )


def _not_a_path(name: str) -> str:
    path = Path(os.path.expanduser(name))
    if found := find_prepared(path.name, str(path.parent)):
        return (
            f"--dataset takes a name, but {name} is a path; give --dataset {path.name} --data-dir {found.parents[1]}."
        )
    return (
        f"--dataset takes a name, but {name} is a path. Give {TAKES}; for a TFDS data set of your own, give its "
        "directory with --data-dir."
    )


def load_splits(
    name: str,
    *,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    train_examples: int | None = None,
    test_examples: int | None = None,
    seed: int = 0,
) -> Splits:
    """Loads the training and test images of a data set.

    Args:
      name: `cifar10`, `shapes`, or another TFDS set of 32x32x3 images with labels.
      data_dir: the TFDS data directory; if None, $TFDS_DATA_DIR or ~/tensorflow_datasets.
      cache_dir: the cache directory for decoded arrays; if None, $CIFAR_JAX_CACHE or ~/.cache/cifar_jax.
      train_examples: size of a balanced random subset of the training images; None for all.
      test_examples: the same for the test images.
      seed: seed of the subsets and of synthetic images.

    Raises:
      UserError: if there is no such set, it is corrupt, or it has fewer examples than requested.
    """
    if name == "shapes":
        return _draw_splits(train_examples or SHAPES_TRAIN, test_examples or SHAPES_TEST, seed)
    check_name(name, data_dir)
    splits = load_tfds(name, data_dir, cache_dir)
    return splits._replace(
        train=_subset(splits.train, train_examples, stream_key(seed, "train_subset"), "training"),
        test=_subset(splits.test, test_examples, stream_key(seed, "test_subset"), "test"),
    )


def _subset(dataset: Dataset, num_examples: int | None, key: PRNGKeyArray, split: str) -> Dataset:
    if num_examples is None:
        return dataset
    if num_examples > len(dataset.labels):
        option = "--train-examples" if split == "training" else "--test-examples"
        raise UserError(
            f"{option} must be at most {len(dataset.labels)}, the number of {split} images, got {num_examples}."
        )
    return dataset.take(balanced_subset(np.asarray(dataset.labels), num_examples, key))


def _draw_splits(num_train: int, num_test: int, seed: int) -> Splits:
    if max(num_train, num_test) > MAX_SHAPES:
        option = "--train-examples" if num_train > MAX_SHAPES else "--test-examples"
        raise UserError(f"{option} must be at most {MAX_SHAPES} for synthetic images, got {max(num_train, num_test)}.")
    # Even seeds for training and odd ones for test, so that no image is in both splits, whatever their sizes.
    train = Dataset(*shapes.draw_shapes(num_train, seed=2 * seed))
    test = Dataset(*shapes.draw_shapes(num_test, seed=2 * seed + 1))
    return Splits(train, test, shapes.CLASS_NAMES, "shapes", SHAPES_VERSION)
