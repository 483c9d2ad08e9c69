"""Images of a job, divided into training, validation and test images."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import Dataset, Digests, Splits, hold_out
from cifar_jax.data.load import load_splits
from cifar_jax.data.pictures import sizes_of
from cifar_jax.data.resize import Resize, choose_resize
from cifar_jax.errors import UserError
from cifar_jax.models.preprocess import EvalTransform
from cifar_jax.rng import stream_key


class RunData(NamedTuple):
    """Images of a job by their use.

    Attributes:
      train: training images.
      val: validation images, which are `test` itself unless some training images were held out.
      test: test images.
      splits: the data set they come from.
      digests: digests by `train`, `test`, and `val` where images are held out.
      resize: how pictures became images of one size.
    """

    train: Dataset
    val: Dataset
    test: Dataset
    splits: Splits
    digests: Mapping[str, Digests]
    resize: Resize

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


def load_data(
    config: TrainConfig, image_size: int, transform: EvalTransform | None = None, resize: Resize | None = None
) -> RunData:
    """Loads the data set of a configuration, and divides it into training, validation and test images of one size.

    Args:
      config: the configuration.
      image_size: side of the network's input in pixels.
      transform: the evaluation transform of the weights.
      resize: how pictures become images of one size, if that is known; else it is chosen.

    Raises:
      UserError: if it cannot be loaded or resized as asked.
    """
    splits = load_splits(
        config.data.dataset,
        data_dir=config.run.data_dir,
        cache_dir=config.run.cache_dir,
        train_examples=config.data.train_examples,
        test_examples=config.data.test_examples,
        seed=config.optim.seed,
        test_fraction=config.data.test_fraction,
        label_key=config.data.label_key,
        skip_unreadable=config.data.skip_unreadable,
    )
    if resize is None:
        sizes = np.concatenate([sizes_of(part.images) for part in splits.parts.values()])
        resize = choose_resize(
            config.data.resize, config.data.interpolation, sizes, image_size, transform or EvalTransform()
        )
    return divided(config, splits, resize)


def divided(config: TrainConfig, splits: Splits, resize: Resize) -> RunData:
    """Divides a data set into training, validation and test images, resized when they are read.

    Raises:
      UserError: if `--val-fraction` is given for a set with validation images of its own.
    """
    found = splits.resized(resize)
    train, val = found.train, found.val
    if config.data.val_fraction:
        if val is not None:
            raise UserError(
                f"--val-fraction {config.data.val_fraction} holds out training images, but {splits.name} has "
                "validation images of its own; leave it out."
            )
        labels, key = np.asarray(train.labels), stream_key(config.optim.seed, "hold_out")
        kept, held = hold_out(labels, config.data.val_fraction, key)
        train, val = found.train.take(kept), found.train.take(held)
    return make_data(train, found.test if val is None else val, found, resize)


def make_data(train: Dataset, val: Dataset, splits: Splits, resize: Resize = Resize()) -> RunData:  # noqa: B008
    """Builds a `RunData` and computes its digests, of images in memory in one pass over the pixels."""
    used = {"train": train, "test": splits.test} | ({} if val is splits.test else {"val": val})
    digests = {name: part.digests() for name, part in used.items()}
    return RunData(train, val, splits.test, splits, digests, resize)
