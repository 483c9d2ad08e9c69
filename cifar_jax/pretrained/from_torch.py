"""From a state dict with the names of torchvision, timm or transformers to what it is."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np

from cifar_jax.errors import WeightsError
from cifar_jax.pretrained.configs import CONFIG, PREPROCESSOR, Described, described_beside
from cifar_jax.pretrained.names import huggingface as hf_names, layouts, torch as torch_names
from cifar_jax.pretrained.names.keras import count_blocks
from cifar_jax.pretrained.reading import Reading
from cifar_jax.pretrained.variants import Variant, check_depth, choose_variant

NAMES: dict[str, ModuleType] = {"torchvision": torch_names, "huggingface": hf_names}  # by family


def family_of(tensors: Mapping[str, np.ndarray]) -> str | None:
    """The family of names that tensors have, or None for another network."""
    for family, names in NAMES.items():
        if any(names.BLOCK.fullmatch(name) for name in names.known_names(tensors).values()):
            return family
    return None


def reading_of_torch(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    by_hash: str | None = None,
    asked: str | None = None,
) -> Reading:
    """Tells what a state dict holds.

    Args:
      path: the file; what lies beside it may say how it is run.
      tensors: the state dict.
      by_hash: the variant that the registry knows the file by, if it does.
      asked: the user's `--variant`.

    Raises:
      WeightsError: when it is another network, or the files beside it say that it is.
    """
    family = family_of(tensors)
    if family is None:
        shown = ", ".join(sorted(tensors)[:4])
        raise WeightsError(
            f"{path} is not a ResNet of torchvision, timm or transformers: its tensors are called {shown} and so on."
        )
    names = NAMES[family]
    named = {known: tensors[name] for name, known in names.known_names(tensors).items()}
    sizes = _stage_sizes(named, names, path)
    beside = None if by_hash else described_beside(path, family)
    if beside and beside.stage_sizes not in (None, sizes):
        raise WeightsError(
            f"{path} holds a ResNet with {sizes} blocks and {CONFIG} beside it describes one with "
            f"{beside.stage_sizes}; they do not belong together."
        )
    variant, reason = choose_variant(family, by_hash, _described(beside) if beside else None, asked, str(path))
    assumed = _assumed(family, beside, reason)
    counts = [name for name in named if name.endswith(f".{torch_names.IGNORED}")]
    return Reading(
        path,
        family,
        named,
        names.name_map(sizes),
        names.TOP,
        replace(variant.config, stage_sizes=sizes),
        variant.preprocessing,
        variant.image_size,
        f"{variant.name} (by {reason})",
        ignored=dict.fromkeys(counts, "a count of training steps"),
        layout=layouts.TORCH,
        refusal=beside.other if beside else "",
        notes=(f"{path} does not say {assumed}.",) if assumed else (),
    )


def _stage_sizes(named: Mapping[str, np.ndarray], names: ModuleType, path: Path) -> tuple[int, ...]:
    """Blocks in each stage, of three convolutions each."""
    second = names.BOTTLENECK.replace("conv3", "conv2").replace("layer.2", "layer.1")
    if second in named and names.BOTTLENECK not in named:
        raise WeightsError(
            f"{path} is a ResNet of basic blocks, as ResNet18 and ResNet34 are; give a ResNet50, 101 or 152."
        )
    sizes = count_blocks(named, names.BLOCK)
    check_depth(sizes, str(path))
    return sizes


def _described(beside: Described) -> Callable[[Variant], Variant]:
    return lambda variant: replace(
        variant,
        config=replace(variant.config, stride_in_1x1=beside.stride_in_1x1),
        preprocessing=beside.preprocessing or variant.preprocessing,
        image_size=beside.image_size or variant.image_size,
    )


def _assumed(family: str, beside: Described | None, reason: str) -> str:
    """What neither the file nor the user said, and what is taken for it."""
    usual = "ImageNet's mean and standard deviation"
    if reason == "its tensor names":
        return (
            f"how it is run, and nothing beside it does: strides in its 3x3 convolutions and {usual} are assumed; "
            f"--variant {family} says the same without this sentence"
        )
    if beside and beside.preprocessing is None:
        return f"how its images are normalised, as {PREPROCESSOR} is not beside it: {usual} are assumed"
    return ""
