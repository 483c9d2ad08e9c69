"""The network: published parameter counts, shapes, padding, dtypes, BatchNorm statistics."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax.models.resnet import Conv, ResNet, ResNetConfig
from cifar_jax.pretrained.merge import variable_shapes
from cifar_jax.pretrained.random_init import init_variables

NARROW = ResNetConfig(stage_sizes=(1, 2), width=4)


@pytest.fixture(scope="module")
def variables():
    return init_variables(jax.random.key(0), NARROW)


def apply(network, variables, images):
    return jax.jit(network.apply)(variables, images)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (4, 32, 32, 3))


@pytest.mark.parametrize(
    ("config", "params", "statistics"),
    [
        (ResNetConfig(), 23_534_592, 53_120),  # Keras: 23,587,712 in all
        # torchvision's resnet50 has 25,557,032 parameters, of which its fc has 2,049,000.
        (ResNetConfig(conv_bias=False, stride_in_1x1=False, bn_epsilon=1e-5), 25_557_032 - 2_049_000, 53_120),
    ],
    ids=["keras", "torchvision"],
)
def test_parameter_counts_match_published_networks(config, params, statistics):
    sizes = {"params": 0, "batch_stats": 0}
    for path, shape in variable_shapes(config).items():
        sizes[path[0]] += math.prod(shape)
    assert sizes == {"params": params, "batch_stats": statistics}


def test_stage_shapes_of_resnet50_at_224():
    out = jax.eval_shape(
        lambda: ResNet(ResNetConfig()).init_with_output(jax.random.key(0), jnp.zeros((2, 224, 224, 3)))[0]
    )
    assert [stage.shape for stage in out.stages] == [
        (2, 56, 56, 256),
        (2, 28, 28, 512),
        (2, 14, 14, 1024),
        (2, 7, 7, 2048),
    ]
    assert out.pooled.shape == (2, 2048)


def test_unpadded_pool_gives_55():
    config = ResNetConfig(stage_sizes=(1,), pool_padding=0)
    out = jax.eval_shape(lambda: ResNet(config).init_with_output(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))[0])
    assert out.stages[0].shape == (1, 55, 55, 256)


def test_pooled_is_the_mean_of_the_last_stage(variables, images):
    out = apply(ResNet(NARROW), variables, images)
    np.testing.assert_allclose(out.pooled, np.asarray(out.stages[-1]).mean((1, 2)), rtol=1e-6)


@pytest.mark.parametrize("as_dot", [False, True])
@pytest.mark.parametrize("side", [2, 8])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 7])
def test_conv_matches_flax(as_dot, side, stride, size):
    x = jax.random.normal(jax.random.key(0), (2, side, side, 5))
    pad = ((size // 2, size // 2),) * 2
    reference = nn.Conv(6, (size, size), (stride, stride), padding=pad, bias_init=nn.initializers.normal(1.0))
    variables = reference.init(jax.random.key(1), x)
    ours = Conv(6, size, stride, True, as_dot, jnp.dtype("float32"), jax.lax.Precision.HIGHEST)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(1), x)) == jax.tree.map(jnp.shape, variables)
    np.testing.assert_allclose(ours.apply(variables, x), reference.apply(variables, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [{"stride_in_1x1": False}, {"bn_epsilon": 1e-2}, {"pool_padding": 0}])
def test_each_detail_of_the_variant_changes_the_output(variables, images, change):
    network = apply(ResNet(NARROW), variables, images).pooled
    other = apply(ResNet(dataclasses.replace(NARROW, **change)), variables, images).pooled
    assert float(jnp.abs(network - other).max() / jnp.abs(network).max()) > 1e-4


def test_padding_is_symmetric(variables, images):
    """A network with point-symmetric kernels commutes with a rotation of the image by 180 degrees.

    With `SAME` it would not, because `SAME` at stride 2 pads one side only.
    """
    symmetric = jax.tree.map(
        lambda leaf: (leaf + leaf[::-1, ::-1]) / 2 if leaf.ndim == 4 else leaf, variables["params"]
    )
    config = dataclasses.replace(NARROW, stage_sizes=(1,))
    params = {name: leaf for name, leaf in symmetric.items() if not name.startswith("stage2")}
    statistics = {name: leaf for name, leaf in variables["batch_stats"].items() if not name.startswith("stage2")}
    network = ResNet(config)
    # 33 pixels: with an odd side the strided grid itself is symmetric.
    images = jnp.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="reflect")
    plain = apply(network, {"params": params, "batch_stats": statistics}, images).stages[0]
    rotated = apply(network, {"params": params, "batch_stats": statistics}, images[:, ::-1, ::-1]).stages[0]
    np.testing.assert_allclose(rotated[:, ::-1, ::-1], plain, rtol=1e-4, atol=1e-5)


def test_training_mode_updates_statistics_like_keras(variables, images):
    _, updated = ResNet(NARROW, bn_momentum=0.9).apply(variables, images, train=True, mutable=["batch_stats"])
    stem = np.asarray(
        jax.lax.conv_general_dilated(
            images, variables["params"]["stem_conv"]["kernel"], (2, 2), ((3, 3), (3, 3)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    )  # fmt: skip
    statistics = updated["batch_stats"]["stem_bn"]
    np.testing.assert_allclose(statistics["mean"], 0.1 * stem.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    # The biased variance: divided by n, not n - 1.
    np.testing.assert_allclose(statistics["var"], 0.9 + 0.1 * stem.var((0, 1, 2)), rtol=1e-5)


def test_evaluation_mode_keeps_statistics(variables, images):
    _, updated = ResNet(NARROW).apply(variables, images, mutable=["batch_stats"])
    for old, new in zip(jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(updated), strict=True):
        np.testing.assert_array_equal(old, new)


def test_bfloat16_activations_give_float32_features(variables, images):
    exact = apply(ResNet(NARROW), variables, images)
    rough = apply(ResNet(NARROW, dtype=jnp.dtype("bfloat16")), variables, images)
    assert rough.stages[0].dtype == jnp.bfloat16 and rough.pooled.dtype == jnp.float32
    difference = float(jnp.abs(rough.pooled - exact.pooled).max() / jnp.abs(exact.pooled).max())
    assert 1e-5 < difference < 5e-2


def test_init_is_he_normal():
    variables = init_variables(jax.random.key(0), ResNetConfig(width=16))
    kernel = variables["params"]["stage2_block1"]["conv2"]["kernel"]
    assert kernel.std() == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.05)
    assert variables["params"]["stem_bn"]["scale"].min() == 1
