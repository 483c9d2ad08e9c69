"""Networks with random weights, the baseline for the value of pretraining."""

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
from cifar_jax.pretrained.formats.safetensors_file import to_bytes
from cifar_jax.pretrained.merge import Path, variable_shapes

# Names accepted by `--weights`: a full ResNet50 at ImageNet's image size, and one of a quarter of the width at 64x64.
UNTRAINED = {
    "random": (ResNetConfig(stride_in_1x1=False, conv_bias=False, bn_epsilon=1e-5), 224),
    "random-w16": (ResNetConfig(width=16, stride_in_1x1=False, conv_bias=False, bn_epsilon=1e-5), 64),
}


def calibration_images(image_size: int) -> int:
    """Returns the number of calibration images: enough for 4096 positions in the last stage, 128 to 1024 images."""
    side = -(-image_size // 32)  # of the last stage
    return min(1024, max(128, 4096 // side**2))


def init_variables(key: PRNGKeyArray, config: ResNetConfig) -> Variables:
    """Initialises the variables of a network: He-normal kernels (fan out), zero biases, unit BatchNorm.

    All kernels are slices of one long draw, because compiling a draw for each shape takes XLA twelve seconds.

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
    """Initialises a network with random kernels and calibrates its BatchNorm statistics on the given images.

    Without calibration the activations of an untrained network shrink or grow layer by layer until the features are
    dead, which makes a useless baseline. In training mode every BatchNorm normalises by its batch, so one pass with
    momentum 0 stores in each layer exactly the statistics of its input, given those of the layers below.

    Args:
      key: PRNG key for the kernels.
      images_u8: the calibration images; see `calibration_images`.
      config: the network.
      image_size: side in pixels that the images are upsampled to.
      source: name of the result, recorded as its source.
    """

    @jax.jit
    def compute_statistics(variables: Variables, images: Array) -> Variables:
        x = preprocess(images, TORCH, image_size)
        _, statistics = ResNet(config, bn_momentum=0.0).apply(variables, x, train=True, mutable=["batch_stats"])
        return dict(statistics)

    variables = init_variables(key, config)
    variables |= compute_statistics(variables, jnp.asarray(images_u8))
    variant = "untrained, BatchNorm calibrated on training images"
    backbone = Backbone(config, TORCH, image_size, variables, source=source, variant=variant)
    return backbone.replace(sha256=hashlib.sha256(to_bytes(backbone)).hexdigest())
