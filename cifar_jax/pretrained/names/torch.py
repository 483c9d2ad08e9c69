"""Tensor names of the ResNets in torchvision and timm, and in Hugging Face's transformers, as data.

BatchNorm's `num_batches_tracked` counts training steps and is not needed to run the network. Of transformers,
`ResNetModel` uses the names below; `ResNetForImageClassification` adds the prefix `resnet.` and a classifier.
"""

import re
from collections.abc import Collection

from cifar_jax.errors import WeightsError
from cifar_jax.pretrained.names import Family

IGNORED = "num_batches_tracked"  # name suffix of tensors that are not needed
PREFIX = "resnet."  # of the tensors of transformers

_CONV = {".weight": ("params", "kernel"), ".bias": ("params", "bias")}
_NORM = {
    ".weight": ("params", "scale"),
    ".bias": ("params", "bias"),
    ".running_mean": ("batch_stats", "mean"),
    ".running_var": ("batch_stats", "var"),
}

FAMILIES = {
    "torchvision": Family(
        stem={"stem_conv": "conv1", "stem_bn": "bn1"},
        block={
            "conv1": "layer{}.conv1",
            "bn1": "layer{}.bn1",
            "conv2": "layer{}.conv2",
            "bn2": "layer{}.bn2",
            "conv3": "layer{}.conv3",
            "bn3": "layer{}.bn3",
            "conv_proj": "layer{}.downsample.0",
            "bn_proj": "layer{}.downsample.1",
        },
        label=lambda stage, block: f"{stage + 1}.{block}",
        conv=_CONV,
        norm=_NORM,
        first=re.compile(r"layer(\d{1,3})\.\d{1,3}\.conv1\.weight"),
        tops=("fc",),
    ),
    "huggingface": Family(
        stem={"stem_conv": "embedder.embedder.convolution", "stem_bn": "embedder.embedder.normalization"},
        block={
            "conv1": "encoder.stages.{}.layer.0.convolution",
            "bn1": "encoder.stages.{}.layer.0.normalization",
            "conv2": "encoder.stages.{}.layer.1.convolution",
            "bn2": "encoder.stages.{}.layer.1.normalization",
            "conv3": "encoder.stages.{}.layer.2.convolution",
            "bn3": "encoder.stages.{}.layer.2.normalization",
            "conv_proj": "encoder.stages.{}.shortcut.convolution",
            "bn_proj": "encoder.stages.{}.shortcut.normalization",
        },
        label=lambda stage, block: f"{stage}.layers.{block}",
        conv=_CONV,
        norm=_NORM,
        first=re.compile(r"encoder\.stages\.(\d{1,3})\.layers\.\d{1,3}\.layer\.0\.convolution\.weight"),
        tops=("classifier.1",),
    ),
}


def top_names(family: str) -> tuple[str, str]:
    """Returns the names of the classifier's kernel and bias."""
    (top,) = FAMILIES[family].tops
    return f"{top}.weight", f"{top}.bias"


def without_transformers_prefix(names: Collection[str]) -> dict[str, str]:
    """Maps a file's names to those of FAMILIES: without `resnet.` if all but the classifier's have it.

    Raises:
      WeightsError: if two tensors would have one name.
    """
    inside = [name for name in names if name not in top_names("huggingface")]
    prefixed = inside and all(name.startswith(PREFIX) for name in inside)
    renamed = {name: name.removeprefix(PREFIX) if prefixed else name for name in names}
    if len(set(renamed.values())) < len(renamed):
        raise WeightsError(f"Two tensors have one name but for the prefix {PREFIX!r}; remove one of them.")
    return renamed
