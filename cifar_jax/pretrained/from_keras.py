"""Identifies the network in a Keras file."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cifar_jax.errors import WeightsError
from cifar_jax.pretrained.formats.keras_h5 import KerasFile
from cifar_jax.pretrained.merge import ParsedWeights
from cifar_jax.pretrained.names import detect_family
from cifar_jax.pretrained.names.keras import FAMILIES
from cifar_jax.pretrained.variants import Description, check_depth, choose_variant


def parse_keras(path: Path, file: KerasFile, by_hash: str | None, asked: str | None) -> ParsedWeights:
    """Identifies the network in a Keras file by its tensor names and model config.

    Args:
      path: the file.
      file: its content.
      by_hash: the variant listed in the registry for this file, if any.
      asked: the user's `--variant`.

    Raises:
      WeightsError: if it is not a supported ResNet.
    """
    layers = {name.rpartition("/")[0] for name in file.tensors}
    family = detect_family(file.tensors, FAMILIES)
    if family is None:
        raise WeightsError(
            f"{path} is not a Keras ResNet: its layers are named {', '.join(sorted(layers)[:4])}, ... Use the weights "
            "of a Keras ResNet50, ResNet101 or ResNet152."
        )
    names = FAMILIES[family]
    sizes = names.stage_sizes(file.tensors)
    check_depth(sizes, str(path))
    try:
        description = None if file.model_config is None else _describe(file.model_config, path)
        variant, reason = choose_variant(family, by_hash, description, asked, str(path))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} holds a model config that cannot be parsed ({error}). Get a fresh copy of the file."
        ) from error
    top = next((layer for layer in names.tops if layer in layers), names.tops[0])
    return ParsedWeights(
        path,
        family,
        file.tensors,
        names.name_map(sizes),
        (f"{top}/kernel", f"{top}/bias"),
        replace(variant.config, stage_sizes=sizes),
        variant.preprocessing,
        variant.image_size,
        f"{variant.name} (by {reason})",
    )


def _describe(model_config: Mapping[str, Any], path: Path) -> Description:
    """Returns the settings that a Keras model config fixes, regardless of layer names."""
    by_class: dict[str, list[Mapping[str, Any]]] = {}
    for layer in _flat_layers(model_config.get("config", {})):
        by_class.setdefault(layer["class_name"], []).append(layer["config"])
    convs, norms = by_class.get("Conv2D", []), by_class.get("BatchNormalization", [])
    epsilons, biases = {norm["epsilon"] for norm in norms}, {conv["use_bias"] for conv in convs}
    # After the stem there are only 1x1 and 3x3 convolutions, and one of the two kinds does all the main-path striding.
    in_3x3 = any(tuple(c["kernel_size"]) == (3, 3) and tuple(c["strides"]) == (2, 2) for c in convs)
    if len(epsilons) != 1 or len(biases) != 1:
        raise WeightsError(
            f"The model config inside {path} is not that of a ResNet: expected one BatchNorm epsilon and one use_bias "
            f"for all layers, got {sorted(epsilons)} and {sorted(biases)}. Get a fresh copy of the file."
        )
    return Description(
        {
            "bn_epsilon": epsilons.pop(),
            "conv_bias": biases.pop(),
            "stride_in_1x1": not in_3x3,
            "pool_padding": len(by_class.get("ZeroPadding2D", [])) - 1,  # the other one pads the stem's convolution
        }
    )


def _flat_layers(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yields all layers of a model config, including those of nested models."""
    for layer in config["layers"] if isinstance(config, Mapping) and "layers" in config else []:
        if "layers" in layer.get("config", {}):
            yield from _flat_layers(layer["config"])
        else:
            yield layer
