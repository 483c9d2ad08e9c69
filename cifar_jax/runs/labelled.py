"""Labelled pictures to score a run on: its own test images, or those of another data set, matched by class name."""

import contextlib
import logging
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int32

from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import Dataset, Splits, check
from cifar_jax.data.describe import shared_warning
from cifar_jax.data.load import kind_of, load_splits, read_splits
from cifar_jax.data.pictures import AnyImages, Images, Resized, sizes_of
from cifar_jax.data.resize import Resize, size_words
from cifar_jax.data.splits import load_data
from cifar_jax.errors import UserError, some_of
from cifar_jax.runs.classifier import Classifier
from cifar_jax.runs.reader import Run

logger = logging.getLogger(__name__)


Split: TypeAlias = Literal["test", "val", "all"]


class Labelled(NamedTuple):
    """Pictures to score a run on.

    Attributes:
      images: as the run's network takes them.
      labels: classes of the run.
      name: of the data set, as it was given.
      split: which of its images: `all` where it is not divided.
      resize_words: how its pictures became the images.
    """

    images: Images
    labels: Int32[np.ndarray, "n"]
    name: str
    split: Split
    resize_words: str


def own_test_images(model: Classifier, dataset: str | None = None) -> Labelled:
    """Loads the test images of a run, resized as they were for it.

    Args:
      model: the run, or a model that was exported from it.
      dataset: where the data set is now, if it has moved.

    Raises:
      UserError: if they cannot be loaded or are not those that the run was scored on.
    """
    config = model.config if dataset is None else _of(model.config, dataset)
    is_named = model.data_kind in ("shapes", "tfds") and kind_of(config.data.dataset) == model.data_kind
    if dataset is None and not isinstance(model, Run) and not is_named:
        raise UserError(
            f"{model.path} does not say where the pictures of {config.data.dataset} are; name them, or others, with "
            "--dataset."
        )
    data = load_data(config, model.image_size, resize=model.resize)
    if data.digests["test"].examples != model.test_sha256:
        raise UserError(
            f"The test images of {config.data.dataset} are not those that {_named(model)} was scored on; "
            + (
                "restore the files that were added, removed or changed, or name other pictures with --dataset."
                if model.data_kind in ("folder", "npz")
                else "name the directory of the same version with --data-dir."
            )
        )
    words = model.resize.words(model.image_size)
    return Labelled(data.test.images, data.test.labels, config.data.dataset, "test", words)


def other_images(
    model: Classifier, dataset: str, label_key: str | None = None, skip_unreadable: bool = False
) -> Labelled:
    """Loads a data set to score a run on: its test images, else its validation images, else all of its images.

    Its pictures may have any size: they are resized as the run's own, or, where those were upsampled, their centre
    square is reduced to the same side first.

    Args:
      model: the run, or a model exported from it; its seed, TFDS data directory and cache are used.
      dataset: a folder of pictures, an .npz file, a TFDS set or `shapes`. It may lack classes of the run.
      label_key: name of the label in a TFDS set that has several.
      skip_unreadable: whether to leave out files of a folder that cannot be decoded.

    Raises:
      UserError: if it cannot be loaded, or has images of a class that the run does not know.
    """
    if (own := _moved_test_images(model, dataset)) is not None:
        return own
    part, split, splits = _scored_part(model, dataset, label_key, skip_unreadable)
    check(part, len(splits.class_names), f"{dataset}")
    label_of = {name: label for label, name in enumerate(model.class_names)}
    if unknown := [
        splits.class_names[label] for label in np.unique(part.labels) if splits.class_names[label] not in label_of
    ]:
        raise UserError(
            f"{dataset} has images of {some_of(unknown)}, which {_named(model)} does not know; it knows "
            f"{some_of(model.class_names)}."
        )
    labels = np.array([label_of.get(name, -1) for name in splits.class_names], np.int32)[part.labels]
    _warn_of_training_images(model, part)
    images, words = _as_input(part.images, model.resize, model.image_size)
    return Labelled(images, labels, dataset, split, words)


def _moved_test_images(model: Classifier, dataset: str) -> Labelled | None:
    """The run's own test images, if a folder or file is that of the run, wherever it lies now."""
    if kind_of(dataset) not in ("folder", "npz", "tfds-directory") or kind_of(dataset) != model.data_kind:
        return None
    with contextlib.suppress(UserError):  # which reading it as another data set will tell
        return own_test_images(model, dataset)
    return None


def _warn_of_training_images(model: Classifier, part: Dataset) -> None:
    """Logs a warning if the run was trained on some of the pictures, as far as its own are still there."""
    if model.data_kind not in ("folder", "npz", "tfds-directory"):
        return
    if not isinstance(model, Run):
        logger.warning(
            f"{model.path} does not say which pictures it was trained on; if some of these are among them, they are "
            "scored too well."
        )
        return
    with contextlib.suppress(UserError):
        train = load_data(model.config, model.image_size, resize=model.resize).train
        if warning := shared_warning(train, part, "scored"):
            logger.warning(warning)


def _of(config: TrainConfig, dataset: str) -> TrainConfig:
    return replace(config, data=replace(config.data, dataset=dataset))


def _named(model: Classifier) -> str:
    return f"the run in {model.path}" if isinstance(model, Run) else f"the model {model.path}"


def _scored_part(
    model: Classifier, dataset: str, label_key: str | None, skip_unreadable: bool
) -> tuple[Dataset, Split, Splits]:
    config = model.config
    if kind_of(dataset) == "shapes":
        splits = load_splits(dataset, train_examples=1, seed=config.optim.seed, label_key=label_key)
    else:
        where = config.run.data_dir, config.run.cache_dir
        splits = read_splits(dataset, *where, label_key, skip_unreadable, min_classes=1)
    if len(splits.test.labels):
        return splits.test, "test", splits
    if splits.val is not None:
        return splits.val, "val", splits
    return splits.train, "all", splits


def _as_input(images: AnyImages, resize: Resize, image_size: int) -> tuple[Images, str]:
    """Images of the run's size, and in words how they became so."""
    words, sizes = resize.words(image_size), sizes_of(images)
    if resize.method == "upsample" and (sizes != resize.side).any():
        words = f"{size_words(sizes)}, reduced to {resize.side}x{resize.side} as the training images, {words}"
    elif resize.method == "upsample" and isinstance(images, np.ndarray):
        return images, words
    source: Any = images
    return Resized(source, resize), words
