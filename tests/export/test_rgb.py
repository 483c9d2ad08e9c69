"""Networks that take BGR as networks that take RGB."""

import jax.numpy as jnp
import numpy as np
import pytest
from untrained_runs import KERAS_LIKE, TORCH_LIKE, drawn_images, lively_backbone

from cifar_jax import extract
from cifar_jax.export.rgb import in_rgb, pixel_statistics
from cifar_jax.models.preprocess import CAFFE, TORCH


@pytest.mark.parametrize(("config", "preprocessing"), [(KERAS_LIKE, CAFFE), (TORCH_LIKE, TORCH)], ids=["bgr", "rgb"])
def test_network_in_rgb_is_the_same_function(config, preprocessing):
    backbone = lively_backbone(config, preprocessing, 32).replace(top={})
    found, images = in_rgb(backbone), jnp.asarray(drawn_images(4, 32))
    assert found.preprocessing.channels == "rgb" and found.top is None
    features = np.asarray(extract(found, images))
    np.testing.assert_allclose(features, extract(backbone, images), rtol=0, atol=1e-5)
    assert features.std(axis=0).mean() > 0.1  # they are alive


def test_pixels_are_normalised_in_one_step():
    mean, std = pixel_statistics(TORCH)
    pixels = np.arange(256, dtype=np.float32)[:, None]
    np.testing.assert_allclose((pixels - mean) / std, (pixels / 255 - TORCH.mean) / TORCH.std, rtol=0, atol=1e-6)
    assert mean.dtype == std.dtype == np.float32
