"""From the name of a data set to its arrays, cut down to what was asked for."""

from collections.abc import Callable

import numpy as np
from jaxtyping import PRNGKeyArray

from cifar_jax.data import shapes
from cifar_jax.data.dataset import Dataset, Splits, balanced_subset
from cifar_jax.data.tfds import load_tfds
from cifar_jax.errors import UserError
from cifar_jax.keys import stream_key

# Drawn images cost nothing to keep apart: as many as CIFAR-10 has, unless fewer are asked for.
SHAPES_TRAIN, SHAPES_TEST = 50_000, 10_000
SHAPES_VERSION = "1.0.0"
MOST_SHAPES = 1_000_000  # 3 GB: of drawn images there is no end


def load_splits(
    name: str,
    *,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    train_examples: int | None = None,
    test_examples: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Splits:
    """Loads the training and test images of a data set.

    Args:
      name: `cifar10`, `shapes`, or another TFDS set of 32x32x3 images with labels.
      data_dir: where TFDS keeps its sets; else $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      cache_dir: where decoded arrays are kept; else $CIFAR_JAX_CACHE, else ~/.cache/cifar_jax.
      train_examples: size of a balanced random subset of the training images; None for all.
      test_examples: the same for the test images.
      seed: draws the subsets, and the drawn images.
      say: is called with each sentence that the user should see.

    Raises:
      UserError: when the set cannot be had, is damaged, or has fewer examples than asked for.
    """
    if name == "shapes":
        return _draw_splits(train_examples or SHAPES_TRAIN, test_examples or SHAPES_TEST, seed)
    splits = load_tfds(name, data_dir, cache_dir, say)
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
