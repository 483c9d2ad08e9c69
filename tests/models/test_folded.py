"""The folded network matches the plain one, for every variant and on every platform's code path."""

import functools

import jax
import jax.export
import numpy as np
import pytest
from conftest import relative_difference

from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.errors import RunError
from cifar_jax.models.backbone import extract
from cifar_jax.models.folded import features_of, prepare
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained import random_backbone

SMALL = ResNetConfig(stage_sizes=(1, 2), width=8)
VARIANTS = {
    "keras": SMALL,
    "stride in 3x3, no bias": ResNetConfig(stage_sizes=(1, 2), width=8, stride_in_1x1=False, conv_bias=False),
    "unpadded pool": ResNetConfig(stage_sizes=(1, 2), width=8, pool_padding=0),
    "four stages, odd width": ResNetConfig(stage_sizes=(1, 1, 1, 1), width=5, stride_in_1x1=False),
}


IMAGES = draw_shapes(32, seed=0)[0]
plain_features = jax.jit(extract, static_argnums=2)


@functools.cache
def make_backbone(config):
    """Makes a calibrated network with some tiny variances, so that epsilon matters and folded kernels are large."""
    backbone = random_backbone(jax.random.key(0), IMAGES, config, 64)
    variables = jax.tree.map(np.array, backbone.variables)
    params, stats = variables["params"], variables["batch_stats"]
    for conv, norm, where in (
        ("stem_conv", "stem_bn", (params, stats)),
        ("conv2", "bn2", (params["stage1_block1"], stats["stage1_block1"])),
    ):
        kernel, stat = where[0][conv]["kernel"], where[1][norm]
        shrink = np.sqrt(1e-5 / stat["var"][:3])  # scales the layer's output as well, so that it stays of order one
        kernel[..., :3] *= shrink
        if "bias" in where[0][conv]:
            where[0][conv]["bias"][:3] *= shrink
        stat["mean"][:3] *= shrink
        stat["var"][:3] = 1e-5
    return backbone.replace(variables=variables)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # all but the CPU share a code path
@pytest.mark.parametrize("name", VARIANTS)
def test_folded_features_match_extract(name, platform):
    backbone, images = make_backbone(VARIANTS[name]), IMAGES[:4]
    features = jax.jit(features_of)(prepare(backbone, platform=platform), images)
    assert features.dtype == np.float32
    assert relative_difference(features, plain_features(backbone, images)) < 1e-5


def test_image_size_is_an_argument():
    backbone, images, image_size = make_backbone(VARIANTS["four stages, odd width"]), IMAGES[:3], 96
    features = jax.jit(features_of)(prepare(backbone, image_size), images)
    assert relative_difference(features, plain_features(backbone, images, image_size)) < 1e-5


@pytest.mark.parametrize("stride_in_1x1", [False, True])
@pytest.mark.parametrize(("image_size", "platform"), [(56, "cpu"), (84, "tpu"), (100, "cpu"), (197, "cpu")])
def test_image_size_need_not_be_a_multiple_of_32(image_size, platform, stride_in_1x1):
    """Feature maps have odd sides somewhere on the way."""
    backbone = make_backbone(ResNetConfig((1, 1, 1, 1), 4, stride_in_1x1=stride_in_1x1))
    images = np.random.default_rng(0).integers(0, 256, (2, image_size, image_size, 3), np.uint8)
    features = jax.jit(features_of)(prepare(backbone, image_size, platform=platform), images)
    assert relative_difference(features, plain_features(backbone, images, image_size)) < 1e-5


def test_epsilon_matters():
    backbone = make_backbone(SMALL)
    other = backbone.replace(config=ResNetConfig(stage_sizes=(1, 2), width=8, bn_epsilon=1e-3))
    images = IMAGES[:2]
    assert relative_difference(jax.jit(features_of)(prepare(other), images), plain_features(backbone, images)) > 1e-3


def test_bfloat16_is_close():
    backbone, images = make_backbone(SMALL), IMAGES[:4]
    features = jax.jit(features_of)(prepare(backbone, precision="bfloat16"), images)
    assert features.dtype == np.float32
    assert 1e-5 < relative_difference(features, plain_features(backbone, images)) < 0.05


def test_overflow_when_folding_raises():
    backbone = make_backbone(SMALL)
    huge = jax.tree.map(np.array, backbone.variables)
    huge["params"]["stage2_block1"]["bn3"]["scale"][:] = 3e38
    huge["batch_stats"]["stage2_block1"]["bn3"]["var"][:] = 1e-5
    with pytest.raises(RunError, match="overflows in stage2_block1/conv3/kernel"):
        prepare(backbone.replace(variables=huge))


@pytest.mark.parametrize(("platform", "lowered_for"), [("cpu", "cpu"), ("gpu", "cuda"), ("tpu", "tpu")])
def test_platform_argument_decides_the_lowering(platform, lowered_for):
    prepared = prepare(make_backbone(SMALL), platform=platform)
    program = jax.export.export(jax.jit(features_of), platforms=[lowered_for])(prepared, IMAGES[:2])
    assert ("reduce_window" in program.mlir_module()) == (platform != "cpu")
