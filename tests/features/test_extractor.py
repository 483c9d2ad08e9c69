"""The extractor against the plain reference, for any number of images."""

import jax
import numpy as np
import pytest
from conftest import relative_difference
from helpers import NARROW

from cifar_jax.errors import RunError
from cifar_jax.features.extractor import make_extractor
from cifar_jax.models.backbone import FunctionBackbone, extract
from cifar_jax.pretrained import random_backbone

# A backbone that compiles at once.
MEANS = FunctionBackbone(lambda variables, images: images.astype(np.float32).mean((1, 2)), {}, "means")


@pytest.fixture(scope="module")
def backbone(shapes):
    return random_backbone(jax.random.key(0), shapes.images[:64], NARROW, 32)


@pytest.fixture(scope="module")
def plain_features(backbone, shapes):
    return np.asarray(jax.jit(extract)(backbone, shapes.images[:21]))


@pytest.mark.parametrize(("num", "batch_size"), [(1, 8), (8, 8), (21, 8), (5, None)])
def test_any_number_of_images_gives_the_plain_features(backbone, shapes, plain_features, num, batch_size):
    done: list[int] = []
    features = make_extractor(backbone, batch_size=batch_size)(shapes.images[:num], done.append)
    assert features.shape == (num, NARROW.features) and done[-1] == num
    assert relative_difference(features, plain_features[:num]) < 1e-5


def test_no_images_give_no_features(backbone, shapes):
    assert make_extractor(backbone)(shapes.images[:0]).shape == (0, NARROW.features)


def test_calibrated_features_are_alive(backbone, shapes):
    features = make_extractor(backbone)(shapes.images)
    assert (features.std(0) > 1e-3).mean() > 0.9


def test_features_carry_no_gradient(backbone, shapes):
    def total(variables):
        return extract(backbone.replace(variables=variables), shapes.images[:2]).sum()

    grads = jax.jit(jax.grad(total))(backbone.variables)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


def test_two_files_of_one_network_share_a_compiled_function(backbone, shapes):
    # A function of its own: what was compiled of `extract` itself is shared by all tests of the process.
    run = jax.jit(lambda backbone, images: extract(backbone, images))
    run(backbone, shapes.images[:2])
    run(backbone.replace(sha256="another", source="elsewhere"), shapes.images[:2])
    assert run._cache_size() == 1


def test_broken_weights_are_noticed(backbone, shapes):
    variables = jax.tree.map(np.array, backbone.variables)
    variables["params"]["stage1_block1"]["conv2"]["kernel"][0, 0, 0, 0] = np.nan
    with pytest.raises(RunError, match="non-finite values in params/stage1_block1/conv2/kernel"):
        make_extractor(backbone.replace(variables=variables))


def test_features_that_overflow_are_noticed(backbone, shapes):
    huge = jax.tree.map(np.array, backbone.variables)
    block = huge["params"]["stage2_block1"]
    block["bn3"]["bias"][:] = block["bn_proj"]["bias"][:] = 3e38
    with pytest.raises(RunError, match="non-finite features for images 0 to 3"):
        make_extractor(backbone.replace(variables=huge))(shapes.images[:4])


def test_each_extractor_compiles_once(shapes):
    traced = []

    def means(variables, images):
        traced.append(images.shape)
        return images.astype(np.float32).mean((1, 2))

    extractor = make_extractor(FunctionBackbone(means, {}, "means"), batch_size=8)
    for num in (21, 8, 40):
        extractor(shapes.images[:num])
    assert traced.count((8, *shapes.images.shape[1:])) == 1
