"""Parity of our jitted upsampling and preprocessing with Keras's."""

from functools import partial
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from cifar_jax import preprocess
from cifar_jax.data import Splits
from cifar_jax.models.preprocess import CAFFE, TORCH, Preprocessing

pytestmark = pytest.mark.parity

SIZE = 224


@pytest.fixture(scope="module")
def images(cifar10: Splits) -> np.ndarray:
    return cifar10.test.images[:64]


def upsample_with_keras(keras: ModuleType, images_u8: np.ndarray) -> Any:
    """Upsamples images with Keras; returns a tensor of its backend."""
    return keras.layers.UpSampling2D(SIZE // images_u8.shape[1])(images_u8.astype(np.float32))


def ours(mode: Preprocessing, images_u8: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(partial(preprocess, preprocessing=mode, image_size=SIZE))(images_u8))


@pytest.mark.parametrize("name", ["keras", "tf_keras"])
@pytest.mark.parametrize(
    "kind", ["tensor", "array"]
)  # Keras adds the negative mean to tensors and subtracts the mean from arrays
def test_caffe_is_bit_identical_to_keras(name: str, kind: str, libs: dict[str, ModuleType], images: np.ndarray) -> None:
    x = upsample_with_keras(libs[name], images)
    theirs = libs[name].applications.resnet50.preprocess_input(x if kind == "tensor" else np.array(x))
    np.testing.assert_array_equal(ours(CAFFE, images), np.asarray(theirs))


def test_torch_mode_agrees(keras: ModuleType, images: np.ndarray) -> None:
    theirs = np.asarray(
        keras.applications.imagenet_utils.preprocess_input(upsample_with_keras(keras, images), mode="torch")
    )
    assert np.abs(ours(TORCH, images) - theirs).max() <= 2e-7 * np.ptp(theirs)
