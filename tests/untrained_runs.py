"""Runs with drawn weights that reveal mistakes, for tests of what is exported from a run, without training."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import UInt8

from cifar_jax import TrainConfig
from cifar_jax.data.resize import Resize
from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.models.backbone import Backbone
from cifar_jax.models.head import dense_head
from cifar_jax.models.preprocess import CAFFE, TORCH, Preprocessing, preprocess
from cifar_jax.models.resnet import ResNet, ResNetConfig
from cifar_jax.pretrained.random_init import init_variables
from cifar_jax.runs.reader import Run

KERAS_LIKE = ResNetConfig(stage_sizes=(1, 2), width=6)
TORCH_LIKE = replace(KERAS_LIKE, stride_in_1x1=False, conv_bias=False, bn_epsilon=1e-5)
CLASSES = ("cat", "dog", "Käfer, grün")


def drawn_images(num: int, side: int) -> UInt8[np.ndarray, "num side side 3"]:
    """Draws shapes and brings them to another side by repeating and cutting off pixels."""
    images, _ = draw_shapes(num, seed=3)
    times = -(-side // 32)
    return np.ascontiguousarray(images.repeat(times, axis=1).repeat(times, axis=2)[:, :side, :side])


def lively_backbone(config: ResNetConfig, preprocessing: Preprocessing, image_size: int, num: int = 16) -> Backbone:
    """Draws a network whose BatchNorm has the statistics of drawn images, so that its features are alive.

    A quarter of the channels is faint, so that an epsilon that is wrong by a thousandth shows.
    """
    rng = np.random.default_rng(0)
    variables = flatten_dict(init_variables(jax.random.key(0), config))
    for path, value in variables.items():
        if path[-1] == "kernel":
            faint = np.where(rng.random(value.shape[-1]) < 0.25, 10 ** rng.uniform(-3, -1, value.shape[-1]), 1)
            variables[path] = np.float32(value * faint)
        elif path[-1] == "scale":
            variables[path] = rng.uniform(0.5, 1.5, value.shape).astype(np.float32)
        elif path[-1] == "bias":
            variables[path] = rng.normal(0.1, 0.2, value.shape).astype(np.float32)

    @jax.jit
    def statistics(variables, images):
        x = preprocess(images, preprocessing, image_size)
        return ResNet(config, bn_momentum=0.0).apply(variables, x, train=True, mutable=["batch_stats"])[1]

    found = unflatten_dict(variables)
    found |= jax.device_get(dict(statistics(found, jnp.asarray(drawn_images(num, image_size)))))
    return Backbone(config, preprocessing, image_size, found, source="drawn", sha256="0" * 64)


def run_with(backbone: Backbone, resize: Resize, hidden: tuple[int, ...], classes: tuple[str, ...] = CLASSES) -> Run:
    """Makes a run of a network with a drawn head, as `load_run` would return it."""
    head, rng = dense_head(hidden), np.random.default_rng(1)
    params = jax.device_get(head.init(jax.random.key(1), backbone.num_features, len(classes)))
    params = tuple(layer | {"bias": rng.normal(0, 0.3, layer["bias"].shape).astype(np.float32)} for layer in params)
    summary = {"dataset": {"class_names": list(classes), "test_sha256": "1" * 64}, "test_accuracy": 0.5}
    config = TrainConfig(dataset="shapes", hidden=hidden)
    return Run(Path("drawn"), config, summary, backbone, params, classes, resize, head)


def drawn_run(
    config: ResNetConfig, side: int = 64, upsampled: bool = False, hidden: tuple[int, ...] = (), num: int = 16
) -> Run:
    """Makes a run of a network with a drawn head on images of `side` pixels, upsampled twice or not.

    Networks that stride in their first 1x1 convolution and have biases take BGR, as Keras's do.
    """
    preprocessing = CAFFE if config.stride_in_1x1 and config.conv_bias else TORCH
    resize = Resize("upsample", side) if upsampled else Resize("eval-transform", side, side + side // 7, "bicubic")
    return run_with(lively_backbone(config, preprocessing, side * (1 + upsampled), num), resize, hidden)
