"""From the name of a data set to its arrays, cut down to what was asked for."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import PRNGKeyArray

from cifar_jax.data.dataset import Dataset, Splits, balanced_subset
from cifar_jax.data.sources import shapes
from cifar_jax.data.sources.tfds import data_root, find_prepared, known_to_tfds, load_tfds, prepared_names
from cifar_jax.errors import UserError, did_you_mean
from cifar_jax.rng import stream_key

# Drawn images cost nothing to keep apart: as many as CIFAR-10 has, unless fewer are asked for.
SHAPES_TRAIN, SHAPES_TEST = 50_000, 10_000
SHAPES_VERSION = "1.0.0"
MOST_SHAPES = 1_000_000  # 3 GB: of drawn images there is no end

# The sets of 32x32 images that TFDS has, which need not be looked up.
OF_TFDS = ("cifar10", "cifar100", "svhn_cropped", "cifar10_corrupted", "cmaterdb")
TAKES = "cifar10, shapes, or another TFDS data set of 32x32 images"


def check_name(name: str, data_dir: str | None = None) -> None:
    """Refuses what is not the name of a data set, at once: nothing is downloaded and TensorFlow is not imported.

    Args:
      name: `shapes`, a set that is prepared below the data directory, or one that TFDS knows, as `svhn_cropped`,
        `cifar10_corrupted/fog_1` or `cifar10:3.0.2`.
      data_dir: where TFDS keeps its sets.

    Raises:
      UserError: when it is a path, or there is no such set, with the name that was probably meant.
    """
    if name in ("shapes", *OF_TFDS) or name in (prepared := prepared_names(data_dir)):
        return
    has_separator = "/" in name or os.sep in name
    if has_separator and os.path.exists(os.path.expanduser(name)):
        raise UserError(_not_a_path(name))
    known = known_to_tfds()
    # Without TFDS nobody knows, and names with a colon may be of its community: they are for TFDS to judge.
    if not known or ":" in name or name.partition("/")[0] in known:
        return
    if has_separator or os.path.lexists(name):
        raise UserError(_not_a_path(name))
    # A name of the sets that fit goes first: `cifar-10` is nearer to cifar10 than to any other of TFDS's hundreds.
    meant = did_you_mean(name, ["shapes", *OF_TFDS, *prepared]) or did_you_mean(name, known)
    raise UserError(
        f"There is no data set {name!r} in {data_root(data_dir)} or TFDS.{meant} --dataset takes {TAKES}; --data-dir "
        "says where TFDS prepared a set of your own."
    )


def _not_a_path(name: str) -> str:
    path = Path(os.path.expanduser(name))
    if found := find_prepared(path.name, str(path.parent)):
        return (
            f"--dataset takes a name, and {name} is a path; give --dataset {path.name} --data-dir {found.parents[1]}."
        )
    return (
        f"--dataset takes a name, and {name} is a path. Give {TAKES}; --data-dir says where TFDS prepared a set of "
        "your own."
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
      data_dir: where TFDS keeps its sets; else $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      cache_dir: where decoded arrays are kept; else $CIFAR_JAX_CACHE, else ~/.cache/cifar_jax.
      train_examples: size of a balanced random subset of the training images; None for all.
      test_examples: the same for the test images.
      seed: draws the subsets, and the drawn images.

    Raises:
      UserError: when there is no such set, it is damaged, or it has fewer examples than asked for.
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
            f"{option} {num_examples} is more than the {len(dataset.labels)} {split} images there are; choose fewer."
        )
    return dataset.take(balanced_subset(np.asarray(dataset.labels), num_examples, key))


def _draw_splits(num_train: int, num_test: int, seed: int) -> Splits:
    if max(num_train, num_test) > MOST_SHAPES:
        option = "--train-examples" if num_train > MOST_SHAPES else "--test-examples"
        raise UserError(
            f"{option} {max(num_train, num_test)} is more than the {MOST_SHAPES} images that are drawn; choose fewer."
        )
    # Even seeds for training, odd ones for test: no image is in both splits, whatever their sizes.
    train = Dataset(*shapes.draw_shapes(num_train, seed=2 * seed))
    test = Dataset(*shapes.draw_shapes(num_test, seed=2 * seed + 1))
    return Splits(train, test, shapes.CLASS_NAMES, "shapes", SHAPES_VERSION)
