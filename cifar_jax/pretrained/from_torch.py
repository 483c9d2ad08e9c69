"""Identifies the network in a state dict of torchvision, timm or transformers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np

from cifar_jax.errors import WeightsError
from cifar_jax.pretrained import axis_order
from cifar_jax.pretrained.config_json import CONFIG, PREPROCESSOR, Description, read_description
from cifar_jax.pretrained.names import huggingface as hf_names, torch as torch_names
from cifar_jax.pretrained.names.keras import count_blocks
from cifar_jax.pretrained.parsed_weights import ParsedWeights
from cifar_jax.pretrained.variants import Variant, check_depth, choose_variant

NAMES: dict[str, ModuleType] = {"torchvision": torch_names, "huggingface": hf_names}  # by family


def detect_family(tensors: Mapping[str, np.ndarray]) -> str | None:
    """Returns the family of a state dict's tensor names, or None if it is unknown."""
    for family, names in NAMES.items():
        if any(names.BLOCK.fullmatch(name) for name in names.known_names(tensors).values()):
            return family
    return None


def parse_torch(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    by_hash: str | None = None,
    asked: str | None = None,
) -> ParsedWeights:
    """Identifies the network in a state dict by its tensor names and the configs next to the file.

    Args:
      path: the file; configs next to it may fix the variant.
      tensors: the state dict.
      by_hash: the variant listed in the registry for this file, if any.
      asked: the user's `--variant`.

    Raises:
      WeightsError: if the tensors or the configs are those of an unsupported network.
    """
    family = detect_family(tensors)
    if family is None:
        shown = ", ".join(sorted(tensors)[:4])
        raise WeightsError(
            f"{path} is not a ResNet of torchvision, timm or transformers: its tensors are named {shown}, ... Use the "
            "weights of a ResNet50, ResNet101 or ResNet152."
        )
    names = NAMES[family]
    named = {known: tensors[name] for name, known in names.known_names(tensors).items()}
    sizes = _stage_sizes(named, names, path)
    description = None if by_hash else read_description(path, family)
    if description and description.stage_sizes not in (None, sizes):
        raise WeightsError(
            f"{path} holds a ResNet with {sizes} blocks, but the {CONFIG} next to it describes one with "
            f"{description.stage_sizes}. Use the {CONFIG} that belongs to these weights, or remove it."
        )
    variant, reason = choose_variant(
        family, by_hash, _apply_description(description) if description else None, asked, str(path)
    )
    assumed = _describe_assumptions(family, description, reason)
    counts = [name for name in named if name.endswith(f".{torch_names.IGNORED}")]
    return ParsedWeights(
        path,
        family,
        named,
        names.name_map(sizes),
        names.TOP,
        replace(variant.config, stage_sizes=sizes),
        variant.preprocessing,
        variant.image_size,
        f"{variant.name} (by {reason})",
        ignored=dict.fromkeys(counts, "number of training steps"),
        layout=axis_order.TORCH,
        refusal=description.other if description else "",
        notes=(f"{path} does not specify {assumed}",) if assumed else (),
    )


def _stage_sizes(named: Mapping[str, np.ndarray], names: ModuleType, path: Path) -> tuple[int, ...]:
    """Counts the bottleneck blocks of each stage."""
    second = names.BOTTLENECK.replace("conv3", "conv2").replace("layer.2", "layer.1")
    if second in named and names.BOTTLENECK not in named:
        raise WeightsError(
            f"{path} is a ResNet with basic blocks, such as ResNet18 or ResNet34. Use a ResNet50, ResNet101 or "
            "ResNet152."
        )
    sizes = count_blocks(named, names.BLOCK)
    check_depth(sizes, str(path))
    return sizes


def _apply_description(description: Description) -> Callable[[Variant], Variant]:
    return lambda variant: replace(
        variant,
        config=replace(variant.config, stride_in_1x1=description.stride_in_1x1),
        preprocessing=description.preprocessing or variant.preprocessing,
        image_size=description.image_size or variant.image_size,
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
