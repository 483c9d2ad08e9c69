"""Pixels to network input: known values, channel order, exact repetition, refusal of what cannot be."""

import jax
import numpy as np
import pytest

from cifar_jax.preprocess import CAFFE, IDENTITY, MODES, TF, TORCH, preprocess

PIXEL = np.array([10, 100, 250], np.uint8)  # red, green, blue


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (CAFFE, np.float32([250, 100, 10]) - np.float32([103.939, 116.779, 123.68])),
        (TORCH, (np.array([10, 100, 250]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]),
        (TF, np.array([10, 100, 250]) / 127.5 - 1),
        (IDENTITY, np.array([10, 100, 250])),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_modes_of_one_pixel(mode, expected):
    images = np.broadcast_to(PIXEL, (1, 32, 32, 3))
    got = np.asarray(jax.jit(preprocess, static_argnums=(1, 2))(images, mode, 64))
    assert got.shape == (1, 64, 64, 3) and got.dtype == np.float32
    tolerance = 0 if mode in (CAFFE, IDENTITY) else 2e-7 * np.ptp([0.0, 4.8])
    np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), rtol=0, atol=tolerance)


@pytest.mark.parametrize("factor", [1, 2, 7])
def test_upsampling_repeats_every_pixel(noise, factor):
    got = preprocess(noise, IDENTITY, 32 * factor)
    np.testing.assert_array_equal(got, noise.repeat(factor, axis=1).repeat(factor, axis=2).astype(np.float32))


def test_compiled_is_bit_equal_to_plain_for_caffe(noise):
    compiled = jax.jit(preprocess, static_argnums=(1, 2))(noise, CAFFE, 224)
    plain = noise[..., ::-1].astype(np.float32) - np.array(CAFFE.mean, np.float32)
    np.testing.assert_array_equal(compiled, plain.repeat(7, axis=1).repeat(7, axis=2))


def test_modes_are_hashable_and_named():
    assert len(set(MODES.values())) == 4
    assert all(name == mode.name for name, mode in MODES.items())


@pytest.mark.parametrize("size", [48, 225, 16])
def test_size_that_is_no_multiple_is_refused(noise, size):
    with pytest.raises(ValueError, match="a multiple of 32"):
        preprocess(noise, CAFFE, size)


def test_floats_are_refused(noise):
    with pytest.raises(ValueError, match="uint8"):
        preprocess(noise.astype(np.float32), CAFFE, 32)
