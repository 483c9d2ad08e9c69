"""The network of a classifier as one that takes RGB, for formats that keep its layers as they are."""

from dataclasses import replace

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float32

from cifar_jax.models.backbone import Backbone
from cifar_jax.models.preprocess import Preprocessing

STEM = ("params", "stem_conv", "kernel")  # path of the first kernel, [7, 7, in, out]


def in_rgb(backbone: Backbone) -> Backbone:
    """Returns the same function of RGB pixels as a network whose own channels are RGB.

    Of a network that takes BGR, the channels of the first kernel, the mean and the standard deviation are reversed. It
    has no classifier of its own.
    """
    given = backbone.preprocessing
    if given.channels == "rgb":
        return backbone.replace(top=None)
    variables = flatten_dict(backbone.variables)
    variables[STEM] = np.ascontiguousarray(np.asarray(variables[STEM])[:, :, ::-1])
    preprocessing = replace(given, channels="rgb", mean=given.mean[::-1], std=given.std[::-1])
    return backbone.replace(variables=unflatten_dict(variables), preprocessing=preprocessing, top=None)


def pixel_statistics(preprocessing: Preprocessing) -> tuple[Float32[np.ndarray, "3"], Float32[np.ndarray, "3"]]:
    """Mean and standard deviation with which pixels in 0..255 are normalised in one step, `(pixel - mean) / std`."""
    mean, std = np.array((preprocessing.mean, preprocessing.std)) * preprocessing.scale
    return mean.astype(np.float32), std.astype(np.float32)
