"""A pretrained backbone: its weights together with all that is needed to run them as they were trained."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from cifar_jax.preprocess import Preprocessing
from cifar_jax.pretrained.variants import network_name
from cifar_jax.resnet import ResNetConfig, Variables


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class Backbone:
    """A network without its top, as a pytree: the variables are leaves, what decides the computation is static.

    Where it came from (`sha256`, `source`, `variant`, `top`) does not travel into jit, so two files of the same
    network share one compiled function.

    Attributes:
      config: the network's shape and variant.
      preprocessing: what it was trained with.
      image_size: side in pixels of the images it was trained with.
      variables: {"params", "batch_stats"}, float32.
      sha256: of the weights file, or of the file that `save_backbone` would make.
      source: the file's path, or how the variables were made.
      variant: the name of the variant and what decided it, for people.
      top: the file's own classifier, {"kernel": [features, classes], "bias": [classes]}, or None. Kept, not used.
    """

    config: ResNetConfig
    preprocessing: Preprocessing
    image_size: int
    variables: Variables
    sha256: str = ""
    source: str = ""
    variant: str = ""
    top: dict[str, Any] | None = None

    def tree_flatten(self) -> tuple[tuple[Variables], tuple[ResNetConfig, Preprocessing, int]]:
        """The leaves and the static part."""
        return (self.variables,), (self.config, self.preprocessing, self.image_size)

    @classmethod
    def tree_unflatten(cls, static: tuple[ResNetConfig, Preprocessing, int], children: tuple[Variables]) -> "Backbone":
        """Puts leaves and static part together again."""
        return cls(*static, variables=children[0])

    def __repr__(self) -> str:
        """One line: the values themselves would fill thousands."""
        params = self.variables.get("params", {}) if isinstance(self.variables, Mapping) else self.variables
        count = sum(math.prod(getattr(leaf, "shape", ())) for leaf in jax.tree.leaves(params))
        source = f"{self.source}: " if self.source else ""
        return (
            f"Backbone({source}{network_name(self.config)}, {count:,} parameters, "
            f"{self.preprocessing.name} preprocessing, {self.image_size}x{self.image_size})"
        )

    def replace(self, **changes: Any) -> "Backbone":
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)
