"""Tensor names of Keras's ResNets, as data.

There are two families of names: `keras` is used by keras-applications since 1.0.8 and by every later Keras,
`keras-2016` by the files of 2016 and by Keras up to 2.2. Tensors are mapped by name, not by order: `_0_conv` (the
shortcut) and `_3_conv` of a stage's first block have the same shape, and their order changed between Keras versions.

The layers stand in today's Keras order, in which a file must be written because Keras loads layers by order: sorted by
their distance from the output, so a block's shortcut is next to its third convolution.
"""

import re

from cifar_jax.pretrained.names import Family

_CONV = {"/kernel": ("params", "kernel"), "/bias": ("params", "bias")}
_NORM = {
    "/gamma": ("params", "scale"),
    "/beta": ("params", "bias"),
    "/moving_mean": ("batch_stats", "mean"),
    "/moving_variance": ("batch_stats", "var"),
}
# Classifier layers: `probs` in the published file, `predictions` in files of today's Keras, `fc1000` in those of 2016.
_TOPS = ("predictions", "probs", "fc1000")

FAMILIES = {
    "keras": Family(
        stem={"stem_conv": "conv1_conv", "stem_bn": "conv1_bn"},
        block={
            "conv1": "conv{}_1_conv",
            "bn1": "conv{}_1_bn",
            "conv2": "conv{}_2_conv",
            "bn2": "conv{}_2_bn",
            "conv_proj": "conv{}_0_conv",
            "conv3": "conv{}_3_conv",
            "bn_proj": "conv{}_0_bn",
            "bn3": "conv{}_3_bn",
        },
        label=lambda stage, block: f"{stage + 2}_block{block + 1}",
        conv=_CONV,
        norm=_NORM,
        first=re.compile(r"conv(\d{1,3})_block\d{1,3}_1_conv/kernel"),
        tops=_TOPS,
    ),
    "keras-2016": Family(
        stem={"stem_conv": "conv1", "stem_bn": "bn_conv1"},
        block={
            "conv1": "res{}_branch2a",
            "bn1": "bn{}_branch2a",
            "conv2": "res{}_branch2b",
            "bn2": "bn{}_branch2b",
            "conv3": "res{}_branch2c",
            "conv_proj": "res{}_branch1",
            "bn3": "bn{}_branch2c",
            "bn_proj": "bn{}_branch1",
        },
        label=lambda stage, block: f"{stage + 2}{chr(ord('a') + block)}",
        conv=_CONV,
        norm=_NORM,
        first=re.compile(r"res(\d{1,3})[a-z]_branch2a/kernel"),
        tops=_TOPS,
    ),
}

# Tensor names of Keras 1. Its `running_std` holds the variance, as its source code shows.
OLDEST_TENSORS = {
    "W": "kernel",
    "b": "bias",
    "running_mean": "moving_mean",
    "running_std": "moving_variance",
}
