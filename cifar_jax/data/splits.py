"""Images of a job, divided into training, validation and test images."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import Dataset, Digests, Splits, hold_out
from cifar_jax.data.load import load_splits
from cifar_jax.errors import UserError
from cifar_jax.rng import stream_key


class RunData(NamedTuple):
    """Images of a job by their use.

    Attributes:
      train: training images.
      val: validation images, which are `test` itself unless some training images were held out.
      test: test images.
      splits: the data set they come from.
      digests: digests by `train`, `test`, and `val` where images are held out.
    """

    train: Dataset
    val: Dataset
    test: Dataset
    splits: Splits
    digests: Mapping[str, Digests]

    @property
    def parts(self) -> dict[str, Dataset]:
        """The images by split: `train`, `test`, and `val` where images are held out."""
        return {"train": self.train, "test": self.test} | ({"val": self.val} if self.held_out else {})

    @property
    def held_out(self) -> bool:
        """Whether the validation images were held out of the training set rather than being the test images."""
        return self.val is not self.test

    @property
    def val_split(self) -> str:
        """The split of the validation images as written in files: `held_out` or `test`."""
        return "held_out" if self.held_out else "test"

    @property
    def val_name(self) -> str:
        """The split of the validation images for display: `held-out` or `test`."""
        return self.val_split.replace("_", "-")


def images_in_both(train: Dataset, other: Dataset) -> int:
    """Counts the images of `other` that are bit-identical to a training image."""
    hashes, others = (
        [hashlib.blake2b(image, digest_size=16).digest() for image in np.ascontiguousarray(part.images)]
        for part in (train, other)
    )
    known = set(hashes)
    return sum(one in known for one in others)


def load_data(config: TrainConfig) -> RunData:
    """Loads the data set of a configuration and divides it into training, validation and test images.

    Raises:
      UserError: if it cannot be loaded or has fewer training images than a batch.
    """
    splits = load_splits(
        config.data.dataset,
        data_dir=config.run.data_dir,
        cache_dir=config.run.cache_dir,
        train_examples=config.data.train_examples,
        test_examples=config.data.test_examples,
        seed=config.optim.seed,
    )
    train, val = splits.train, splits.test
    if config.data.val_fraction:
        kept, held = hold_out(
            np.asarray(train.labels), config.data.val_fraction, stream_key(config.optim.seed, "hold_out")
        )
        train, val = splits.train.take(kept), splits.train.take(held)
    if config.optim.batch_size > len(train.labels):
        raise UserError(
            f"--batch-size must be at most {len(train.labels)}, the number of training images, got "
            f"{config.optim.batch_size}."
        )
    return make_data(train, val, splits)


def make_data(train: Dataset, val: Dataset, splits: Splits) -> RunData:
    """Builds a `RunData` and computes its digests, in one pass over the pixels."""
    used = {"train": train, "test": splits.test} | ({} if val is splits.test else {"val": val})
    return RunData(train, val, splits.test, splits, {name: part.digests() for name, part in used.items()})
