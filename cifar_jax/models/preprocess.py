"""Preprocessing of pixels for a network: pure functions that run inside jit.

A backbone works only with the preprocessing it was trained with, so the preprocessing is a value stored with the
weights (`Backbone.preprocessing`), never a separate flag.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

# Filters of a resize on the host, named as in Pillow.
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """A normalisation of pixels in 0..255, per channel: `(pixel / scale - mean) / std`.

    Attributes:
      name: name in files and tables.
      channels: channel order of the network's input; `mean` and `std` are in this order.
      scale: divisor of the pixels, applied first.
      mean: mean, subtracted next.
      std: standard deviation, divided by last.
    """

    name: str
    channels: Literal["rgb", "bgr"] = "rgb"
    scale: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        """Refuses invalid values, which a corrupt file may contain."""
        channels = self.channels in ("rgb", "bgr") and len(self.mean) == len(self.std) == 3
        if not (channels and all(map(math.isfinite, self.mean)) and min(self.scale, *self.std) > 0):
            raise ValueError(f"invalid preprocessing {self}")


@dataclass(frozen=True)
class EvalTransform:
    """The evaluation transform of photos for a network: resize the shorter side, crop the centre.

    The default is that of most ImageNet networks, in which the crop has 0.875 of the shorter side.

    Attributes:
      shorter: length that the shorter side is resized to before the crop, in pixels.
      side: side of the crop in pixels.
      interpolation: filter of the resize, one of `INTERPOLATIONS`.
    """

    shorter: int = 256
    side: int = 224
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        """Refuses invalid values, which a corrupt file may contain."""
        lengths = type(self.shorter) is type(self.side) is int and 1 <= self.side <= self.shorter <= 16 * self.side
        if not lengths or self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"invalid evaluation transform {self}")

    def shorter_side(self, image_size: int) -> int:
        """Scales the shorter side to a crop of another side, rounded: 73 for 64, where it is 256 for 224."""
        return round(image_size * self.shorter / self.side)

    def at(self, image_size: int) -> "EvalTransform":
        """Returns the transform for a crop of another side."""
        return EvalTransform(self.shorter_side(image_size), image_size, self.interpolation)

    def words(self) -> str:
        """Describes the transform."""
        return f"shorter side to {self.shorter} ({self.interpolation}), centre crop of {self.side}"


# Modes of keras.applications.imagenet_utils.preprocess_input. The means of `caffe` are those of the ImageNet training
# set in BGR, 0..255; those of `torch` are the usual ImageNet statistics in RGB, 0..1.
CAFFE = Preprocessing("caffe", channels="bgr", mean=(103.939, 116.779, 123.68))
TORCH = Preprocessing("torch", scale=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def upsample(images: Float[Array, "batch h w c"], image_size: int) -> Float[Array, "batch size size c"]:
    """Repeats every pixel `image_size / h` times in both directions (nearest neighbour, Keras's `UpSampling2D`).

    Raises:
      ValueError: if the images are not square or `image_size` is not a multiple of their side.
    """
    batch, height, width, channels = images.shape
    if height != width or image_size % height:
        raise ValueError(
            f"images of {height}x{width} cannot be upsampled to {image_size}x{image_size}; "
            f"images must be square and the image size a multiple of {height}"
        )
    factor = image_size // height
    repeated = jnp.broadcast_to(images[:, :, None, :, None, :], (batch, height, factor, width, factor, channels))
    return repeated.reshape(batch, image_size, image_size, channels)


def require_images(images: Any) -> None:
    """Checks that an array, traced or not, is a batch of images: uint8 pixels [n, h, w, 3].

    Raises:
      ValueError: if it is not; the message names its dtype and shape.
    """
    shape, dtype = getattr(images, "shape", None), getattr(images, "dtype", None)
    if shape is None or dtype is None:
        raise ValueError(f"images must be a uint8 array [n, h, w, 3], got {type(images).__name__}")
    if len(shape) == 4 and shape[3] == 3 and dtype == jnp.uint8:
        return
    advice = ""
    if "float" in str(dtype):
        advice = "; pass pixels in 0..255, not scaled to 0..1 or normalised"
    elif len(shape) == 3:
        advice = "; add a batch axis to a single image with images[None]"
    elif len(shape) == 4 and shape[1] == 3:
        advice = "; move the channels to the end with images.transpose(0, 2, 3, 1)"
    elif len(shape) == 4 and shape[3] == 1:
        advice = "; convert grayscale images to RGB with images.repeat(3, axis=3)"
    raise ValueError(f"images must be uint8 [n, h, w, 3], got {dtype} {[*shape]}{advice}")


def preprocess(
    images_u8: UInt8[Array, "batch h w 3"], preprocessing: Preprocessing, image_size: int
) -> Float[Array, "batch size size 3"]:
    """Upsamples RGB pixels to the network's size and normalises them as its weights expect.

    Normalisation is elementwise and upsampling only copies, so they commute bit for bit; the small image is normalised
    first because that is 49 times less work at 7x.

    Args:
      images_u8: RGB pixels in 0..255.
      preprocessing: the preprocessing that the weights were trained with; static under jit.
      image_size: side of the result in pixels, a multiple of `h`; static under jit.

    Returns:
      float32, channels in the network's order. `CAFFE` equals Keras's `UpSampling2D` followed by `preprocess_input`
      bit for bit: one float32 subtraction. The others agree to 2e-7 of their range.

    Raises:
      ValueError: if the images are not uint8 [batch, h, w, 3], not square, or their side does not divide `image_size`.
    """
    require_images(images_u8)
    x = images_u8.astype(jnp.float32)
    if preprocessing.channels == "bgr":
        x = x[..., ::-1]
    if preprocessing.scale != 1.0:
        x = x / preprocessing.scale
    if any(preprocessing.mean):
        x = x - jnp.asarray(preprocessing.mean, jnp.float32)
    if preprocessing.std != (1.0, 1.0, 1.0):
        x = x / jnp.asarray(preprocessing.std, jnp.float32)
    return upsample(x, image_size)
