"""Tensor names of the ResNets in Hugging Face's transformers, as data.

`ResNetModel` uses the names below; `ResNetForImageClassification` adds the prefix `resnet.` and a classifier.
"""

import re
from collections.abc import Collection

from cifar_jax.pretrained.merge import Path
from cifar_jax.pretrained.names.torch import tensor_names

PREFIX = "resnet."
TOP = ("classifier.1.weight", "classifier.1.bias")

BLOCK = re.compile(r"encoder\.stages\.(\d{1,3})\.layers\.(\d{1,3})\.layer\.0\.convolution\.weight")
BOTTLENECK = "encoder.stages.0.layers.0.layer.2.convolution.weight"  # absent in the basic blocks of ResNet18

_STEM = {"stem_conv": "embedder.embedder.convolution", "stem_bn": "embedder.embedder.normalization"}
_BLOCK = {
    "conv1": "layer.0.convolution",
    "bn1": "layer.0.normalization",
    "conv2": "layer.1.convolution",
    "bn2": "layer.1.normalization",
    "conv3": "layer.2.convolution",
    "bn3": "layer.2.normalization",
    "conv_proj": "shortcut.convolution",
    "bn_proj": "shortcut.normalization",
}


def name_map(stage_sizes: tuple[int, ...]) -> dict[Path, str]:
    """Returns the tensor name by path, for every variable that the network may have."""
    return tensor_names(stage_sizes, _STEM, _BLOCK, lambda stage, block: f"encoder.stages.{stage}.layers.{block}")


def known_names(names: Collection[str]) -> dict[str, str]:
    """Maps a file's names to those of this module, without the prefix if all but the classifier's have it."""
    inside = [name for name in names if name not in TOP]
    if inside and all(name.startswith(PREFIX) for name in inside):
        return {name: name.removeprefix(PREFIX) for name in names}
    return {name: name for name in names}
