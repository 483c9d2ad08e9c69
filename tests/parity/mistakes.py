"""Mistakes in a converted network that do not prevent loading; parity checks must detect each of them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import pytest

import cifar_jax.models.resnet
from cifar_jax import Backbone
from cifar_jax.models.preprocess import TORCH

# (network, monkeypatch) -> the network with the mistake, or None if it would not be a mistake in this network.
Mistake = Callable[[Backbone, pytest.MonkeyPatch], Backbone | None]


def other_stride(backbone: Backbone, _: pytest.MonkeyPatch) -> Backbone:
    return _with_config(backbone, stride_in_1x1=not backbone.config.stride_in_1x1)


def other_padding(backbone: Backbone, _: pytest.MonkeyPatch) -> Backbone:
    return _with_config(backbone, pool_padding=1 - backbone.config.pool_padding)


def epsilon(value: float, backbone: Backbone, _: pytest.MonkeyPatch) -> Backbone | None:
    return None if backbone.config.bn_epsilon == value else _with_config(backbone, bn_epsilon=value)


def other_channels(backbone: Backbone, _: pytest.MonkeyPatch) -> Backbone:
    """Swaps RGB and BGR; every colour keeps its own mean and std."""
    right = backbone.preprocessing
    wrong = {"channels": "bgr" if right.channels == "rgb" else "rgb", "mean": right.mean[::-1], "std": right.std[::-1]}
    return _with_preprocessing(backbone, **wrong)


def no_mean(backbone: Backbone, _: pytest.MonkeyPatch) -> Backbone:
    return _with_preprocessing(backbone, mean=(0.0, 0.0, 0.0))


def other_scale(backbone: Backbone, _: pytest.MonkeyPatch) -> Backbone:
    return _with_preprocessing(backbone, scale=256.0 - backbone.preprocessing.scale)


def other_pixels(backbone: Backbone, _: pytest.MonkeyPatch) -> Backbone:
    """Uses the preprocessing of other files in the same format: torchvision's, or another from a config.json."""
    other = replace(TORCH, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return backbone.replace(preprocessing=other if backbone.preprocessing == TORCH else TORCH)


def swapped(places: tuple[tuple[str, str, str], tuple[str, str, str]], backbone: Backbone, _: object) -> Backbone:
    """Swaps two tensors of the same shape, so that the file still loads."""
    variables = jax.tree.map(lambda leaf: leaf, backbone.variables)
    (block, module, leaf), (other_block, other_module, other_leaf) = places
    one, other = variables["params"][block][module], variables["params"][other_block][other_module]
    assert one[leaf].shape == other[other_leaf].shape
    one[leaf], other[other_leaf] = other[other_leaf], one[leaf]
    return backbone.replace(variables=variables)


def variance_as_deviation(backbone: Backbone, _: pytest.MonkeyPatch) -> Backbone:
    """Squares the variances, as if they were the standard deviations that Keras 1's name `running_std` suggests."""

    def squared(path: tuple[Any, ...], leaf: Any) -> Any:
        return leaf**2 if path[-1].key == "var" else leaf

    return backbone.replace(variables=jax.tree_util.tree_map_with_path(squared, backbone.variables))


def same_convolutions(backbone: Backbone, patch: pytest.MonkeyPatch) -> Backbone:
    original = jax.lax.conv_general_dilated

    def same(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], _: object, **rest: Any) -> jax.Array:
        return original(x, kernel, strides, "SAME", **rest)

    patch.setattr(jax.lax, "conv_general_dilated", same)
    return backbone


def same_pool(backbone: Backbone, patch: pytest.MonkeyPatch) -> Backbone:
    original = cifar_jax.models.resnet.nn.max_pool
    patch.setattr(
        cifar_jax.models.resnet.nn, "max_pool", lambda *args, **rest: original(*args, **rest | {"padding": "SAME"})
    )
    return backbone


def _with_config(backbone: Backbone, **changes: Any) -> Backbone:
    return backbone.replace(config=replace(backbone.config, **changes))


def _with_preprocessing(backbone: Backbone, **changes: Any) -> Backbone:
    return backbone.replace(preprocessing=replace(backbone.preprocessing, **changes))


FIRST = "stage1_block1"  # its shortcut and its last convolution have the same shape
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
