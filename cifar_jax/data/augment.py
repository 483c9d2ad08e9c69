"""Augmentation of training images: pure functions that run inside jit, on uint8 pixels, before upsampling.

Each image of a batch is augmented independently, determined by the key alone. The training step folds its number into
the key, so a resumed run draws the same augmentations as an uninterrupted one.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32, PRNGKeyArray, UInt8

CROP_PADDING = 4  # pixels on every side
CUTOUT_SHARE = 2  # side of the image over side of the square: 16 of 32 pixels
GREY = 128  # near the mean of every preprocessing, so that the square carries no information
CROP_AREA = (0.08, 1.0)  # of a random resized crop, as a share of the image's
CROP_RATIO = (3 / 4, 4 / 3)  # its width over its height
CROP_TRIES = 10  # to draw a crop that fits into the image
JITTER = 0.4  # largest change of brightness, contrast and saturation

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


def random_resized_crop(
    key: PRNGKeyArray,
    images: Images,
    side: int | None = None,
    area: tuple[float, float] = CROP_AREA,
    ratio: tuple[float, float] = CROP_RATIO,
) -> UInt8[Array, "batch side side 3"]:
    """Cuts a rectangle of random area, shape and place out of each image and resizes it to a square.

    The rectangles are drawn as torchvision's `RandomResizedCrop` draws them, and resized as Pillow resizes:
    bilinear, with antialiasing, from the pixels of the rectangle alone.

    Args:
      key: source of all randomness.
      images: uint8 pixels.
      side: side of the result in pixels; the height of the images if None.
      area: smallest and largest share of an image's area.
      ratio: smallest and largest ratio of width to height; drawn uniformly in its logarithm.

    Reference:
      Szegedy et al. 2014, https://arxiv.org/abs/1409.4842, section 6
    """
    batch, rows, columns, _ = images.shape
    side = side or rows
    shape = jnp.broadcast_to(jnp.array([[rows, columns]]), (batch, 2))
    top, left, height, width = crop_boxes(key, shape, area, ratio).T
    down, across = (
        _resize_weights(start, length, of, side) for start, length, of in ((top, height, rows), (left, width, columns))
    )
    pixels = jnp.einsum("nih,nhwc->niwc", down, images.astype(jnp.float32), precision="highest")
    pixels = jnp.einsum("njw,niwc->nijc", across, pixels, precision="highest")
    return jnp.clip(jnp.round(pixels), 0, 255).astype(images.dtype)


def crop_boxes(
    key: PRNGKeyArray,
    shapes: Int[Array, "batch 2"],
    area: tuple[float, float] = CROP_AREA,
    ratio: tuple[float, float] = CROP_RATIO,
) -> Int32[Array, "batch 4"]:
    """Draws the rectangles of random resized crops.

    The first of ten tries that fits is taken. If none does, it is the centre, as large and as near to the image's
    shape as `ratio` allows.

    Args:
      key: source of all randomness.
      shapes: height and width of each image in pixels.
      area: smallest and largest share of an image's area.
      ratio: smallest and largest ratio of width to height.

    Returns:
      Top, left, height and width of each in pixels.
    """
    height, width = (shapes[:, axis].astype(jnp.float32) for axis in (0, 1))
    # Drawn at once, which compiles in a third of the time.
    drawn = jax.random.uniform(key, (len(shapes), 2 * CROP_TRIES + 2))
    areas = (height * width)[:, None] * _between(drawn[:, :CROP_TRIES], *area)
    ratios = jnp.exp(_between(drawn[:, CROP_TRIES:-2], *map(math.log, ratio)))
    heights, widths = jnp.round(jnp.sqrt(areas / ratios)), jnp.round(jnp.sqrt(areas * ratios))
    fits = (heights > 0) & (heights <= height[:, None]) & (widths > 0) & (widths <= width[:, None])
    first, found = jnp.argmax(fits, axis=1), fits.any(axis=1)
    nearest = jnp.clip(width / height, *ratio)
    largest = jnp.minimum(height, jnp.round(width / nearest)), jnp.minimum(width, jnp.round(height * nearest))

    def side_and_place(
        tried: Float[Array, "batch tries"], instead: Float[Array, "batch"], of: Float[Array, "batch"], axis: int
    ) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
        side = jnp.where(found, jnp.take_along_axis(tried, first[:, None], axis=1)[:, 0], instead)
        room = of - side
        anywhere = jnp.minimum(jnp.floor(drawn[:, axis - 2] * (room + 1)), room)  # a product may be rounded up
        return side, jnp.where(found, anywhere, jnp.floor(room / 2))

    down, top = side_and_place(heights, largest[0], height, 0)
    across, left = side_and_place(widths, largest[1], width, 1)
    return jnp.stack([top, left, down, across], axis=1).astype(jnp.int32)


def _between(drawn: Float[Array, "..."], low: float, high: float) -> Float[Array, "..."]:
    """Scales numbers that are uniform in 0..1."""
    return low + (high - low) * drawn


def _resize_weights(
    start: Int[Array, "batch"], length: Int[Array, "batch"], of: int, side: int
) -> Float[Array, "batch side of"]:
    """Weights of `of` pixels in each of `side` pixels that `length` of them from `start` on are resized to.

    `jax.image.scale_and_translate` would let pixels outside the crop in at its edges.
    """
    start, length = (value.astype(jnp.float32)[:, None, None] for value in (start, length))
    step = length / side  # pixels of the image for one of the result
    centres = start + (jnp.arange(side, dtype=jnp.float32)[:, None] + 0.5) * step
    pixels = jnp.arange(of, dtype=jnp.float32) + 0.5
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(pixels - centres) / jnp.maximum(step, 1.0))
    weights = jnp.where((pixels > start) & (pixels < start + length), weights, 0.0)
    return weights / weights.sum(axis=2, keepdims=True)


def color_jitter(key: PRNGKeyArray, images: Images, amount: float = JITTER) -> Images:
    """Changes brightness, contrast and saturation of each image, in this order, by factors of up to 1 +- `amount`.

    Each is torchvision's, which is that of Pillow's `ImageEnhance`: the image is blended with black, with the mean of
    its greys, and with its greys. torchvision draws the order as well.
    """
    # An image's draws are a row of their own, so that rows of padding after them change none of them.
    factors = _between(jax.random.uniform(key, (len(images), 3, 1, 1, 1)), 1 - amount, 1 + amount)
    return adjust_colors(images, *jnp.moveaxis(factors, 1, 0))


def adjust_colors(
    images: Images,
    brightness: Float[Array, "batch 1 1 1"],
    contrast: Float[Array, "batch 1 1 1"],
    saturation: Float[Array, "batch 1 1 1"],
) -> Images:
    """Multiplies brightness, contrast and saturation by factors, one after the other, rounding as Pillow does."""
    pixels = _blend(jnp.zeros((), jnp.int32), images.astype(jnp.int32), brightness)
    mean = jnp.floor(_greys(pixels).mean(axis=(1, 2, 3), keepdims=True, dtype=jnp.float32) + 0.5)
    pixels = _blend(mean.astype(jnp.int32), pixels, contrast)
    return _blend(_greys(pixels), pixels, saturation).astype(images.dtype)


def _blend(first: Int[Array, "..."], second: Int[Array, "..."], share: Float[Array, "..."]) -> Int[Array, "..."]:
    """`first + share * (second - first)`, rounded down into 0..255."""
    blended = first.astype(jnp.float32) + share * (second - first).astype(jnp.float32)
    return jnp.clip(jnp.floor(blended), 0, 255).astype(jnp.int32)


def _greys(pixels: Int[Array, "batch h w 3"]) -> Int[Array, "batch h w 1"]:
    """Luma of ITU-R 601, in the whole numbers that Pillow computes with."""
    red, green, blue = (pixels[..., channel : channel + 1] for channel in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


RESIZED_CROP = "random-resized-crop"
# In the order in which they are applied.
AUGMENTATIONS: dict[str, Callable[[PRNGKeyArray, Images], Images]] = {
    RESIZED_CROP: random_resized_crop,
    "flip": random_flip,
    "crop": random_crop,
    "color-jitter": color_jitter,
    "cutout": cutout,
}
# Append only: the position determines the key that a step gives an augmentation.
KEYS = ("flip", "crop", "cutout", RESIZED_CROP, "color-jitter")


def augment(key: PRNGKeyArray, images: Images, names: Sequence[str]) -> Images:
    """Applies the named augmentations to a batch, always in the order of `AUGMENTATIONS`.

    Args:
      key: source of all randomness; each function has its own key, so leaving one out does not change the others.
      images: square uint8 images; their shape and dtype are kept.
      names: keys of `AUGMENTATIONS`.
    """
    for name, function in AUGMENTATIONS.items():
        if name in names:
            images = function(jax.random.fold_in(key, KEYS.index(name)), images)
    return images
