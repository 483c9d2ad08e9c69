"""Preprocessing: known values, channel order, exact upsampling, refusal of invalid images."""

import jax
import numpy as np
import pytest

from cifar_jax import extract, load_backbone, make_extractor, predict_probs
from cifar_jax.models.preprocess import CAFFE, TORCH, Preprocessing, preprocess

IDENTITY = Preprocessing("identity")
PIXEL = np.array([10, 100, 250], np.uint8)  # red, green, blue


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (CAFFE, np.float32([250, 100, 10]) - np.float32([103.939, 116.779, 123.68])),
        (TORCH, (np.array([10, 100, 250]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_modes_on_one_pixel(mode, expected):
    images = np.broadcast_to(PIXEL, (1, 32, 32, 3))
    got = np.asarray(jax.jit(preprocess, static_argnums=(1, 2))(images, mode, 64))
    assert got.shape == (1, 64, 64, 3) and got.dtype == np.float32
    tolerance = 0 if mode == CAFFE else 2e-7 * np.ptp([0.0, 4.8])
    np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), rtol=0, atol=tolerance)


@pytest.mark.parametrize("factor", [1, 2, 7])
def test_upsampling_repeats_every_pixel(noise, factor):
    got = preprocess(noise, IDENTITY, 32 * factor)
    np.testing.assert_array_equal(got, noise.repeat(factor, axis=1).repeat(factor, axis=2).astype(np.float32))


def test_compiled_is_bit_equal_to_plain_for_caffe(noise):
    compiled = jax.jit(preprocess, static_argnums=(1, 2))(noise, CAFFE, 224)
    plain = noise[..., ::-1].astype(np.float32) - np.array(CAFFE.mean, np.float32)
    np.testing.assert_array_equal(compiled, plain.repeat(7, axis=1).repeat(7, axis=2))


@pytest.mark.parametrize("size", [48, 225, 16])
def test_non_multiple_size_is_refused(noise, size):
    with pytest.raises(ValueError, match="a multiple of 32"):
        preprocess(noise, CAFFE, size)


@pytest.mark.parametrize(
    ("change", "given"),
    [
        (lambda x: (x / 255).astype(np.float32), "got float32 [3, 32, 32, 3]; pass pixels in 0..255"),
        (lambda x: x.astype(np.int32), "got int32 [3, 32, 32, 3]"),
        (lambda x: x[..., :1], "got uint8 [3, 32, 32, 1]; convert grayscale"),
        (lambda x: x.transpose(0, 3, 1, 2), "got uint8 [3, 3, 32, 32]; move the channels to the end"),
        (lambda x: x[0], "got uint8 [32, 32, 3]; add a batch axis"),
        (lambda x: x[:0, ..., :2], "got uint8 [0, 32, 32, 2]"),
        (lambda x: x.tolist(), "got list"),
    ],
)
def test_invalid_images_are_refused(noise, change, given):
    """Covers every function that takes images, also under jit, where one channel would be broadcast to three."""
    images, backbone = change(noise), load_backbone("demo")
    takers = [lambda x: preprocess(x, CAFFE, 32), lambda x: extract(backbone, x, 32), make_extractor(backbone, 32)]
    takers.append(lambda x: predict_probs(backbone, [], x, 32))
    if isinstance(images, np.ndarray):
        takers.append(jax.jit(lambda x: preprocess(x, CAFFE, 32)))
    for take in takers:
        with pytest.raises(ValueError, match=r"^images must be .*uint8.* \[n, h, w, 3\], got") as caught:
            take(images)
        assert given in str(caught.value)


def test_preprocess_works_under_vmap(noise):
    one_by_one = jax.vmap(lambda x: preprocess(x[None], CAFFE, 64)[0])(noise)
    np.testing.assert_array_equal(one_by_one, preprocess(noise, CAFFE, 64))
