"""What a prepared TFDS set contains, as its files describe it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cifar_jax.data.sources.tfds_library import cause
from cifar_jax.errors import UserError

LARGEST_IN_ARRAYS = 64  # side in pixels up to which images of one size are kept as arrays
# Splits that are read, and what they are called in TFDS sets, by preference.
SPLITS = {"train": ("train",), "test": ("test",), "val": ("validation", "val")}
ADVICE = "delete it and prepare it again"


class Contents(NamedTuple):
    """A prepared set as its files describe it; kept with what was read of it.

    Attributes:
      name: name of the data set, with its configuration.
      version: its version.
      kind: `pixels`: images of one small size, kept as arrays; `packed`: encoded pictures, packed into one array;
        `random`: encoded pictures in ArrayRecord files, read where they are.
      side: height and width of `pixels`.
      image: key of the feature with the images.
      labels: class names by key, of each feature that is a class.
      splits: what TFDS calls each split that is read, a value of `SPLITS`, by ours.
      ignored: the other splits.
    """

    name: str
    version: str
    kind: str
    side: Sequence[int]
    image: str
    labels: Mapping[str, Sequence[str]]
    splits: Mapping[str, str]
    ignored: Sequence[str]


def describe(tfds: Any, info: Any, source: Path) -> Contents:
    """Finds the image, the classes and the splits of a set in its `DatasetInfo`.

    Raises:
      UserError: if it has no training images, no image or several, or no class.
    """
    # Read from a file they come in any order.
    features = dict(sorted(info.features.items())) if hasattr(info.features, "items") else {}
    kinds = tfds.features
    images = [
        key for key, of in features.items() if isinstance(of, kinds.Image) and not isinstance(of, kinds.LabeledImage)
    ]
    labels = {
        key: list(of.names) for key, of in features.items() if isinstance(of, kinds.ClassLabel) and of.num_classes
    }
    examples = {name: split.num_examples for name, split in info.splits.items()}
    # Of two names of a split the first remains.
    splits = {split: name for split, names in SPLITS.items() for name in reversed(names) if examples.get(name)}
    image = "image" if "image" in images else images[0] if len(images) == 1 else None
    has = ", ".join(f"{key}: {type(of).__name__}" for key, of in features.items())
    wrong = None
    if "train" not in examples:
        wrong = f"it has no train split, but {', '.join(sorted(examples)) or 'none at all'}"
    elif not examples["train"]:
        wrong = "its train split is empty"
    elif image is None:
        few = f"several images, {' and '.join(images)}, and none called image" if images else "no image"
        wrong = f"it has {few} (its features are {has})"
    elif not labels:
        wrong = f"it has no label that is one class an image, a ClassLabel (its features are {has})"
    elif features[image].np_dtype == np.float32:
        wrong = "its images are float32; whole numbers are needed"
    if wrong or image is None:
        raise UserError(f"The data set in {source} cannot be used: {wrong}; give another --dataset.")
    height, width = features[image].shape[-3:-1]
    is_small = None not in (height, width) and max(height, width) <= LARGEST_IN_ARRAYS
    return Contents(
        name="/".join(filter(None, (info.name, info.config_name))),
        version=str(info.version),
        kind="pixels" if is_small else "random" if has_random_access(info) else "packed",
        side=(height, width) if is_small else (),
        image=image,
        labels=labels,
        splits=splits,
        ignored=sorted(set(examples) - set(splits.values())),
    )


def has_random_access(info: Any) -> bool:
    """Tells whether a set lies in ArrayRecord files."""
    return bool(info.file_format.value == "array_record")


@contextlib.contextmanager
def refusing_corrupt(source: Path) -> Iterator[None]:
    """Turns whatever TFDS raises while it reads a set into a UserError that calls the set corrupt."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # TFDS, TensorFlow and protobuf raise all kinds of errors on corrupt files
        raise UserError(f"The data set in {source} is corrupt ({cause(error)}); {ADVICE}.") from error
