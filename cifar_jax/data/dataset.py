"""A data set as two arrays, and what is drawn from it: balanced subsets, held-out images, the order of an epoch."""

import hashlib
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int32, PRNGKeyArray, UInt8

from cifar_jax.errors import UserError
from cifar_jax.files import update_digest

IMAGE_SHAPE = (32, 32, 3)


class Digests(NamedTuple):
    """SHA-256 digests of a data set: the same examples in the same order, the same digests."""

    images: str  # of the pixels
    examples: str  # of the pixels and labels


class Dataset(NamedTuple):
    """Images and their labels."""

    images: UInt8[np.ndarray, "n 32 32 3"]
    labels: Int32[np.ndarray, "n"]

    def take(self, indices: Int32[np.ndarray, "m"]) -> "Dataset":
        """The examples at `indices`, in that order."""
        return Dataset(self.images[indices], self.labels[indices])

    def digests(self) -> Digests:
        """Both digests, in one pass over the pixels."""
        digest = hashlib.sha256()
        update_digest(digest, self.images)
        images = digest.hexdigest()
        update_digest(digest, self.labels)
        return Digests(images, digest.hexdigest())

    def fingerprint(self) -> str:
        """SHA-256 over the pixels and labels: the same examples in the same order, the same fingerprint."""
        return self.digests().examples


class Splits(NamedTuple):
    """A data set's training and test images, and what it is called."""

    train: Dataset
    test: Dataset
    class_names: tuple[str, ...]
    name: str
    version: str


def check(dataset: Dataset, num_classes: int, what: str) -> Dataset:
    """Returns the data set if it is what it claims to be.

    Raises:
      UserError: for another dtype or shape, no images, unequal counts, or a label outside of 0..num_classes - 1.
    """
    images, labels = dataset
    if images.dtype != np.uint8 or images.shape[1:] != IMAGE_SHAPE:
        raise UserError(f"{what} holds {images.dtype} images of {images.shape[1:]}; only uint8 32x32x3 can be used.")
    if labels.dtype != np.int32 or labels.shape != images.shape[:1] or not len(labels):
        raise UserError(f"{what} holds {len(images)} images and {labels.shape} {labels.dtype} labels: not a data set.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"{what} has labels in {labels.min()}..{labels.max()}, outside of 0..{num_classes - 1}: prepare it anew."
        )
    return dataset


def balanced_subset(
    labels: Int32[np.ndarray, "n"], num_examples: int, key: PRNGKeyArray
) -> Int32[np.ndarray, "num_examples"]:
    """Indices of a random subset with as many examples of each class as of any other, to one.

    A class that runs out is filled up from the others. The indices ascend, so the subset keeps the data set's order.

    Raises:
      ValueError: when more examples are asked for than there are, or none.
    """
    if not 1 <= num_examples <= len(labels):
        raise ValueError(f"{num_examples} of {len(labels)} examples cannot be drawn")
    shuffled = np.asarray(jax.random.permutation(key, len(labels)))
    # Rank of each example within its class, in shuffled order: taking by rank takes the classes in turn.
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        rank[members] = np.arange(len(members))
    by_rank = shuffled[np.argsort(rank[shuffled], kind="stable")]
    return np.sort(by_rank[:num_examples]).astype(np.int32)


def hold_out(
    labels: Int32[np.ndarray, "n"], fraction: float, key: PRNGKeyArray
) -> tuple[Int32[np.ndarray, "kept"], Int32[np.ndarray, "held"]]:
    """Splits indices into those to train on and `round(fraction * n)` held out, balanced over the classes.

    Raises:
      UserError: when that leaves nothing to train on, or nothing held out though `fraction` is above 0.
    """
    num_held = round(fraction * len(labels))
    if not 0 < num_held < len(labels):
        raise UserError(
            f"--val-fraction {fraction} of {len(labels)} training images holds out {num_held}; choose a share that "
            "leaves images on both sides."
        )
    held = balanced_subset(labels, num_held, key)
    kept = np.setdiff1d(np.arange(len(labels), dtype=np.int32), held)
    return kept, held


def epoch_batches(
    key: PRNGKeyArray, epoch: int, num_examples: int, batch_size: int, shuffle: bool = True
) -> tuple[Int32[np.ndarray, "steps batch"], Int32[np.ndarray, "steps"]]:
    """The order in which an epoch visits the examples, each exactly once.

    Args:
      key: the run's key for order; the epoch is folded in, so any epoch's order can be had without the ones before.
      epoch: counted from zero.
      num_examples: n.
      batch_size: examples a step.
      shuffle: a new permutation every epoch, or 0, 1, 2, ...

    Returns:
      Indices, a row a step, and how many of each row are real: all of them but in the last row, which holds what is
      left (16 at n = 50,000 and 64 a step) and is filled up with index 0.
    """
    steps = -(-num_examples // batch_size)
    order = np.arange(num_examples, dtype=np.int32)
    if shuffle:
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), num_examples), np.int32)
    indices = np.zeros(steps * batch_size, np.int32)
    indices[:num_examples] = order
    counts = np.full(steps, batch_size, np.int32)
    counts[-1] = num_examples - (steps - 1) * batch_size
    return indices.reshape(steps, batch_size), counts
