"""How a picture becomes the input of a network: a value that travels with the weights and is kept with a run."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from cifar_jax.errors import UserError
from cifar_jax.models.preprocess import INTERPOLATIONS, EvalTransform

LARGEST_UPSAMPLED = 64  # side in pixels up to which `auto` upsamples whole images
FILTERS = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}
# Of long pictures that would have more pixels than this after the resize, what is cropped off is not computed at all:
# one of 1x5000 pixels would become one of 256x1280000, a gigabyte. Pictures up to 4:1 are always resized as a whole.
MOST_PIXELS, LONG = 2**25, 4


@dataclass(frozen=True)
class Resize:
    """What is done with each picture on the host, before it is sent to the devices as uint8 [side, side, 3].

    Attributes:
      method: `upsample`: pictures keep their size, and the network's function repeats their pixels inside jit.
        `eval-transform`: the shorter side is resized with antialiasing, and the centre is cropped.
      side: side of the result in pixels.
      shorter: eval-transform: length of the shorter side before the crop.
      interpolation: eval-transform: filter of the resize, a key of `FILTERS`.
    """

    method: Literal["upsample", "eval-transform"] = "upsample"
    side: int = 32
    shorter: int = 0
    interpolation: str = "bilinear"

    def __call__(self, image: Image.Image) -> UInt8[np.ndarray, "side side 3"]:
        """Returns the pixels of an RGB picture of any size."""
        if self.method == "upsample":
            resized = centred_square(image).resize((self.side, self.side), Image.Resampling.BICUBIC)
        elif not _is_too_long(image.size, self.shorter):
            resized = centre_crop(shorter_side_to(image, self.shorter, self.interpolation), self.side)
        else:
            resized = resized_centre(image, self.shorter, self.side, self.interpolation)
        return np.asarray(resized, np.uint8)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields that apply, for summary.json and for `from_json`."""
        return asdict(self) if self.method == "eval-transform" else {"method": self.method, "side": self.side}

    def words(self, image_size: int) -> str:
        """Describes the way to the network's input, of `image_size` pixels a side."""
        if self.method == "eval-transform":
            return f"shorter side to {self.shorter} ({self.interpolation}), centre crop of {self.side}"
        factor = image_size // self.side
        return f"upsampled {factor}x (nearest)" if factor > 1 else "as they are"

    @staticmethod
    def from_json(value: dict[str, Any] | None) -> "Resize":
        """Restores the result of `to_json`; None, as runs before it was recorded have it, is 32 pixels upsampled."""
        return Resize(**(value or {}))


def shorter_side_to(image: Image.Image, length: int, interpolation: str) -> Image.Image:
    """Resizes a picture so that its shorter side has `length` pixels, as torchvision's `Resize` does on PIL images.

    The longer side is rounded down.
    """
    size = _size_with_shorter_side(image.size, length)
    return image if size == image.size else image.resize(size, FILTERS[interpolation])


def _size_with_shorter_side(size: tuple[int, int], length: int) -> tuple[int, int]:
    width, height = size
    return (length, length * height // width) if width <= height else (length * width // height, length)


def _is_too_long(size: tuple[int, int], length: int) -> bool:
    width, height = _size_with_shorter_side(size, length)
    return width * height > MOST_PIXELS and max(size) > LONG * min(size)


def resized_centre(image: Image.Image, length: int, side: int, interpolation: str) -> Image.Image:
    """Computes only the centre of a resized picture, which looks as that of `centre_crop(shorter_side_to(...))`.

    They are not equal to the bit: Pillow keeps the edges of a region in single precision, and may resize the two
    directions in the other order. On photos the difference is a grey level or two.
    """
    size = _size_with_shorter_side(image.size, length)
    scales = [old / new for old, new in zip(image.size, size, strict=True)]
    starts = _margins(size, side)
    left, top = (start * scale for start, scale in zip(starts, scales, strict=True))
    right, bottom = (
        min((start + side) * scale, old) for start, scale, old in zip(starts, scales, image.size, strict=True)
    )
    return image.resize((side, side), FILTERS[interpolation], (left, top, right, bottom))


def centred_square(image: Image.Image) -> Image.Image:
    """Crops the largest centred square; an odd margin is smaller on the left or at the top."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


def centre_crop(image: Image.Image, side: int) -> Image.Image:
    """Crops the centre of a picture; an odd margin is rounded to even halves, as torchvision's `CenterCrop` does."""
    left, top = _margins(image.size, side)
    return image if image.size == (side, side) else image.crop((left, top, left + side, top + side))


def _margins(size: tuple[int, int], side: int) -> list[int]:
    return [round((length - side) / 2.0) for length in size]


def choose_resize(
    method: Literal["auto", "upsample", "eval-transform"],
    interpolation: str,
    sizes: Int32[np.ndarray, "n 2"],
    image_size: int,
    transform: EvalTransform,
) -> Resize:
    """Chooses how pictures become the input of a network.

    Args:
      method: `auto` upsamples if all pictures are squares of one side of at most 64 pixels of which `image_size` is a
        multiple; else it is `eval-transform`.
      interpolation: filter of `eval-transform`; `auto` takes that of the weights.
      sizes: width and height of all pictures, in pixels.
      image_size: side of the network's input in pixels.
      transform: the evaluation transform of the weights.

    Raises:
      UserError: if `upsample` is asked for and impossible, or an interpolation is named for it.
    """
    found = np.unique(sizes, axis=0)
    side = int(found[0, 0])
    is_one_square = len(found) == 1 and side == found[0, 1]
    fits = is_one_square and image_size % side == 0
    if method == "upsample" and not fits:
        reason = (
            f"--image-size {image_size} is not a multiple of their {side} pixels"
            if is_one_square
            else f"they are {size_words(sizes)}"
        )
        raise UserError(
            f"--resize upsample repeats the pixels of square pictures of one size, but {reason}; leave it out, or use "
            "--resize eval-transform."
        )
    if method == "upsample" or (method == "auto" and fits and side <= LARGEST_UPSAMPLED):
        if interpolation != "auto":
            raise UserError(
                f"--interpolation {interpolation} applies to --resize eval-transform, but the pictures are upsampled "
                "by repeating pixels; leave it out, or add --resize eval-transform."
            )
        return Resize("upsample", side)
    shorter = transform.shorter_side(image_size)
    return Resize(
        "eval-transform", image_size, shorter, transform.interpolation if interpolation == "auto" else interpolation
    )


def size_words(sizes: Int32[np.ndarray, "n 2"]) -> str:
    """Describes the sizes of pictures: `32x32 pixels`, or the range of their widths and heights."""
    (width, height), (most_width, most_height) = sizes.min(axis=0), sizes.max(axis=0)
    if (width, height) == (most_width, most_height):
        return f"{width}x{height} pixels"
    return f"{width} to {most_width} pixels wide and {height} to {most_height} high"
