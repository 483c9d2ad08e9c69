"""The folded network matches the plain one, for every variant and on every platform's code path."""

import functools

import jax
import jax.export
import numpy as np
import pytest
from conftest import relative_difference

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


# Compiled as a whole, as that is quicker than operation by operation.
plain = jax.jit(extract, static_argnums=2)
folded = jax.jit(features_of)


@pytest.fixture(scope="module")
def backbone_of(shapes):
    """Makes the network of a configuration, each once."""
    return functools.cache(lambda config: make_backbone(shapes, config))


def make_backbone(shapes, config):
    """A calibrated network with some tiny variances, so that epsilon matters and folded kernels are large."""
    backbone = random_backbone(jax.random.key(0), shapes.images[:32], config, 64)
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
def test_folded_features_match_extract(backbone_of, shapes, name, platform):
    backbone, images = backbone_of(VARIANTS[name]), shapes.images[:4]
    features = folded(prepare(backbone, platform=platform), images)
    assert features.dtype == np.float32
    assert relative_difference(features, plain(backbone, images)) < 1e-5


@pytest.mark.parametrize("image_size", [32, 96])
def test_any_image_size(backbone_of, shapes, image_size):
    backbone, images = backbone_of(VARIANTS["four stages, odd width"]), shapes.images[:3]
    features = folded(prepare(backbone, image_size), images)
    assert relative_difference(features, plain(backbone, images, image_size)) < 1e-5


def test_epsilon_matters(backbone_of, shapes):
    backbone = backbone_of(SMALL)
    other = backbone.replace(config=ResNetConfig(stage_sizes=(1, 2), width=8, bn_epsilon=1e-3))
    images = shapes.images[:2]
    assert relative_difference(folded(prepare(other), images), plain(backbone, images)) > 1e-3


def test_bfloat16_is_close(backbone_of, shapes):
    backbone, images = backbone_of(SMALL), shapes.images[:4]
    features = folded(prepare(backbone, precision="bfloat16"), images)
    assert features.dtype == np.float32
    assert 1e-5 < relative_difference(features, plain(backbone, images)) < 0.05


def test_overflow_when_folding_raises(backbone_of):
    backbone = backbone_of(SMALL)
    huge = jax.tree.map(np.array, backbone.variables)
    huge["params"]["stage2_block1"]["bn3"]["scale"][:] = 3e38
    huge["batch_stats"]["stage2_block1"]["bn3"]["var"][:] = 1e-5
    with pytest.raises(RunError, match="overflows in stage2_block1/conv3/kernel"):
        prepare(backbone.replace(variables=huge))


@pytest.mark.parametrize(("platform", "lowered_for"), [("cpu", "cpu"), ("gpu", "cuda"), ("tpu", "tpu")])
def test_platform_argument_decides_the_lowering(backbone_of, shapes, platform, lowered_for):
    prepared = prepare(backbone_of(SMALL), platform=platform)
    program = jax.export.export(jax.jit(features_of), platforms=[lowered_for])(prepared, shapes.images[:2])
    assert ("reduce_window" in program.mlir_module()) == (platform != "cpu")
