"""Tensor names of the ResNets in torchvision and timm, as data.

Only a stage's first block has a projection: `downsample.0` (convolution) and `downsample.1` (BatchNorm). BatchNorm's
`num_batches_tracked` counts training steps and is not needed to run the network.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping

from cifar_jax.models.resnet import block_name
from cifar_jax.pretrained.merge import Path

CONV_TENSORS = {"weight": ("params", "kernel"), "bias": ("params", "bias")}
NORM_TENSORS = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}
IGNORED = "num_batches_tracked"  # name suffix of tensors that are not needed
TOP = ("fc.weight", "fc.bias")

BLOCK = re.compile(r"layer(\d{1,3})\.(\d{1,3})\.conv1\.weight")
BOTTLENECK = "layer1.0.conv3.weight"  # absent in the basic blocks of ResNet18 and ResNet34

_STEM = {"stem_conv": "conv1", "stem_bn": "bn1"}
_BLOCK = {
    "conv1": "conv1",
    "bn1": "bn1",
    "conv2": "conv2",
    "bn2": "bn2",
    "conv3": "conv3",
    "bn3": "bn3",
    "conv_proj": "downsample.0",
    "bn_proj": "downsample.1",
}


def name_map(stage_sizes: tuple[int, ...]) -> dict[Path, str]:
    """Returns the tensor name by path, for every variable that the network may have."""
    return tensor_names(stage_sizes, _STEM, _BLOCK, lambda stage, block: f"layer{stage + 1}.{block}")


def tensor_names(
    stage_sizes: tuple[int, ...],
    stem: Mapping[str, str],
    roles: Mapping[str, str],
    block_in_file: Callable[[int, int], str],
) -> dict[Path, str]:
    """Returns the tensor name by variable path; the names within a module are PyTorch's, the same in every library.

    Args:
      stage_sizes: blocks in each stage.
      stem: the library's name for each of our stem modules.
      roles: the library's name for each of our modules in a block.
      block_in_file: returns the library's name of a block, given stage and block counted from zero.
    """
    return {
        (collection, *module, leaf): f"{name}.{tensor}"
        for module, name in _modules(stage_sizes, stem, roles, block_in_file)
        for tensor, (collection, leaf) in (NORM_TENSORS if "bn" in module[-1] else CONV_TENSORS).items()
    }


def _modules(
    stage_sizes: tuple[int, ...],
    stem: Mapping[str, str],
    roles: Mapping[str, str],
    block_in_file: Callable[[int, int], str],
) -> Iterator[tuple[tuple[str, ...], str]]:
    for role, name in stem.items():
        yield (role,), name
    for stage, num_blocks in enumerate(stage_sizes):
        for block in range(num_blocks):
            for role, name in roles.items():
                if block == 0 or "proj" not in role:
                    yield (block_name(stage, block), role), f"{block_in_file(stage, block)}.{name}"


def known_names(names: Collection[str]) -> dict[str, str]:
    """Maps a file's names to those of this module, which are the same."""
    return {name: name for name in names}
