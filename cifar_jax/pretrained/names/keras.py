"""Tensor names of Keras's ResNets, as data.

There are two families of names: `keras` is used by keras-applications since 1.0.8 and by every later Keras,
`keras-2016` by the files of 2016 and by Keras up to 2.2. Tensors are mapped by name, not by order: `_0_conv` (the
shortcut) and `_3_conv` of a stage's first block have the same shape, and their order changed between Keras versions.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from cifar_jax.models.resnet import block_name
from cifar_jax.pretrained.merge import Path

# Today's tensor names in a layer, and the collection and name of the variable that each fills.
CONV_TENSORS = {"kernel": ("params", "kernel"), "bias": ("params", "bias")}
NORM_TENSORS = {
    "gamma": ("params", "scale"),
    "beta": ("params", "bias"),
    "moving_mean": ("batch_stats", "mean"),
    "moving_variance": ("batch_stats", "var"),
}

# Tensor names of Keras 1. Its `running_std` holds the variance, as its source code shows.
OLDEST_TENSORS = {
    "W": "kernel",
    "b": "bias",
    "running_mean": "moving_mean",
    "running_std": "moving_variance",
}

# Classifier layers: `probs` in the published file, `predictions` in files of today's Keras, `fc1000` in those of 2016.
TOP_LAYERS = ("predictions", "probs", "fc1000")

_BLOCK = {
    "keras": re.compile(r"conv(\d{1,3})_block(\d{1,3})_1_conv"),
    "keras-2016": re.compile(r"res(\d{1,3})([a-z])_branch2a"),
}
_STEM = {"keras": "conv1_conv", "keras-2016": "conv1"}


def detect_family(layers: Iterable[str]) -> str | None:
    """Returns the family of a file's layer names, or None if it is unknown."""
    layers = set(layers)
    for family, stem in _STEM.items():
        if stem in layers and any(_BLOCK[family].fullmatch(layer) for layer in layers):
            return family
    return None


def detect_stage_sizes(layers: Iterable[str], family: str) -> tuple[int, ...]:
    """Counts the blocks of each stage by the names of their first convolutions."""
    return count_blocks(layers, _BLOCK[family])


def count_blocks(names: Iterable[str], pattern: re.Pattern[str]) -> tuple[int, ...]:
    """Counts the names that match a pattern for each value of its first group, the number of the stage."""
    found = (match for name in set(names) if (match := pattern.fullmatch(name)))
    blocks = Counter(int(match[1]) for match in found)
    return tuple(blocks[stage] for stage in sorted(blocks))


def name_map(stage_sizes: tuple[int, ...], family: str) -> dict[Path, str]:
    """Returns the Keras tensor name `layer/tensor` by path, for every variable that the network may have."""
    names: dict[Path, str] = {}
    for module, layer in _layers(stage_sizes, family):
        tensors = NORM_TENSORS if "bn" in module[-1] else CONV_TENSORS
        for tensor, (collection, leaf) in tensors.items():
            names[(collection, *module, leaf)] = f"{layer}/{tensor}"
    return names


# Keras sorts layers by their distance from the output, so a block's shortcut is next to its third convolution.
_ORDER = {
    "keras": ("conv1", "bn1", "conv2", "bn2", "conv_proj", "conv3", "bn_proj", "bn3"),
    "keras-2016": ("conv1", "bn1", "conv2", "bn2", "conv3", "conv_proj", "bn3", "bn_proj"),
}


def layer_order(stage_sizes: tuple[int, ...], family: str) -> list[str]:
    """Returns all layers with weights in today's Keras order; Keras loads a file's layers by order, not by name."""
    layers = dict(_layers(stage_sizes, family))
    blocks = [block_name(stage, block) for stage, count in enumerate(stage_sizes) for block in range(count)]
    modules = [("stem_conv",), ("stem_bn",), *((block, role) for block in blocks for role in _ORDER[family])]
    return [layers[module] for module in modules if module in layers]


def _layers(stage_sizes: tuple[int, ...], family: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields pairs of a module's path in the network and the corresponding Keras layer."""
    modern = family == "keras"
    yield ("stem_conv",), "conv1_conv" if modern else "conv1"
    yield ("stem_bn",), "conv1_bn" if modern else "bn_conv1"
    for stage, num_blocks in enumerate(stage_sizes):
        for block in range(num_blocks):
            here = block_name(stage, block)
            for role, new, old in (("1", "1", "2a"), ("2", "2", "2b"), ("3", "3", "2c"), ("_proj", "0", "1")):
                if role == "_proj" and block > 0:
                    continue  # only a stage's first block changes the shape and needs a projection
                if modern:
                    prefix = f"conv{stage + 2}_block{block + 1}_{new}"
                    conv, norm = f"{prefix}_conv", f"{prefix}_bn"
                else:
                    suffix = f"{stage + 2}{chr(ord('a') + block)}_branch{old}"
                    conv, norm = f"res{suffix}", f"bn{suffix}"
                yield (here, f"conv{role}"), conv
                yield (here, f"bn{role}"), norm
