"""A data set in one .npz file, with arrays named as MedMNIST names them."""

import zipfile
from pathlib import Path

import numpy as np

from cifar_jax.data.dataset import Dataset, Splits
from cifar_jax.errors import UserError

NAMES = {"train": "train", "test": "test", "val": "val"}  # split -> prefix of its arrays


def load_npz(path: Path) -> Splits:
    """Reads `train_images`, `train_labels` and, if they are there, `test_*` and `val_*` from an .npz file.

    Images are uint8 [n, height, width], grey, or [n, height, width, 1 or 3]; labels are whole numbers [n] or [n, 1].
    Classes are called "0", "1", and so on, up to the largest label. Nothing is unpickled.

    Raises:
      UserError: if the file cannot be read, lacks arrays, or has other shapes, other dtypes or several labels an image.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            present = set(file.files)
            if missing := {"train_images", "train_labels"} - present:
                raise UserError(
                    f"{path} lacks {' and '.join(sorted(missing))}; it must have the arrays train_images and "
                    "train_labels, and may have test_images, test_labels, val_images and val_labels."
                )
            arrays = {
                split: (file[f"{prefix}_images"], file[f"{prefix}_labels"])
                for split, prefix in NAMES.items()
                if {f"{prefix}_images", f"{prefix}_labels"} <= present
            }
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read as an .npz file of plain arrays ({error}); get a fresh copy."
        ) from error
    parts = {
        split: Dataset(_images(images, f"{split}_images of {path}"), _labels(labels, f"{split}_labels of {path}"))
        for split, (images, labels) in arrays.items()
    }
    for split, (images, labels) in parts.items():
        if len(images) != len(labels):
            raise UserError(f"{path} has {len(images):,} {split}_images but {len(labels):,} {split}_labels.")
    num_classes = 1 + max(int(part.labels.max(initial=0)) for part in parts.values())
    if num_classes == 1:
        raise UserError(f"All labels of {path} are 0: there is a single class, and nothing to tell apart.")
    train = parts["train"]
    return Splits(
        train,
        parts.get("test", train.take(slice(0, 0))),
        tuple(map(str, range(num_classes))),
        path.stem,
        "",
        parts.get("val"),
    )


def _images(images: np.ndarray, what: str) -> np.ndarray:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise UserError(
            f"{what} are {images.dtype} {[*images.shape]}; expected uint8 [n, height, width], grey, or "
            "[n, height, width, 3]."
        )
    if images.ndim == 3:
        images = images[..., None]
    return np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:3], 3)))


def _labels(labels: np.ndarray, what: str) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise UserError(f"{what} have {labels.shape[1]} labels an image; only one class an image is supported.")
    if labels.ndim not in (1, 2) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{what} are {labels.dtype} {[*labels.shape]}; expected whole numbers [n] or [n, 1].")
    labels = labels.reshape(-1)
    if labels.min(initial=0) < 0 or labels.max(initial=0) > 2**20:
        raise UserError(f"{what} are in {labels.min()}..{labels.max()}; expected class numbers from 0.")
    return labels.astype(np.int32)
