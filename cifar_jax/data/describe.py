"""Descriptions of a data set for people: classes, counts and sizes, and what about it calls for a warning."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, Int32

from cifar_jax.data.dataset import Dataset
from cifar_jax.data.pictures import Pictures, Resized, content_digests, sizes_of

CLASSES_WIDTH = 60  # characters of class names up to which they are all listed
IMBALANCE = 10  # times as many images as in the smallest class
FEW_IMAGES = 10  # in a class
SHOWN_CLASSES, SHOWN_FILES = 5, 3  # that a warning lists


def class_words(class_names: Sequence[str]) -> str:
    """The number of classes, and their names if these are few: `2 classes (cats, dogs)`."""
    names = ", ".join(class_names)
    return f"{len(class_names):,} classes" + (f" ({names})" if len(names) <= CLASSES_WIDTH else "")


def split_words(counts: Mapping[str, int]) -> str:
    """The number of images by split: `250 training, 120 test images`."""
    return ", ".join(f"{count:,} {split}" for split, count in counts.items()) + " images"


def original_sizes(parts: Mapping[str, Dataset]) -> Int32[np.ndarray, "n 2"]:
    """Width and height of all images in pixels, before they are resized."""
    return np.concatenate([sizes_of(_as_loaded(part)) for part in parts.values()])


def range_words(sizes: Int32[np.ndarray, "n 2"]) -> str:
    """The sizes of images: `32x32 pixels`, or from the smallest width and height to the largest."""
    (width, height), (most_width, most_height) = sizes.min(axis=0), sizes.max(axis=0)
    smallest, largest = f"{width}x{height}", f"{most_width}x{most_height}"
    return f"{smallest} pixels" if smallest == largest else f"{smallest} to {largest} pixels"


def class_warnings(labels: Int[np.ndarray, "n"], class_names: Sequence[str], weighted: bool = False) -> list[str]:
    """Warnings of classes with very different numbers of training images, and of classes with few, but not without any.

    `weighted` says that the classes already have weights in the loss.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    present = np.flatnonzero(counts)
    found = []
    smallest, largest = (int(present[pick(counts[present])]) for pick in (np.argmin, np.argmax))
    if counts[largest] > IMBALANCE * counts[smallest] and not weighted:
        found.append(
            f"The classes are imbalanced: {counts[largest]:,} training images of {class_names[largest]}, "
            f"{counts[smallest]:,} of {class_names[smallest]}. Consider --class-weights balanced, and look at the "
            "scores of each class."
        )
    if few := [label for label in np.argsort(counts, kind="stable").tolist() if 0 < counts[label] < FEW_IMAGES]:
        names = ", ".join(f"{class_names[label]} ({counts[label]})" for label in few[:SHOWN_CLASSES])
        more = f" and {len(few) - SHOWN_CLASSES:,} more" if len(few) > SHOWN_CLASSES else ""
        found.append(
            f"Fewer than {FEW_IMAGES} training images of {names}{more}; add some, or expect little accuracy there."
        )
    return found


def shared_warning(train: Dataset, other: Dataset, name: str) -> str:
    """A warning of images of another split that are training images too, naming some files; or an empty string.

    `name` is that of the other split.
    """
    known, others = ([digest.tobytes() for digest in content_digests(part.images)] for part in (train, other))
    in_training = set(known)
    rows = [row for row, digest in enumerate(others) if digest in in_training]
    if not rows:
        return ""
    images, files = _as_loaded(other), ""
    if isinstance(images, Pictures):
        more = ", ..." if len(rows) > SHOWN_FILES else ""
        files = f" ({', '.join(images.names[row] for row in rows[:SHOWN_FILES])}{more})"
    of = f"{len(rows):,} of {len(others):,} {name} images"
    return f"{of} are identical to training images{files}, so accuracy on them says little."


def _as_loaded(part: Dataset) -> "Pictures | np.ndarray":
    return part.images.source if isinstance(part.images, Resized) else part.images
