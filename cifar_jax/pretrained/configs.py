"""What lies beside weights and says how they are run: config.json of timm or transformers, preprocessor_config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_jax.errors import WeightsError
from cifar_jax.models.preprocess import TORCH, Preprocessing

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
MOST_BYTES = 10_000_000  # a thousand class names take 80 kB

# Of timm's architectures with torchvision's tensor names those that compute what torchvision's do. Others have the very
# same tensors and compute something else: `resnetblur50` and `resnetaa50` blur before they stride.
TIMM_ARCHITECTURES = frozenset(
    f"{maker}resnet{depth}{suffix}"
    for depth in (50, 101, 152)
    for maker, suffix in (("", ""), ("tv_", ""), ("ssl_", ""), ("swsl_", ""), ("gluon_", "_v1b"))
)


# What timm may be told when it makes a network, as it makes a plain one.
_USUAL = {"global_pool": "avg", "in_chans": 3, "output_stride": 32}


@dataclass(frozen=True)
class Described:
    """What a description decides; None is what it leaves open.

    `other` says why it describes another network than its tensors, if they fit one, seem to be for.
    """

    stride_in_1x1: bool
    stage_sizes: tuple[int, ...] | None
    preprocessing: Preprocessing | None
    image_size: int | None
    other: str = ""


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object beside the weights, or None where there is no such file.

    Raises:
      WeightsError: when the file is there and cannot be read.
    """
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("it is too large")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); get it again, or keep the weights elsewhere.") from error
    return value


def described_beside(weights: Path, family: str) -> Described | None:
    """What the files beside weights say of them, or None where there are none for this family of tensor names.

    Raises:
      WeightsError: when they describe another network, or cannot be read.
    """
    path = weights.parent / CONFIG
    config = read_json(path)
    try:
        if config and family == "torchvision" and isinstance(config.get("architecture"), str):
            return described_by_timm(config, str(path))
        if config and family == "huggingface" and config.get("model_type") == "resnet":
            return described_by_hf(config, read_json(path.with_name(PREPROCESSOR)), str(path))
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise WeightsError(f"{path} is not as its library writes it ({error}); get it again.") from error
    return None


def described_by_timm(config: Mapping[str, Any], what: str) -> Described:
    """What timm's config.json says: the means, deviations and size of the images, and that nothing else is special."""
    other, name = "", config["architecture"]
    if name not in TIMM_ARCHITECTURES:
        other = (
            f"{what} describes {name!r}, which computes something else than ResNet50, 101 or 152; give one of those."
        )
    arguments = dict(config.get("model_args") or {})
    if special := sorted(key for key in arguments if key != "num_classes" and arguments[key] != _USUAL.get(key)):
        raise WeightsError(
            f"{what} describes a {name} changed in {', '.join(special)}, which is not known; give a plain one."
        )
    about = config.get("pretrained_cfg") or config
    mean, std = about.get("mean", TORCH.mean), about.get("std", TORCH.std)
    _, height, width = about.get("input_size", (3, 224, 224))
    return Described(False, None, _preprocessing(255.0, mean, std), _side(height, width), other)


def described_by_hf(config: Mapping[str, Any], pixels: Mapping[str, Any] | None, what: str) -> Described:
    """What config.json and preprocessor_config.json of transformers say."""
    if config.get("layer_type", "bottleneck") != "bottleneck":
        raise WeightsError(f"{what} describes a ResNet of basic blocks, as ResNet18 and 34 are; give a ResNet50 or up.")
    usual = {"hidden_act": "relu", "downsample_in_first_stage": False, "num_channels": 3}
    if special := [name for name, value in usual.items() if config.get(name, value) != value]:
        raise WeightsError(f"{what} describes a ResNet changed in {', '.join(special)}, which is not known.")
    in_1x1 = config.get("downsample_in_bottleneck", False)
    if type(in_1x1) is not bool:
        raise ValueError(f"downsample_in_bottleneck is {in_1x1!r}")
    depths = tuple(config["depths"]) if "depths" in config else None
    if pixels is None:
        return Described(in_1x1, depths, None, None)
    scale = 1 / pixels.get("rescale_factor", 1 / 255) if pixels.get("do_rescale", True) else 1.0
    mean, std = (
        (pixels["image_mean"], pixels["image_std"]) if pixels.get("do_normalize", True) else ((0,) * 3, (1,) * 3)
    )
    size = pixels.get("crop_size") or pixels.get("size", 224)
    sides = list(size.values()) if isinstance(size, Mapping) else [size]
    # 1 / 255 is written with sixteen digits, so its inverse is 255 but for the last ones.
    return Described(in_1x1, depths, _preprocessing(round(scale, 9), mean, std), _side(*sides))


def _preprocessing(scale: float, mean: Any, std: Any) -> Preprocessing:
    """Normalisation as described, under its usual name if it is the usual one."""
    if (scale, tuple(mean), tuple(std)) == (TORCH.scale, TORCH.mean, TORCH.std):
        return TORCH
    (red, green, blue), (red_std, green_std, blue_std) = map(float, mean), map(float, std)
    return Preprocessing("described", scale=scale, mean=(red, green, blue), std=(red_std, green_std, blue_std))


def _side(*sides: int) -> int:
    if len(set(sides)) != 1 or type(sides[0]) is not int or not 1 <= sides[0] <= 4096:
        raise ValueError(f"images of {sides}")
    return sides[0]
