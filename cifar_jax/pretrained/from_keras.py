"""Identifies the network in a Keras file."""

from dataclasses import replace
from pathlib import Path

from cifar_jax.errors import WeightsError
from cifar_jax.pretrained.formats.keras_h5 import KerasFile
from cifar_jax.pretrained.names import keras as keras_names
from cifar_jax.pretrained.parsed_weights import ParsedWeights
from cifar_jax.pretrained.variants import check_depth, choose_variant, parse_keras_config


def parse_keras(path: Path, file: KerasFile, by_hash: str | None = None, asked: str | None = None) -> ParsedWeights:
    """Identifies the network in a Keras file by its layer names and model config.

    Args:
      path: the file.
      file: its content.
      by_hash: the variant listed in the registry for this file, if any.
      asked: the user's `--variant`.

    Raises:
      WeightsError: if it is not a supported ResNet.
    """
    family = keras_names.detect_family(file.layers)
    if family is None:
        raise WeightsError(
            f"{path} is not a Keras ResNet: its layers are named {', '.join(sorted(file.layers)[:4])}, ... Use the "
            "weights of a Keras ResNet50, ResNet101 or ResNet152."
        )
    sizes = keras_names.detect_stage_sizes(file.layers, family)
    check_depth(sizes, str(path))
    try:
        apply_config = None if file.model_config is None else parse_keras_config(file.model_config, str(path))
        variant, reason = choose_variant(family, by_hash, apply_config, asked, str(path))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} holds a model config that cannot be parsed ({error}). Get a fresh copy of the file."
        ) from error
    top = next((layer for layer in keras_names.TOP_LAYERS if layer in file.layers), keras_names.TOP_LAYERS[0])
    return ParsedWeights(
        path,
        family,
        file.tensors,
        keras_names.name_map(sizes, family),
        (f"{top}/kernel", f"{top}/bias"),
        replace(variant.config, stage_sizes=sizes),
        variant.preprocessing,
        variant.image_size,
        f"{variant.name} (by {reason})",
    )
