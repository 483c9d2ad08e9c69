"""What a converted network may have got wrong and still load: each of these must be seen by whoever compares."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import pytest

import cifar_jax.models.resnet
from cifar_jax import Backbone
from cifar_jax.models.preprocess import TORCH

# A network and a patcher of its code -> the network with the mistake, or None where it would be none.
Mistake = Callable[[Backbone, pytest.MonkeyPatch], Backbone | None]


def other_stride(backbone: Backbone, _: pytest.MonkeyPatch) -> Backbone:
    return _reconfigured(backbone, stride_in_1x1=not backbone.config.stride_in_1x1)


def other_padding(backbone: Backbone, _: pytest.MonkeyPatch) -> Backbone:
    return _reconfigured(backbone, pool_padding=1 - backbone.config.pool_padding)


def epsilon(value: float, backbone: Backbone, _: pytest.MonkeyPatch) -> Backbone | None:
    return None if backbone.config.bn_epsilon == value else _reconfigured(backbone, bn_epsilon=value)


def other_channels(backbone: Backbone, _: pytest.MonkeyPatch) -> Backbone:
    """RGB for BGR or the reverse; every colour keeps its own mean and deviation."""
    usual = backbone.preprocessing
    turned = {"channels": "bgr" if usual.channels == "rgb" else "rgb", "mean": usual.mean[::-1], "std": usual.std[::-1]}
    return _repixelled(backbone, **turned)


def no_mean(backbone: Backbone, _: pytest.MonkeyPatch) -> Backbone:
    return _repixelled(backbone, mean=(0.0, 0.0, 0.0))


def other_scale(backbone: Backbone, _: pytest.MonkeyPatch) -> Backbone:
    return _repixelled(backbone, scale=256.0 - backbone.preprocessing.scale)


def other_pixels(backbone: Backbone, _: pytest.MonkeyPatch) -> Backbone:
    """That of other files of the same form: torchvision's, or another that a config.json may describe."""
    usual = replace(TORCH, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return backbone.replace(preprocessing=usual if backbone.preprocessing == TORCH else TORCH)


def swapped(places: tuple[tuple[str, str, str], tuple[str, str, str]], backbone: Backbone, _: object) -> Backbone:
    """Two tensors that have one shape, so that the file loads."""
    variables = jax.tree.map(lambda leaf: leaf, backbone.variables)
    (block, module, leaf), (other_block, other_module, other_leaf) = places
    one, other = variables["params"][block][module], variables["params"][other_block][other_module]
    assert one[leaf].shape == other[other_leaf].shape
    one[leaf], other[other_leaf] = other[other_leaf], one[leaf]
    return backbone.replace(variables=variables)


def variance_as_deviation(backbone: Backbone, _: pytest.MonkeyPatch) -> Backbone:
    """What Keras 1's name for the variance, `running_std`, suggests."""

    def squared(path: tuple[Any, ...], leaf: Any) -> Any:
        return leaf**2 if path[-1].key == "var" else leaf

    return backbone.replace(variables=jax.tree_util.tree_map_with_path(squared, backbone.variables))


def same_convolutions(backbone: Backbone, patch: pytest.MonkeyPatch) -> Backbone:
    usual = jax.lax.conv_general_dilated

    def same(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], _: object, **rest: Any) -> jax.Array:
        return usual(x, kernel, strides, "SAME", **rest)

    patch.setattr(jax.lax, "conv_general_dilated", same)
    return backbone


def same_pool(backbone: Backbone, patch: pytest.MonkeyPatch) -> Backbone:
    usual = cifar_jax.models.resnet.nn.max_pool
    patch.setattr(
        cifar_jax.models.resnet.nn, "max_pool", lambda *args, **rest: usual(*args, **rest | {"padding": "SAME"})
    )
    return backbone


def _reconfigured(backbone: Backbone, **changes: Any) -> Backbone:
    return backbone.replace(config=replace(backbone.config, **changes))


def _repixelled(backbone: Backbone, **changes: Any) -> Backbone:
    return backbone.replace(preprocessing=replace(backbone.preprocessing, **changes))


FIRST = "stage1_block1"  # whose shortcut and last convolution have one shape
MISTAKES: dict[str, Mistake] = {
    "the other stride": other_stride,
    "epsilon 1e-5": partial(epsilon, 1e-5),
    "epsilon 1.001e-5": partial(epsilon, 1.001e-5),
    "epsilon 1e-3": partial(epsilon, 1e-3),
    "the other padding of the max-pool": other_padding,
    "convolutions padded by SAME": same_convolutions,
    "max-pool padded by SAME": same_pool,
    "channels in the other order": other_channels,
    "mean not subtracted": no_mean,
    "pixels on the other scale": other_scale,
    "pixels of another file": other_pixels,
    "shortcut and last convolution swapped": partial(
        swapped, ((FIRST, "conv_proj", "kernel"), (FIRST, "conv3", "kernel"))
    ),
    "convolutions of two blocks swapped": partial(
        swapped, (("stage4_block2", "conv2", "kernel"), ("stage4_block3", "conv2", "kernel"))
    ),
    "scale and shift swapped": partial(swapped, ((FIRST, "bn2", "scale"), (FIRST, "bn2", "bias"))),
    "variance taken for a deviation": variance_as_deviation,
}
