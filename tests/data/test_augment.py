"""Tests of the augmentations: their effects on images, and their dependence on the key alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax.data.augment import AUGMENTATIONS, GREY, augment, cutout, random_crop, random_flip

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
    changed = jax.jit(lambda key: augment(key, images, ("flip", "crop", "cutout")))
    first, again, other = (changed(jax.random.fold_in(KEY, step)) for step in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.asarray(first != other).any()


def test_augmentations_draw_independently(images):
    np.testing.assert_array_equal(
        augment(KEY, images, ("crop", "flip")),
        AUGMENTATIONS["crop"](jax.random.fold_in(KEY, 1), augment(KEY, images, ("flip",))),
    )
    np.testing.assert_array_equal(augment(KEY, images, ()), images)
