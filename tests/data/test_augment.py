"""Tests of the augmentations: their effects on images, and their dependence on the key alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from cifar_jax.config import TrainConfig
from cifar_jax.data.augment import (
    AUGMENTATIONS,
    GREY,
    adjust_colors,
    augment,
    color_jitter,
    crop_boxes,
    cutout,
    random_crop,
    random_flip,
    random_resized_crop,
)
from cifar_jax.errors import UserError
from cifar_jax.train.from_config import image_augmentation
from cifar_jax.train.task import Batch

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def images(shapes):
    return jnp.asarray(shapes.images[:64])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_keep_shape_and_dtype_and_change_some_images(images, name):
    changed = jax.jit(AUGMENTATIONS[name])(KEY, images)
    assert changed.shape == images.shape and changed.dtype == jnp.uint8
    differs = np.asarray(changed != images).any(axis=(1, 2, 3))
    assert 10 < differs.sum() <= 64


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_rows_after_them_change_no_images(images, name):
    """A batch of 20 is padded to 24 where eight devices share it."""
    augmented = AUGMENTATIONS[name](KEY, images)
    np.testing.assert_array_equal(AUGMENTATIONS[name](KEY, images[:-4]), augmented[:-4])


def test_flip_returns_the_image_or_its_mirror(images):
    flipped = np.asarray(random_flip(KEY, images))
    pairs = list(zip(flipped, np.asarray(images), strict=True))
    mirrored = sum(np.array_equal(a, b[:, ::-1]) for a, b in pairs)
    assert all(np.array_equal(a, b) or np.array_equal(a, b[:, ::-1]) for a, b in pairs)
    assert 20 <= mirrored <= 44


def test_crop_is_a_window_of_the_reflected_image(images):
    padded = np.pad(np.asarray(images), ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32), axis=(1, 2))  # [n, 9, 9, 3, 32, 32]
    cropped = np.asarray(random_crop(KEY, images)).transpose(0, 3, 1, 2)[:, None, None]
    found = (windows == cropped).all(axis=(3, 4, 5))
    assert found.any(axis=(1, 2)).all()
    places = {tuple(np.argwhere(one)[0]) for one in found}
    assert len(places) > 25 and {0, 8} <= {row for row, _ in places}


def test_cutout_paints_a_square_of_half_the_side(images):
    black = jnp.zeros_like(images)
    painted = np.asarray(cutout(KEY, black))
    assert set(np.unique(painted)) == {0, GREY}
    for image in painted[..., 0] > 0:
        rows, columns = image.any(axis=1).sum(), image.any(axis=0).sum()
        assert image.sum() == rows * columns and 8 <= rows <= 16 and 8 <= columns <= 16
    assert (painted > 0).sum(axis=(1, 2, 3)).max() == 3 * 16 * 16


def test_augment_is_determined_by_the_key(images):
    names = ("flip", "random-resized-crop", "color-jitter", "cutout")
    changed = jax.jit(lambda key: augment(key, images, names))
    first, again, other = (changed(jax.random.fold_in(KEY, step)) for step in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.asarray(first != other).any()


def test_crop_and_random_resized_crop_are_refused_together():
    with pytest.raises(UserError, match="crop and random-resized-crop each choose a part of an image; leave one"):
        TrainConfig(mode="live", augment=("crop", "random-resized-crop"))
    with pytest.raises(UserError, match="--augment needs the pixels at every step"):
        TrainConfig(mode="cached", augment=("random-resized-crop",))


def test_augmentations_draw_independently(images):
    np.testing.assert_array_equal(
        augment(KEY, images, ("crop", "flip")),
        AUGMENTATIONS["crop"](jax.random.fold_in(KEY, 1), augment(KEY, images, ("flip",))),
    )
    np.testing.assert_array_equal(augment(KEY, images, ()), images)


def torchvision_boxes(rng, height, width, number, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """Rectangles as torchvision.transforms.RandomResizedCrop.get_params draws them, in NumPy."""
    for _ in range(number):
        for _ in range(10):
            target = height * width * rng.uniform(*area)
            aspect = np.exp(rng.uniform(*np.log(ratio)))
            w, h = round(np.sqrt(target * aspect)), round(np.sqrt(target / aspect))
            if 0 < w <= width and 0 < h <= height:
                yield rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
                break
        else:
            shape = width / height
            w = width if shape <= ratio[1] else round(height * ratio[1])
            h = height if shape >= ratio[0] else round(width / ratio[0])
            yield (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), [(224, 224), (300, 500), (100, 1000), (1000, 120)])
def test_rectangles_are_distributed_as_those_of_torchvision(height, width):
    number = 20_000
    drawn = np.asarray(jax.jit(crop_boxes)(KEY, jnp.full((number, 2), jnp.array([height, width]))), np.float64)
    expected = np.array(list(torchvision_boxes(np.random.default_rng(0), height, width, number)), np.float64)
    top, left, high, wide = drawn.T
    assert (top >= 0).all() and (left >= 0).all() and (top + high <= height).all() and (left + wide <= width).all()

    def figures(boxes):
        top, left, high, wide = boxes.T
        places = (top + high / 2) / height, (left + wide / 2) / width
        return {"area": high * wide / (height * width), "ratio": np.log(wide / high), "y": places[0], "x": places[1]}

    ours, theirs = figures(drawn), figures(expected)
    for name, values in ours.items():
        at = np.sort(theirs[name])
        below = (np.searchsorted(np.sort(one), at, "right") / number for one in (values, at))
        # The statistic of Kolmogorov and Smirnov: 0.02 for 20,000 each has a p value below 0.001.
        assert np.abs(np.subtract(*below)).max() < 0.02, name


def test_a_rectangle_that_never_fits_is_the_centre():
    boxes = crop_boxes(KEY, jnp.array([[10, 1000], [1000, 10], [40, 40]]), area=(1.0, 1.0), ratio=(3 / 4, 3 / 4))
    np.testing.assert_array_equal(boxes, [(0, 496, 10, 8), (493, 0, 13, 10), (0, 5, 40, 30)])


@pytest.mark.parametrize("side", [16, 32, 50])
def test_a_resized_crop_is_that_of_pillow(images, side):
    cut = jax.jit(random_resized_crop, static_argnums=2)(KEY, images, side)
    assert cut.shape == (64, side, side, 3) and cut.dtype == jnp.uint8
    boxes = np.asarray(crop_boxes(KEY, jnp.full((64, 2), 32))).tolist()
    for got, image, (top, left, height, width) in zip(np.asarray(cut), np.asarray(images), boxes, strict=True):
        box = (left, top, left + width, top + height)
        expected = Image.fromarray(image).crop(box).resize((side, side), Image.Resampling.BILINEAR)
        assert np.abs(got.astype(int) - np.asarray(expected)).max() <= 1


def test_a_crop_of_the_whole_image_is_the_image(images):
    np.testing.assert_array_equal(random_resized_crop(KEY, images, 32, (1.0, 1.0), (1.0, 1.0)), images)


def test_colors_are_those_of_pillow(images):
    """Within a level, as sums are rounded down; where three follow each other, nearly everywhere."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    drawn = np.random.default_rng(0).uniform(0.6, 1.4, (3, 64)).astype(np.float32)
    one_by_one = [np.where(np.arange(3)[:, None] == axis, drawn, np.float32(1)) for axis in range(3)]
    adjust = jax.jit(adjust_colors)
    for factors in (*one_by_one, drawn):
        changed = np.asarray(adjust(images, *jnp.asarray(factors).reshape(3, 64, 1, 1, 1)))
        expected = []
        for number, image in enumerate(np.asarray(images)):
            picture = Image.fromarray(image)
            for enhance, factor in zip(enhancers, factors[:, number].tolist(), strict=True):
                picture = enhance(picture).enhance(factor)
            expected.append(np.asarray(picture))
        difference = np.abs(changed.astype(int) - np.stack(expected))
        assert difference.max() <= (2 if factors is drawn else 1)
        assert (difference > 0).mean() < 1e-3


def test_color_jitter_changes_brightness_by_up_to_forty_percent():
    grey = jnp.full((500, 4, 4, 3), 100, jnp.uint8)  # contrast and saturation do not change an even grey
    levels = np.asarray(jax.jit(color_jitter)(KEY, grey))
    assert (levels == levels[:, :1, :1, :1]).all()
    assert levels.min() in (60, 61) and levels.max() in (138, 139) and 97 < levels[:, 0, 0, 0].mean() < 103
    np.testing.assert_array_equal(color_jitter(KEY, grey, 0.0), grey)


def test_padding_is_neither_mixed_in_nor_unmasked(images):
    """Rows of padding are augmented as the others, which do not depend on them."""
    function = jax.jit(image_augmentation(("random-resized-crop", "color-jitter", "flip")))
    mask = (jnp.arange(64) < 40).astype(jnp.float32)
    labels = jnp.arange(64, dtype=jnp.int32)
    batch = function(KEY, Batch(images, labels, mask))
    other = function(KEY, Batch(images.at[40:].set(images[0]), labels, mask))
    np.testing.assert_array_equal(batch.inputs[:40], other.inputs[:40])
    np.testing.assert_array_equal(batch.mask, mask)
    np.testing.assert_array_equal(batch.labels, labels)
