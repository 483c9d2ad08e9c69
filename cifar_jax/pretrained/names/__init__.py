"""Tensor names of published ResNets, as data: a table for each family of weights files."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from cifar_jax.models.resnet import block_name
from cifar_jax.pretrained.merge import Path


class Family(NamedTuple):
    """The tensor names of a family of weights files.

    Attributes:
      stem: the file's name of each of our modules in the stem.
      block: the file's name of each of our modules in a block, with {} for the block, in the order of the file.
      label: the file's name of a block, given stage and block counted from zero.
      conv: suffix of each tensor of a convolution, and the collection and name of the variable that it fills.
      norm: the same of a BatchNorm.
      first: pattern of the first tensor of each block; its first group is the number of the stage.
      tops: possible names of the classifier layer.
    """

    stem: Mapping[str, str]
    block: Mapping[str, str]
    label: Callable[[int, int], str]
    conv: Mapping[str, tuple[str, str]]
    norm: Mapping[str, tuple[str, str]]
    first: re.Pattern[str]
    tops: tuple[str, ...]

    def name_map(self, stage_sizes: tuple[int, ...]) -> dict[Path, str]:
        """Returns the tensor name by path, for every variable that the network may have, in the order of the file."""
        modules: dict[tuple[str, ...], str] = {(role,): name for role, name in self.stem.items()}
        for stage, num_blocks in enumerate(stage_sizes):
            for block in range(num_blocks):
                for role, name in self.block.items():
                    # Only a stage's first block changes the shape and needs a projection.
                    if block == 0 or "proj" not in role:
                        modules[block_name(stage, block), role] = name.format(self.label(stage, block))
        return {
            (collection, *module, leaf): f"{name}{suffix}"
            for module, name in modules.items()
            for suffix, (collection, leaf) in (self.norm if "bn" in module[-1] else self.conv).items()
        }

    def stage_sizes(self, names: Iterable[str]) -> tuple[int, ...]:
        """Counts the blocks of each stage among a file's tensor names."""
        blocks = Counter(match[1] for name in names if (match := self.first.fullmatch(name)))
        return tuple(blocks[stage] for stage in sorted(blocks, key=int))


def detect_family(names: Collection[str], families: Mapping[str, Family]) -> str | None:
    """Returns the family that a file's tensor names belong to, or None."""
    return next((family for family, known in families.items() if known.stage_sizes(names)), None)
