"""Random changes to training images: pure functions that run inside jit, on the small pixels, before upsampling.

Every image of a batch is changed on its own, and what happens to it is decided by a key alone. The training step folds
its number into that, so a run that is resumed draws what it would have drawn.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, UInt8

CROP_PADDING = 4  # pixels on every side
CUTOUT_SHARE = 2  # the square's side is the image's divided by that: 16 of 32
GREY = 128  # near every preprocessing's mean, so the square says nothing

Images = UInt8[Array, "batch h w 3"]


def random_flip(key: PRNGKeyArray, images: Images) -> Images:
    """Mirrors each image left to right, or not, with equal chances."""
    flipped: Bool[Array, "batch 1 1 1"] = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def random_crop(key: PRNGKeyArray, images: Images, padding: int = CROP_PADDING) -> Images:
    """Shifts each image by up to `padding` pixels in both directions; what comes in is its mirrored border."""
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="reflect")
    shifts: Int[Array, "batch 2"] = jax.random.randint(key, (images.shape[0], 2), 0, 2 * padding + 1)
    # Image by image: indexed as a whole, a batch that is divided between devices would be gathered first.
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), images.shape[1:]))(padded, shifts)


def cutout(key: PRNGKeyArray, images: Images) -> Images:
    """Paints a grey square of half the image's side over each image, its centre anywhere, so it may be cut off.

    Reference:
      DeVries and Taylor 2017, https://arxiv.org/abs/1708.04552
    """
    batch, height, width, _ = images.shape
    sides = (height, width)

    def covered(key: PRNGKeyArray, side: int) -> Bool[Array, "batch side"]:
        half = side // CUTOUT_SHARE // 2
        centre = jax.random.randint(key, (batch, 1), 0, side)
        return (jnp.arange(side) >= centre - half) & (jnp.arange(side) < centre + half)

    rows, columns = (covered(k, side) for k, side in zip(jax.random.split(key), sides, strict=True))
    square = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(square, jnp.asarray(GREY, images.dtype), images)


AUGMENTATIONS: dict[str, Callable[[PRNGKeyArray, Images], Images]] = {
    "flip": random_flip,
    "crop": random_crop,
    "cutout": cutout,
}


def augment(key: PRNGKeyArray, images: Images, names: Sequence[str]) -> Images:
    """Changes a batch of images by the named functions, always in the order of `AUGMENTATIONS`.

    Args:
      key: decides all; each function has a key of its own, so leaving one out does not move the others.
      images: uint8 pixels; their shape and dtype stay.
      names: of `AUGMENTATIONS`.
    """
    for number, (name, function) in enumerate(AUGMENTATIONS.items()):
        if name in names:
            images = function(jax.random.fold_in(key, number), images)
    return images
