"""A backbone: its weights together with all that is needed to run them as they were trained; or any function."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from cifar_jax.errors import UserError
from cifar_jax.models.preprocess import Preprocessing, preprocess
from cifar_jax.models.resnet import ResNet, ResNetConfig, Variables, network_name


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
      sha256: of the weights file, or of the file that `save_backbone` would make; empty if it is not known.
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

    @property
    def num_features(self) -> int:
        """Width of the pooled features: 2048 for ResNet50."""
        return self.config.features

    def input_words(self, image_size: int) -> str:
        """The input of the network, for people."""
        return f"{self.preprocessing.name} preprocessing, {image_size}x{image_size} pixels"

    def about(self) -> dict[str, Any]:
        """JSON values that say how the weights are run."""
        return {"config": asdict(self.config), "preprocessing": asdict(self.preprocessing)}

    def replace(self, **changes: Any) -> "Backbone":
        """A copy with some attributes changed. Other variables are those of no file, so its digest goes with them."""
        if "variables" in changes:
            changes = {"sha256": "", "source": self.source and f"changed from {self.source}"} | changes
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class FunctionBackbone:
    """Any pure function from images to features, in the place of a `Backbone`.

    In the mode finetune all variables train, by their gradients alone: running statistics and constants belong into the
    function. Options about how a ResNet is run or trained do not apply, and `train` refuses them.

    Attributes:
      function: `(variables, images uint8 [batch, height, width, 3]) -> features float32 [batch, num_features]`. It
        preprocesses the images itself, and is compiled by whoever calls it.
      variables: its arrays. A run is held to these: weights that are constants of the function are only part of its
        program, which also depends on the version of JAX and the platform, and is therefore only warned of.
      source: its name, for people.
      image_size: side in pixels of the images that it is given.
    """

    function: Callable[[PyTree, UInt8[Array, "batch h w 3"]], Float[Array, "batch features"]]
    variables: PyTree
    source: str
    image_size: int = 32

    variant = "a function"

    def __repr__(self) -> str:
        """One line, without the values."""
        count = sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(self.variables))
        return f"FunctionBackbone({self.source}: {count:,} parameters, {self.image_size}x{self.image_size})"

    @property
    def num_features(self) -> int:
        """Width of the features.

        Raises:
          UserError: when the function returns something else than [batch, num_features].
        """
        info = self._lowered.out_info
        shape: tuple[int, ...] = getattr(info, "shape", ())
        if len(shape) != 2 or shape[0] != 1:
            raise UserError(
                f"{self!r} returns {f'shape {list(shape)}' if shape else info} for one image, expected "
                "[1, num_features]; pool or flatten what a network returns."
            )
        return int(shape[1])

    @functools.cached_property
    def sha256(self) -> str:
        """Digest of the variables."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.variables):
            array = np.asarray(leaf)
            digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode() + array.tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def program_sha256(self) -> str:
        """Digest of the program that the function is lowered to, constants included, by this version of JAX."""
        return hashlib.sha256(self._lowered.as_text().encode()).hexdigest()

    @functools.cached_property
    def _lowered(self) -> Any:
        images = jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 3), np.uint8)
        return jax.jit(self.function).lower(jax.eval_shape(lambda: self.variables), images)

    def input_words(self, image_size: int) -> str:
        """The input of the function, for people."""
        return f"{image_size}x{image_size} pixels"

    def about(self) -> dict[str, Any]:
        """JSON values that say what it is."""
        return {"function": self.source, "program_sha256": self.program_sha256}

    def tree_flatten(self) -> tuple[tuple[PyTree], tuple[Any, str, int]]:
        """The leaves and the static part."""
        return (self.variables,), (self.function, self.source, self.image_size)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, str, int], children: tuple[PyTree]) -> "FunctionBackbone":
        """Puts leaves and static part together again."""
        return cls(static[0], children[0], *static[1:])

    def replace(self, **changes: Any) -> "FunctionBackbone":
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)


AnyBackbone = Backbone | FunctionBackbone


def extract(
    backbone: AnyBackbone,
    images_u8: UInt8[Array, "batch h w 3"],
    image_size: int | None = None,
    precision: str = "float32",
) -> Float[Array, "batch features"]:
    """Pooled features of one batch, plainly: upsample, preprocess, backbone, mean over positions, `stop_gradient`.

    This is the reference that everything faster is held against. It is pure and not compiled; jit it with `image_size`
    and `precision` static.

    Args:
      backbone: from `load_backbone`, or a `FunctionBackbone`, which decides about size and precision itself.
      images_u8: RGB pixels.
      image_size: side in pixels that the images are upsampled to; the backbone's own if None.
      precision: `float32` or `bfloat16`, what the network computes in; the features are float32.
    """
    if isinstance(backbone, FunctionBackbone):
        return jax.lax.stop_gradient(backbone.function(backbone.variables, images_u8))
    x = preprocess(images_u8, backbone.preprocessing, image_size or backbone.image_size)
    output: Any = ResNet(backbone.config, dtype=jnp.dtype(precision)).apply(backbone.variables, x, train=False)
    return jax.lax.stop_gradient(output.pooled)
