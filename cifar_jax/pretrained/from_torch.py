"""Identifies the network in a state dict of torchvision, timm or transformers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from cifar_jax.errors import WeightsError
from cifar_jax.models.preprocess import EvalTransform
from cifar_jax.pretrained.config_json import CONFIG, PREPROCESSOR, read_description
from cifar_jax.pretrained.merge import ParsedWeights
from cifar_jax.pretrained.names import detect_family
from cifar_jax.pretrained.names.torch import FAMILIES, IGNORED, top_names, without_transformers_prefix
from cifar_jax.pretrained.variants import Description, check_depth, choose_variant


def is_known(tensors: Mapping[str, np.ndarray]) -> bool:
    """Returns whether the tensor names are those of a supported library."""
    return detect_family([*without_transformers_prefix(tensors).values()], FAMILIES) is not None


def parse_torch(path: Path, tensors: Mapping[str, np.ndarray], by_hash: str | None, asked: str | None) -> ParsedWeights:
    """Identifies the network in a state dict by its tensor names and the configs next to the file.

    Args:
      path: the file; configs next to it may fix the variant.
      tensors: the state dict.
      by_hash: the variant listed in the registry for this file, if any.
      asked: the user's `--variant`.

    Raises:
      WeightsError: if the tensors or the configs are those of an unsupported network.
    """
    named = {known: tensors[name] for name, known in without_transformers_prefix(tensors).items()}
    family = detect_family(named, FAMILIES)
    if family is None:
        shown = ", ".join(sorted(tensors)[:4])
        raise WeightsError(
            f"{path} is not a ResNet of torchvision, timm or transformers: its tensors are named {shown}, ... Use the "
            "weights of a ResNet50, ResNet101 or ResNet152."
        )
    names = FAMILIES[family]
    sizes = names.stage_sizes(named)
    conv2, conv3 = (f"{names.block[conv].format(names.label(0, 0))}.weight" for conv in ("conv2", "conv3"))
    if conv2 in named and conv3 not in named:
        raise WeightsError(
            f"{path} is a ResNet with basic blocks, such as ResNet18 or ResNet34. Use a ResNet50, ResNet101 or "
            "ResNet152."
        )
    check_depth(sizes, str(path))
    description = None if by_hash else read_description(path, family)
    if description and description.stage_sizes not in (None, sizes):
        raise WeightsError(
            f"{path} holds a ResNet with {sizes} blocks, but the {CONFIG} next to it describes one with "
            f"{description.stage_sizes}. Use the {CONFIG} that belongs to these weights, or remove it."
        )
    variant, reason = choose_variant(family, by_hash, description, asked, str(path))
    assumed = _describe_assumptions(family, description, reason)
    notes = description.notes if description else ()
    return ParsedWeights(
        path,
        family,
        named,
        names.name_map(sizes),
        top_names(family),
        replace(variant.config, stage_sizes=sizes),
        variant.preprocessing,
        variant.image_size,
        f"{variant.name} (by {reason})",
        (description and description.transform) or EvalTransform(),
        torch_axes=True,
        ignored={name: "number of training steps" for name in named if name.endswith(f".{IGNORED}")},
        refusal=description.refusal if description else "",
        notes=(f"{path} does not specify {assumed}", *notes) if assumed else notes,
    )


def _describe_assumptions(family: str, description: Description | None, reason: str) -> str:
    """Describes the settings that neither the file nor the user specified, and the defaults used for them."""
    default = "ImageNet's mean and std"
    if reason == "its tensor names":
        return (
            f"its variant, and no {CONFIG} is next to it; assuming strides in the 3x3 convolutions and {default}. Pass "
            f"--variant {family} to confirm and hide this message."
        )
    if description and description.preprocessing is None:
        return f"its preprocessing, and no {PREPROCESSOR} is next to it; assuming {default}."
    return ""
