"""A data set in one .npz file, with arrays named as MedMNIST names them."""

import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from cifar_jax.data.dataset import Dataset, Splits
from cifar_jax.data.pictures import Pictures, content_digests
from cifar_jax.data.resize import LARGEST_UPSAMPLED
from cifar_jax.errors import UserError

SPLITS = ("train", "test", "val")
MOST_CLASSES = 2**16
LAYOUT = (
    "it must have the arrays train_images and train_labels, and may have test_images, test_labels, val_images and "
    "val_labels"
)


def load_npz(path: Path) -> Splits:
    """Reads `train_images`, `train_labels` and, if they are there, `test_*` and `val_*` from an .npz file.

    Images are uint8 [n, height, width], grey, or [n, height, width, 1 or 3]; labels are whole numbers [n] or [n, 1].
    Classes are called "0", "1", and so on, up to the largest label. Everything is read into memory, as the file may be
    compressed; nothing is unpickled.

    Raises:
      UserError: if the file cannot be read, lacks arrays, or has other shapes, other dtypes or several labels an image.
    """
    parts = {}
    for split, (images, labels) in _read(path).items():
        if not images.ndim or not labels.ndim:
            raise UserError(f"{path} has single numbers in place of {split}_images or {split}_labels; {LAYOUT}.")
        if len(images) != len(labels):
            raise UserError(f"{path} has {len(images):,} {split}_images but {len(labels):,} {split}_labels.")
        part = Dataset(_images(images, f"{split}_images of {path}"), _labels(labels, f"{split}_labels of {path}"))
        if len(labels):
            parts[split] = part
    if "train" not in parts:
        raise UserError(f"{path} has no training images: its train_images are empty.")
    num_classes = 1 + max(int(part.labels.max()) for part in parts.values())
    if num_classes == 1:
        raise UserError(f"All labels of {path} are 0: there is a single class, and nothing to tell apart.")
    train = parts["train"]
    class_names = tuple(map(str, range(num_classes)))
    return Splits(train, parts.get("test", train.take(slice(0, 0))), class_names, path.stem, "", parts.get("val"))


def _read(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads the images and labels of each split that is there."""
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} is not an .npz file, or is cut short; write it by np.savez, or get a fresh copy.")
        with np.load(path, allow_pickle=False) as file:
            present = set(file.files)
            if missing := sorted({"train_images", "train_labels"} - present):
                has = ", ".join(sorted(present)) or "no arrays at all"
                raise UserError(f"{path} lacks {' and '.join(missing)}; {LAYOUT}. It has {has}.")
            found = {}
            for split in SPLITS:
                names = {f"{split}_images", f"{split}_labels"}
                if missing := sorted(names - present):
                    if names & present:
                        raise UserError(f"{path} has {min(names & present)}, but lacks {missing[0]}; {LAYOUT}.")
                    continue
                found[split] = file[f"{split}_images"], file[f"{split}_labels"]
            return found
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise all kinds of errors on corrupt files
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path} has arrays of Python objects, which are not unpickled; save the images as uint8 [n, height, "
                "width, 3] and the labels as whole numbers."
            ) from error
        raise UserError(f"{path} cannot be read as an .npz file ({error}); get a fresh copy.") from error


def _images(images: np.ndarray, what: str) -> UInt8[np.ndarray, "n h w 3"] | Pictures:
    is_shaped = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    if images.dtype != np.uint8 or not is_shaped or 0 in images.shape[1:]:
        scale = " Save them as uint8 from 0 to 255." if images.dtype != np.uint8 and is_shaped else ""
        raise UserError(
            f"{what} are {images.dtype} {[*images.shape]}; expected uint8 [n, height, width], grey, or [n, height, "
            f"width, 3].{scale}"
        )
    if images.ndim == 4 and images.shape[3] == 3:
        return images
    grey = images.reshape(images.shape[:3])
    if max(grey.shape[1:]) > LARGEST_UPSAMPLED:
        return _grey_pictures(grey, what)
    return np.repeat(grey[..., None], 3, axis=-1)


def _grey_pictures(images: UInt8[np.ndarray, "n h w"], what: str) -> Pictures:
    """Large grey images, of which three channels are made when they are read: a third of the memory."""
    height, width = images.shape[1:]
    return Pictures(
        lambda row: Image.fromarray(images[row]).convert("RGB"),
        [f"image {row} of {what}" for row in range(len(images))],
        content_digests(images),
        np.full((len(images), 2), (width, height), np.int32),
        np.arange(len(images)),
    )


def _labels(labels: np.ndarray, what: str) -> Int32[np.ndarray, "n"]:
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise UserError(f"{what} have {labels.shape[1]} labels an image; only one class an image is supported.")
    if labels.ndim not in (1, 2) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{what} are {labels.dtype} {[*labels.shape]}; expected whole numbers [n] or [n, 1].")
    labels = labels.reshape(-1)
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= MOST_CLASSES:
        raise UserError(
            f"{what} are in {labels.min()}..{labels.max()}; expected class numbers from 0, below {MOST_CLASSES:,}."
        )
    return labels.astype(np.int32)
