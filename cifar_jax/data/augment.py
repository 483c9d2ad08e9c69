"""Augmentation of training images: pure functions that run inside jit, on the original pixels, before upsampling.

Each image of a batch is augmented independently, determined by the key alone. The training step folds its number into
the key, so a resumed run draws the same augmentations as an uninterrupted one.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, UInt8

CROP_PADDING = 4  # pixels on every side
CUTOUT_SHARE = 2  # side of the image over side of the square: 16 of 32 pixels
GREY = 128  # near the mean of every preprocessing, so that the square carries no information

Images = UInt8[Array, "batch h w 3"]


def random_flip(key: PRNGKeyArray, images: Images) -> Images:
    """Mirrors each image left to right with probability one half."""
    flipped: Bool[Array, "batch 1 1 1"] = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def random_crop(key: PRNGKeyArray, images: Images, padding: int = CROP_PADDING) -> Images:
    """Shifts each image by up to `padding` pixels in both directions, filling in its reflected border."""
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="reflect")
    shifts: Int[Array, "batch 2"] = jax.random.randint(key, (images.shape[0], 2), 0, 2 * padding + 1)
    # Sliced image by image, as indexing the batch as a whole would gather it first where it is sharded.
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), images.shape[1:]))(padded, shifts)


def cutout(key: PRNGKeyArray, images: Images) -> Images:
    """Paints a grey square of half the image's side over each image; its centre is anywhere, so it may be cut off.

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
    """Applies the named augmentations to a batch, always in the order of `AUGMENTATIONS`.

    Args:
      key: source of all randomness; each function has its own key, so leaving one out does not change the others.
      images: uint8 pixels; their shape and dtype are kept.
      names: keys of `AUGMENTATIONS`.
    """
    for number, (name, function) in enumerate(AUGMENTATIONS.items()):
        if name in names:
            images = function(jax.random.fold_in(key, number), images)
    return images
