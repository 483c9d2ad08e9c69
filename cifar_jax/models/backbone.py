"""Backbones: a network with its weights and everything needed to run it as it was trained, or any pure function."""

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
from cifar_jax.models.preprocess import EvalTransform, Preprocessing, preprocess
from cifar_jax.models.resnet import ResNet, ResNetConfig, Variables, network_name


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["variables"],
    meta_fields=["config", "preprocessing", "image_size"],
    drop_fields=["transform", "sha256", "source", "variant", "top"],
)
@dataclass(frozen=True, eq=False)
class Backbone:
    """A network without its top, as a pytree: the variables are leaves, everything that defines the computation static.

    Its provenance (`sha256`, `source`, `variant`, `top`) and what is done on the host (`transform`) are not passed into
    jit, so two files of the same network share one compiled function.

    Attributes:
      config: the network's shape and variant.
      preprocessing: the preprocessing that it was trained with.
      image_size: side in pixels of the images that it was trained with.
      variables: {"params", "batch_stats"}, float32.
      transform: how photos are resized and cropped for it.
      sha256: SHA-256 of the weights file, or of the file that `save_backbone` would write; empty if not known.
      source: path of the weights file, or a description of how the variables were made.
      variant: human-readable name of the variant, and how it was determined.
      top: the file's own classifier, {"kernel": [features, classes], "bias": [classes]}, or None. Stored but not used.
    """

    config: ResNetConfig
    preprocessing: Preprocessing
    image_size: int
    variables: Variables
    transform: EvalTransform = EvalTransform()  # noqa: RUF009 (frozen)
    sha256: str = ""
    source: str = ""
    variant: str = ""
    top: dict[str, Any] | None = None

    def __repr__(self) -> str:
        """A one-line description without the values."""
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
        """Human-readable description of the network's input."""
        return f"{self.preprocessing.name} preprocessing, {image_size}x{image_size} pixels"

    def about(self) -> dict[str, Any]:
        """The network's config and preprocessing as JSON values."""
        return {"config": asdict(self.config), "preprocessing": asdict(self.preprocessing)}

    def replace(self, **changes: Any) -> "Backbone":
        """Returns a copy with some attributes changed. New variables clear the digest, as they belong to no file."""
        if "variables" in changes:
            changes = {"sha256": "", "source": self.source and f"changed from {self.source}"} | changes
        return dataclasses.replace(self, **changes)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["variables"],
    meta_fields=["function", "source", "image_size"],
)
@dataclass(frozen=True, eq=False)
class FunctionBackbone:
    """Any pure function from images to features, used instead of a `Backbone`.

    In `finetune` mode all variables are trained by gradient descent, so running statistics and constants belong inside
    the function. Options specific to a ResNet do not apply, and `train` rejects them.

    Attributes:
      function: `(variables, images uint8 [batch, height, width, 3]) -> features float32 [batch, num_features]`. It
        includes the preprocessing, and is compiled by its callers.
      variables: the arrays of the function. A run can only be continued or loaded with the same variables. Weights
        embedded in the function as constants are only part of its program, which also depends on the version of JAX
        and the platform, so a different program only causes a warning.
      source: human-readable name.
      image_size: side in pixels of the input images.
    """

    function: Callable[[PyTree, UInt8[Array, "batch h w 3"]], Float[Array, "batch features"]]
    variables: PyTree
    source: str
    image_size: int = 32

    variant = "a function"

    def __repr__(self) -> str:
        """A one-line description, without the values."""
        count = sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(self.variables))
        return f"FunctionBackbone({self.source}: {count:,} parameters, {self.image_size}x{self.image_size})"

    @property
    def num_features(self) -> int:
        """Width of the features.

        Raises:
          UserError: if the function returns anything other than [batch, num_features].
        """
        info = self._lowered.out_info
        shape: tuple[int, ...] = getattr(info, "shape", ())
        if len(shape) != 2 or shape[0] != 1:
            raise UserError(
                f"{self!r} returns {f'shape {list(shape)}' if shape else info} for one image, expected "
                "[1, num_features]; pool or flatten what a network returns."
            )
        return int(shape[1])

    @property
    def transform(self) -> EvalTransform:
        """How photos are resized and cropped for it: the shorter side to the side of its images."""
        return EvalTransform(self.image_size, self.image_size)

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
        """Digest of the program that this version of JAX lowers the function to, including constants."""
        return hashlib.sha256(self._lowered.as_text().encode()).hexdigest()

    @functools.cached_property
    def _lowered(self) -> Any:
        images = jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 3), np.uint8)
        return jax.jit(self.function).lower(jax.eval_shape(lambda: self.variables), images)

    def input_words(self, image_size: int) -> str:
        """Human-readable description of the function's input."""
        return f"{image_size}x{image_size} pixels"

    def about(self) -> dict[str, Any]:
        """Name and program digest of the function as JSON values."""
        return {"function": self.source, "program_sha256": self.program_sha256}

    def replace(self, **changes: Any) -> "FunctionBackbone":
        """Returns a copy with some attributes changed."""
        return dataclasses.replace(self, **changes)


AnyBackbone = Backbone | FunctionBackbone


def extract(
    backbone: AnyBackbone,
    images_u8: UInt8[Array, "batch h w 3"],
    image_size: int | None = None,
    precision: str = "float32",
) -> Float[Array, "batch features"]:
    """Pooled features of one batch: upsampling, preprocessing, backbone, global average pooling, `stop_gradient`.

    This is the reference implementation that faster ones are tested against. It is pure and not compiled; to jit it,
    make `image_size` and `precision` static.

    Args:
      backbone: from `load_backbone`, or a `FunctionBackbone`, which ignores `image_size` and `precision`.
      images_u8: RGB pixels.
      image_size: side in pixels that the images are upsampled to; the backbone's own if None.
      precision: `float32` or `bfloat16`, the network's computation dtype; the features are float32.
    """
    if isinstance(backbone, FunctionBackbone):
        return jax.lax.stop_gradient(backbone.function(backbone.variables, images_u8))
    x = preprocess(images_u8, backbone.preprocessing, image_size or backbone.image_size)
    output: Any = ResNet(backbone.config, dtype=jnp.dtype(precision)).apply(backbone.variables, x, train=False)
    return jax.lax.stop_gradient(output.pooled)
