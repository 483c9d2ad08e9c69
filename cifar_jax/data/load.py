"""Loading of data sets by name or path, cut down to the requested number of examples."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import PRNGKeyArray

from cifar_jax.data.dataset import Dataset, Splits, balanced_subset, check, hold_out
from cifar_jax.data.sources import shapes
from cifar_jax.data.sources.folder import list_folder, load_folder
from cifar_jax.data.sources.npz import load_npz
from cifar_jax.data.sources.tfds import data_root, known_to_tfds, load_tfds, prepared_in, prepared_names
from cifar_jax.errors import UserError, did_you_mean, some_of
from cifar_jax.rng import stream_key

# Number of synthetic images by default, the same as in CIFAR-10.
SHAPES_TRAIN, SHAPES_TEST = 50_000, 10_000
SHAPES_VERSION = "1.0.0"
MAX_SHAPES = 1_000_000  # 3 GB; there is no natural limit to synthetic images
TEST_FRACTION = 0.2  # of the images of a set without test images

# Names that need no lookup.
OF_TFDS = ("cifar10", "cifar100", "svhn_cropped", "cifar10_corrupted", "cmaterdb")
TAKES = "a folder of pictures, an .npz file, cifar10 or another TFDS data set, or shapes"

logger = logging.getLogger(__name__)

Kind = Literal["shapes", "folder", "npz", "tfds", "tfds-directory"]


def kind_of(name: str) -> Kind:
    """Tells what a value of --dataset is: a path if it has a separator or exists as one, else a name.

    Raises:
      UserError: if it is a path at which there is nothing that could be a data set.
    """
    if name == "shapes":
        return "shapes"
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return "tfds-directory" if prepared_in(path) else "folder"
    if path.is_file():
        if path.suffix == ".npz":
            return "npz"
        raise UserError(f"--dataset {name} is a file, but not an .npz file. --dataset takes {TAKES}.")
    if os.path.isabs(path) or name.startswith(("./", "../", "~")) or path.suffix == ".npz":
        raise UserError(f"--dataset {name} does not exist. --dataset takes {TAKES}.")
    return "tfds"  # `name/config` too


def check_name(name: str, data_dir: str | None = None) -> None:
    """Checks that a data set exists, without any download and without importing TensorFlow.

    Args:
      name: a path; `shapes`; a set prepared in the data directory; or one that TFDS knows, such as `svhn_cropped`,
        `cifar10_corrupted/fog_1` or `cifar10:3.0.2`.
      data_dir: the TFDS data directory.

    Raises:
      UserError: if there is no such set; the message suggests a similar name.
    """
    kind = kind_of(name)
    if kind == "folder":
        path = Path(os.path.expanduser(name))
        with _naming_prepared_sets(path):
            list_folder(path)
    if kind != "tfds" or name in OF_TFDS or name in (prepared := prepared_names(data_dir)):
        return
    known = known_to_tfds()
    # Without TFDS the names are unknown, and names with a colon may be community data sets; TFDS itself decides later.
    if not known or ":" in name or name.partition("/")[0] in known:
        return
    if configs := sorted(one for one in prepared if one.startswith(f"{name}/")):
        raise UserError(
            f"{name} in {data_root(data_dir)} has the configurations {some_of(configs)}; name one of them as --dataset."
        )
    if "/" in name or os.sep in name:
        raise UserError(f"--dataset {name} does not exist. --dataset takes {TAKES}.")
    # Common sets are suggested before the hundreds of others in TFDS: `cifar-10` most likely means cifar10.
    meant = did_you_mean(name, ["shapes", *OF_TFDS, *prepared]) or did_you_mean(name, known)
    raise UserError(
        f"There is no folder or file {name!r}, and no data set of this name in {data_root(data_dir)} or TFDS.{meant} "
        f"--dataset takes {TAKES}."
    )


def load_splits(
    name: str,
    *,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    train_examples: int | None = None,
    test_examples: int | None = None,
    seed: int = 0,
    test_fraction: float = TEST_FRACTION,
    label_key: str | None = None,
    skip_unreadable: bool = False,
) -> Splits:
    """Loads the training and test images of a data set.

    Images of one small size lie in memory, or are mapped into it. Others are `Pictures`, which are decoded when they
    are read; `Splits.resized` makes images of one size of them.

    Args:
      name: a folder of pictures, an .npz file, the name or directory of a TFDS set, or `shapes`.
      data_dir: the TFDS data directory; if None, $TFDS_DATA_DIR or ~/tensorflow_datasets.
      cache_dir: the cache directory for decoded arrays; if None, $CIFAR_JAX_CACHE or ~/.cache/cifar_jax.
      train_examples: size of a balanced random subset of the training images; None for all.
      test_examples: the same for the test images.
      seed: seed of the subsets, of a split by `test_fraction` and of synthetic images.
      test_fraction: fraction of the images to test on where the set has no test images of its own.
      label_key: name of the label in a TFDS set that has several.
      skip_unreadable: whether to leave out files of a folder that cannot be decoded.

    Raises:
      UserError: if there is no such set, it is corrupt, or it has fewer examples than requested.
    """
    if kind_of(name) == "shapes":
        _check_options(name, label_key, skip_unreadable)
        drawn = _draw_splits(train_examples or SHAPES_TRAIN, test_examples or SHAPES_TEST, seed)
        return _with_test(drawn, test_fraction, stream_key(seed, "test_split"))
    splits = read_splits(name, data_dir, cache_dir, label_key, skip_unreadable)
    splits = _with_test(splits, test_fraction, stream_key(seed, "test_split"))
    for split, part in splits.parts.items():
        check(part, len(splits.class_names), f"The {split} split of {name}")
    _warn_of_empty_classes(splits)
    return splits._replace(
        train=_subset(splits.train, train_examples, stream_key(seed, "train_subset"), "training"),
        test=_subset(splits.test, test_examples, stream_key(seed, "test_subset"), "test"),
    )


def read_splits(
    name: str,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    label_key: str | None = None,
    skip_unreadable: bool = False,
    min_classes: int = 2,
) -> Splits:
    """Reads a folder of pictures, an .npz file or a TFDS set as it is: without test images of its own, `test` is empty.

    See `load_splits` for the arguments; `min_classes` is that of `load_folder`.

    Raises:
      UserError: if there is no such set, or it is corrupt.
    """
    kind, path = kind_of(name), Path(os.path.expanduser(name))
    _check_options(name, label_key, skip_unreadable)
    if kind == "folder":
        with _naming_prepared_sets(path):
            return load_folder(path, skip_unreadable, min_classes)
    if kind == "npz":
        return load_npz(path)
    check_name(name, data_dir)
    return load_tfds(name, data_dir, cache_dir, label_key)


def _check_options(name: str, label_key: str | None, skip_unreadable: bool) -> None:
    kind = kind_of(name)
    if label_key is not None and kind not in ("tfds", "tfds-directory"):
        raise UserError(f"--label-key {label_key} names a label of a TFDS set, which {name} is not; leave it out.")
    if skip_unreadable and kind != "folder":
        raise UserError(
            f"--skip-unreadable leaves out files of a folder of pictures, which {name} is not; leave it out."
        )


@contextlib.contextmanager
def _naming_prepared_sets(path: Path) -> Iterator[None]:
    """Names the TFDS sets below a folder that turns out not to have pictures."""
    try:
        yield
    except UserError as error:
        if names := sorted(prepared_names(str(path))):
            raise UserError(
                f"{path} holds prepared TFDS sets: {some_of(names)}; name one, as --dataset {path / names[0]}."
            ) from error
        raise


def _warn_of_empty_classes(splits: Splits) -> None:
    counts = np.bincount(splits.train.labels, minlength=len(splits.class_names))
    if empty := [splits.class_names[label] for label in np.flatnonzero(counts == 0)]:
        few = f"class {empty[0]}" if len(empty) == 1 else f"the classes {some_of(empty)}"
        logger.warning(f"{splits.name} has no training images of {few}.")


def _with_test(splits: Splits, fraction: float, key: PRNGKeyArray) -> Splits:
    """Adds test images to a set without any: its validation images, or a share of the training images."""
    if len(splits.test.labels):
        if fraction != TEST_FRACTION:
            raise UserError(
                f"--test-fraction {fraction} holds out test images, but {splits.name} has its own; leave it out."
            )
        return splits
    if splits.val is not None:
        if fraction != TEST_FRACTION:
            raise UserError(
                f"--test-fraction {fraction} holds out test images, but {splits.name} is tested on its validation "
                "images; leave it out."
            )
        note = "tested on its validation images, as it has no test images"
        return splits._replace(test=splits.val, val=None, notes=(*splits.notes, note))
    kept, held = hold_out(splits.train.labels, fraction, key, "--test-fraction")
    note = f"no test images of its own: {len(held):,} of {len(splits.train.labels):,} held out (--test-fraction)"
    return splits._replace(train=splits.train.take(kept), test=splits.train.take(held), notes=(*splits.notes, note))


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
