"""Networks with random weights: the baseline that says what pretraining is worth."""

import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, PRNGKeyArray, UInt8

from cifar_jax.models.backbone import Backbone
from cifar_jax.models.preprocess import TORCH, preprocess
from cifar_jax.models.resnet import ResNet, ResNetConfig, Variables
from cifar_jax.pretrained.formats.native import to_bytes
from cifar_jax.pretrained.merge import Path, variable_shapes

# Names that `--weights` takes: full ResNet50 at ImageNet's size, and a quarter of its width at 64x64.
UNTRAINED = {
    "random": (ResNetConfig(stride_in_1x1=False, conv_bias=False, bn_epsilon=1e-5), 224),
    "random-w16": (ResNetConfig(width=16, stride_in_1x1=False, conv_bias=False, bn_epsilon=1e-5), 64),
}


def calibration_images(image_size: int) -> int:
    """How many images to calibrate on: enough that the last stage sees four thousand positions, at most 1024 images."""
    return min(1024, max(128, 4096 // (image_size // 32) ** 2))


def init_variables(key: PRNGKeyArray, config: ResNetConfig) -> Variables:
    """The variables of a network before any training: He-normal kernels (fan out), zero biases, unit BatchNorm.

    The kernels are cut from one long draw: a compiled draw for each of their shapes takes XLA twelve seconds.

    Reference:
      He et al. 2015, https://arxiv.org/abs/1502.01852
    """
    shapes = variable_shapes(config)
    kernels = {path: shape for path, shape in shapes.items() if path[-1] == "kernel"}
    ends = np.cumsum([math.prod(shape) for shape in kernels.values()])
    draws = np.split(np.asarray(jax.random.normal(key, (ends[-1],), jnp.float32)), ends[:-1])
    variables: dict[Path, np.ndarray] = {
        path: np.full(shape, 1.0 if path[-1] in ("scale", "var") else 0.0, np.float32) for path, shape in shapes.items()
    }
    for (path, shape), draw in zip(kernels.items(), draws, strict=True):
        fan_out = math.prod(shape[:-2]) * shape[-1]
        variables[path] = draw.reshape(shape) * np.float32(math.sqrt(2 / fan_out))
    return unflatten_dict(variables)


def random_backbone(
    key: PRNGKeyArray,
    images_u8: UInt8[np.ndarray, "n h w 3"],
    config: ResNetConfig,
    image_size: int,
    source: str = "random",
) -> Backbone:
    """A network with random kernels whose BatchNorm statistics are those of the given images.

    Without the statistics the activations of an untrained network shrink or grow layer by layer until the features are
    dead, and a baseline of dead features says nothing. In training mode every BatchNorm normalises by its batch, so one
    pass with momentum 0 leaves in each layer exactly the statistics that it saw, those of the layers below it applied.

    Args:
      key: draws the kernels.
      images_u8: the images to calibrate on; see `calibration_images`.
      config: the network.
      image_size: side in pixels that they are upsampled to.
      source: how the result is called.
    """

    @jax.jit
    def statistics_of(variables: Variables, images: Array) -> Variables:
        x = preprocess(images, TORCH, image_size)
        _, statistics = ResNet(config, bn_momentum=0.0).apply(variables, x, train=True, mutable=["batch_stats"])
        return dict(statistics)

    variables = init_variables(key, config)
    variables |= statistics_of(variables, jnp.asarray(images_u8))
    variant = "untrained, BatchNorm calibrated on training images"
    backbone = Backbone(config, TORCH, image_size, variables, source=source, variant=variant)
    return backbone.replace(sha256=hashlib.sha256(to_bytes(backbone)).hexdigest())
