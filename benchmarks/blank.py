"""A network whose values are of no account, as what is compiled, counted or timed does not depend on them."""

import numpy as np
from flax.traverse_util import unflatten_dict

from cifar_jax.models.preprocess import CAFFE
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained import Backbone
from cifar_jax.pretrained.merge import variable_shapes


def blank_backbone(config: ResNetConfig, image_size: int) -> Backbone:
    """A backbone of zeros."""
    shapes = variable_shapes(config).items()
    variables = unflatten_dict({path: np.zeros(shape, np.float32) for path, shape in shapes})
    return Backbone(config, CAFFE, image_size, variables)
