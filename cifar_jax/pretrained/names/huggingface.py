"""What Hugging Face's transformers call the tensors of their ResNets, as data.

`ResNetModel` has them as they are here, `ResNetForImageClassification` behind `resnet.` and with a classifier.
"""

import re
from collections.abc import Collection

from cifar_jax.pretrained.merge import Path
from cifar_jax.pretrained.names.torch import tensor_names

PREFIX = "resnet."
TOP = ("classifier.1.weight", "classifier.1.bias")

BLOCK = re.compile(r"encoder\.stages\.(\d{1,3})\.layers\.(\d{1,3})\.layer\.0\.convolution\.weight")
BOTTLENECK = "encoder.stages.0.layers.0.layer.2.convolution.weight"  # which the blocks of ResNet18 do not have

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
    """For each variable that the network may have the tensor that fills it."""
    return tensor_names(stage_sizes, _STEM, _BLOCK, lambda stage, block: f"encoder.stages.{stage}.layers.{block}")


def known_names(names: Collection[str]) -> dict[str, str]:
    """For each name of a file the one in this module: the prefix taken off, if all but the classifier's have it."""
    inside = [name for name in names if name not in TOP]
    if inside and all(name.startswith(PREFIX) for name in inside):
        return {name: name.removeprefix(PREFIX) for name in names}
    return {name: name for name in names}
