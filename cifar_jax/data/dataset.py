"""Data sets as images and labels, and random draws: balanced subsets, held-out images, the order of an epoch."""

import hashlib
import json
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, Int32, PRNGKeyArray

from cifar_jax.data.pictures import Resized, content_digests, resized, subset
from cifar_jax.data.resize import Resize
from cifar_jax.errors import UserError
from cifar_jax.files import update_digest


class Digests(NamedTuple):
    """SHA-256 digests of a data set, equal for the same examples in the same order."""

    images: str  # digest of the pixels, or of the encoded pictures and how they are resized
    examples: str  # digest of the images and labels


class Dataset(NamedTuple):
    """Images and their labels."""

    images: Any  # uint8 [n, height, width, 3] in memory, or `Pictures` of any size, or `Resized`, read by rows
    labels: Int32[np.ndarray, "n"]

    def take(self, indices: Int[np.ndarray, "m"] | slice) -> "Dataset":
        """Returns the examples at `indices`, in that order."""
        return Dataset(subset(self.images, indices), self.labels[indices])

    def digests(self) -> Digests:
        """Computes both digests; of images in memory in one pass over the pixels."""
        digest = hashlib.sha256()
        if isinstance(self.images, np.ndarray):
            update_digest(digest, self.images)
        else:
            update_digest(digest, content_digests(self.images))
            if isinstance(self.images, Resized):
                digest.update(json.dumps(self.images.resize.to_json(), sort_keys=True).encode())
        images = digest.hexdigest()
        update_digest(digest, self.labels)
        return Digests(images, digest.hexdigest())


class Splits(NamedTuple):
    """Training and test images of a data set, with its name, version and classes.

    Attributes:
      train: training images.
      test: test images.
      class_names: class names by label.
      name: name of the data set, or of the folder or file.
      version: its version; empty for a folder or a file.
      val: validation images of its own, in addition to the test images.
      notes: sentences on what was found, for the header.
      skipped: files that could not be read and were left out.
    """

    train: Dataset
    test: Dataset
    class_names: tuple[str, ...]
    name: str
    version: str
    val: Dataset | None = None
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, Dataset]:
        """The splits that there are, by name."""
        return {"train": self.train, "test": self.test} | ({} if self.val is None else {"val": self.val})

    def resized(self, resize: Resize) -> "Splits":
        """Returns the splits with images that are resized when they are read."""
        train, test, val = (
            part and Dataset(resized(part.images, resize), part.labels) for part in (self.train, self.test, self.val)
        )
        assert train and test, "both are there"
        return self._replace(train=train, test=test, val=val)


def check(dataset: Dataset, num_classes: int, what: str) -> None:
    """Checks the dtypes, shapes and labels of a data set.

    Raises:
      UserError: for another dtype or shape, no images, unequal counts, or a label outside 0..num_classes - 1.
    """
    images, labels = dataset
    if isinstance(images, np.ndarray) and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3):
        raise UserError(f"{what} has {images.dtype} images {[*images.shape]}; only uint8 [n, h, w, 3] is usable.")
    if labels.dtype != np.int32 or labels.shape != (len(images),) or not len(labels):
        raise UserError(
            f"{what} has {len(images)} images but {labels.dtype} labels of shape {labels.shape}; prepare it again with "
            "one int32 label per image."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"{what} has labels in {labels.min()}..{labels.max()}, outside 0..{num_classes - 1}; prepare it again."
        )


def balanced_subset(
    labels: Int32[np.ndarray, "n"], num_examples: int, key: PRNGKeyArray
) -> Int32[np.ndarray, "num_examples"]:
    """Draws the indices of a random subset in which the class counts differ by at most one.

    If a class has too few examples, the others make up for it. The indices ascend, so the subset keeps the data set's
    order.

    Raises:
      ValueError: if `num_examples` is below 1 or above the number of examples.
    """
    if not 1 <= num_examples <= len(labels):
        raise ValueError(f"num_examples must be between 1 and {len(labels)}, got {num_examples}")
    shuffled = np.asarray(jax.random.permutation(key, len(labels)))
    # Rank of each example within its class, in shuffled order; taking examples by rank takes the classes in turn.
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        rank[members] = np.arange(len(members))
    by_rank = shuffled[np.argsort(rank[shuffled], kind="stable")]
    return np.sort(by_rank[:num_examples]).astype(np.int32)


def stratified_subset(
    labels: Int32[np.ndarray, "n"], num_examples: int, key: PRNGKeyArray
) -> Int32[np.ndarray, "num_examples"]:
    """Draws the indices of a random subset in which each class has its share of the whole, and at least one example.

    Of classes with a single example none is drawn, and at least one example of every class is left over as long as the
    number allows it. Where all classes are equally large, this is `balanced_subset`. The indices ascend.
    """
    shuffled = np.asarray(jax.random.permutation(key, len(labels)))
    share = np.empty(len(labels))  # of its class that comes before an example, in shuffled order
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        share[members] = np.arange(len(members)) / len(members)
        share[members[-1]] = 1.0
    by_share = shuffled[np.argsort(share[shuffled], kind="stable")]
    return np.sort(by_share[:num_examples]).astype(np.int32)


def hold_out(
    labels: Int32[np.ndarray, "n"], fraction: float, key: PRNGKeyArray, option: str = "--val-fraction"
) -> tuple[Int32[np.ndarray, "kept"], Int32[np.ndarray, "held"]]:
    """Splits indices into those to train on and `round(fraction * n)` held-out ones, with a share of each class.

    At least one example of each class that has two is held out, as far as their number allows it. `option` is what the
    fraction is called in messages.

    Raises:
      UserError: if either part would be empty.
    """
    num_held = round(fraction * len(labels))
    if not 0 < num_held < len(labels):
        raise UserError(
            f"{option} {fraction} of {len(labels)} training images holds out {num_held}; choose a fraction that "
            "leaves images on both sides."
        )
    held = stratified_subset(labels, num_held, key)
    kept = np.setdiff1d(np.arange(len(labels), dtype=np.int32), held)
    return kept, held


def epoch_batches(
    key: PRNGKeyArray, epoch: int, num_examples: int, batch_size: int, shuffle: bool = True
) -> tuple[Int32[np.ndarray, "steps batch"], Int32[np.ndarray, "steps"]]:
    """Returns the order in which an epoch visits the examples, each exactly once.

    Args:
      key: the run's key for data order; the epoch is folded in, so each order is independent of earlier epochs.
      epoch: index of the epoch, from 0.
      num_examples: number of examples n.
      batch_size: examples per step.
      shuffle: whether to draw a new permutation every epoch, rather than visit 0, 1, 2, ...

    Returns:
      Indices with one row per step, and the number of real examples in each row: the batch size, except in the last
      row, which has the remainder (16 at n = 50,000 and batch size 64) and is padded with index 0.
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
