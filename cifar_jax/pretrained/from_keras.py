"""From the tensors of a Keras file to a backbone."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from cifar_jax.files import sha256_of_file
from cifar_jax.pretrained import keras_names
from cifar_jax.pretrained.backbone import Backbone
from cifar_jax.pretrained.errors import WeightsError
from cifar_jax.pretrained.keras_h5 import KerasFile
from cifar_jax.pretrained.merge import merge, top_of
from cifar_jax.pretrained.variants import check_depth, choose_variant, described_by_keras
from cifar_jax.resnet import ResNetConfig


def backbone_from_keras(path: Path, file: KerasFile, by_hash: str | None = None, asked: str | None = None) -> Backbone:
    """Makes a backbone of what a Keras file holds.

    Args:
      path: the file.
      file: what was read from it.
      by_hash: the variant that the registry knows the file by, if it does.
      asked: the user's `--variant`.

    Raises:
      WeightsError: when it is another network.
    """
    family = keras_names.family_of(file.layers)
    if family is None:
        raise WeightsError(
            f"{path} is not a ResNet50 of Keras: its layers are called {', '.join(sorted(file.layers)[:4])} and so on."
        )
    sizes = keras_names.stage_sizes_of(file.layers, family)
    check_depth(sizes, str(path))
    try:
        describe = None if file.model_config is None else described_by_keras(file.model_config, str(path))
        variant, reason = choose_variant(family, by_hash, describe, asked, str(path))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} holds a model description that cannot be read; get the file again.") from error
    config = replace(variant.config, stage_sizes=sizes)
    return Backbone(
        config,
        variant.preprocessing,
        variant.image_size,
        _variables(file.tensors, family, config, str(path)),
        sha256=sha256_of_file(path),
        source=str(path),
        variant=f"{variant.name} (by {reason})",
        top=_top(file, config, str(path)),
    )


def _variables(tensors: Mapping[str, np.ndarray], family: str, config: ResNetConfig, what: str) -> dict[str, object]:
    """The network's variables: a total merge by name, the top set aside."""
    names = keras_names.name_map(config.stage_sizes, family)
    ignored = [name for name in tensors if name.rpartition("/")[0] in keras_names.TOP_LAYERS]
    return merge(tensors, names, config, ignored, what)


def _top(file: KerasFile, config: ResNetConfig, what: str) -> dict[str, np.ndarray] | None:
    """The file's own classifier."""
    layer = next((layer for layer in keras_names.TOP_LAYERS if layer in file.layers), None)
    return top_of(file.tensors, (f"{layer}/kernel", f"{layer}/bias"), config, what) if layer else None
