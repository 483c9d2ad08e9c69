"""Configs stored next to a weights file: config.json of timm or transformers, and preprocessor_config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar_jax.errors import WeightsError
from cifar_jax.files import read_json_value
from cifar_jax.models.preprocess import TORCH, Preprocessing
from cifar_jax.pretrained.config_transform import processor_photos, timm_photos
from cifar_jax.pretrained.variants import Description

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"

# The timm architectures that use torchvision's tensor names and compute the same function as torchvision's ResNets.
# Others have identical tensors but compute something else: `resnetblur50` and `resnetaa50` blur before they stride.
TIMM_ARCHITECTURES = frozenset(
    f"{maker}resnet{depth}{suffix}"
    for depth in (50, 101, 152)
    for maker, suffix in (("", ""), ("tv_", ""), ("ssl_", ""), ("swsl_", ""), ("gluon_", "_v1b"))
)


# timm's default `model_args`; any other value changes the network.
_DEFAULT_ARGS = {"global_pool": "avg", "in_chans": 3, "output_stride": 32}


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON object stored next to the weights; returns None if there is no such file.

    Raises:
      WeightsError: if the file exists but cannot be read.
    """
    try:
        if not path.is_file():
            return None
        value = read_json_value(path)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path} cannot be read ({error}). Get a fresh copy of it, or move the weights to a directory without it."
        ) from error
    return value


def read_description(weights: Path, family: str) -> Description | None:
    """Reads the config files next to a weights file; returns None if there are none for its family of tensor names.

    Raises:
      WeightsError: if they describe an unsupported network, or cannot be read.
    """
    path = weights.parent / CONFIG
    config = read_json(path)
    try:
        if config and family == "torchvision" and isinstance(config.get("architecture"), str):
            return parse_timm_config(config, str(path))
        if config and family == "huggingface" and config.get("model_type") == "resnet":
            return parse_hf_config(config, read_json(path.with_name(PREPROCESSOR)), str(path))
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise WeightsError(f"{path} has an unexpected structure ({error}). Get a fresh copy of it.") from error
    return None


def parse_timm_config(config: Mapping[str, Any], what: str) -> Description:
    """Parses timm's config.json: mean, std and evaluation transform; any other non-default setting is refused."""
    refusal, name = "", config["architecture"]
    if name not in TIMM_ARCHITECTURES:
        refusal = f"{what} describes {name!r}, which is not a plain ResNet50, ResNet101 or ResNet152. Use one of these."
    arguments = dict(config.get("model_args") or {})
    if special := sorted(key for key in arguments if key != "num_classes" and arguments[key] != _DEFAULT_ARGS.get(key)):
        raise WeightsError(
            f"{what} describes a {name} with non-default {', '.join(special)}, which is not supported. Use weights of "
            "the plain network."
        )
    about = config.get("pretrained_cfg") or config
    mean, std = about.get("mean", TORCH.mean), about.get("std", TORCH.std)
    pixels, photos = _preprocessing(255.0, mean, std), timm_photos(about, what)
    stride = {"stride_in_1x1": False}
    return Description(stride, None, pixels, photos.image_size, photos.transform, refusal, photos.notes)


def parse_hf_config(config: Mapping[str, Any], pixels: Mapping[str, Any] | None, what: str) -> Description:
    """Parses config.json and preprocessor_config.json of transformers."""
    if config.get("layer_type", "bottleneck") != "bottleneck":
        raise WeightsError(
            f"{what} describes a ResNet with basic blocks, such as ResNet18 or ResNet34. Use a ResNet50, ResNet101 or "
            "ResNet152."
        )
    defaults = {"hidden_act": "relu", "downsample_in_first_stage": False, "num_channels": 3}
    if special := [name for name, value in defaults.items() if config.get(name, value) != value]:
        raise WeightsError(
            f"{what} describes a ResNet with non-default {', '.join(special)}, which is not supported. Use weights of "
            "the plain network."
        )
    in_1x1 = config.get("downsample_in_bottleneck", False)
    if type(in_1x1) is not bool:
        raise ValueError(f"downsample_in_bottleneck must be true or false, got {in_1x1!r}")
    stride, depths = {"stride_in_1x1": in_1x1}, tuple(config["depths"]) if "depths" in config else None
    if pixels is None:
        return Description(stride, depths)
    scale = 1 / pixels.get("rescale_factor", 1 / 255) if pixels.get("do_rescale", True) else 1.0
    mean, std = (
        (pixels["image_mean"], pixels["image_std"]) if pixels.get("do_normalize", True) else ((0,) * 3, (1,) * 3)
    )
    # 1 / 255 is stored with sixteen digits, so its inverse is 255 only up to rounding.
    preprocessing = _preprocessing(round(scale, 9), mean, std)
    photos = processor_photos(pixels, f"The {PREPROCESSOR} next to {what}")
    return Description(stride, depths, preprocessing, photos.image_size, photos.transform, notes=photos.notes)


def _preprocessing(scale: float, mean: Any, std: Any) -> Preprocessing:
    """Builds a `Preprocessing`, or returns `TORCH` itself if the values are the same."""
    if (scale, tuple(mean), tuple(std)) == (TORCH.scale, TORCH.mean, TORCH.std):
        return TORCH
    (red, green, blue), (red_std, green_std, blue_std) = map(float, mean), map(float, std)
    return Preprocessing("described", scale=scale, mean=(red, green, blue), std=(red_std, green_std, blue_std))
