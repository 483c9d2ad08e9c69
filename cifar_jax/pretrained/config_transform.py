"""Evaluation transforms of photos, as configs of timm and transformers describe them.

Here photos always keep their proportions: the shorter side is resized, and a square is cropped from the centre. A
config that squashes or pads them is read as the transform with the same shorter side and crop, and a note says so.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from cifar_jax.models.preprocess import EvalTransform

CROP_PCT = 0.875  # default of both libraries
CONVNEXT_WARPS_FROM = 384  # pixels; transformers' ConvNextImageProcessor does not crop from this side on
RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's number


class Photos(NamedTuple):
    """The part of a config that says how photos become the network's input.

    Attributes:
      image_size: side of the input in pixels.
      transform: the evaluation transform; None if the config describes no resize.
      notes: messages for the user about settings that are read differently here.
    """

    image_size: int
    transform: EvalTransform | None
    notes: tuple[str, ...] = ()


def timm_photos(about: Mapping[str, Any], what: str) -> Photos:
    """Reads timm's `input_size`, `crop_pct`, `interpolation` and `crop_mode`, with timm's own defaults.

    `test_input_size` and `test_crop_pct` are recommendations for another size than that of the training, which timm
    does not follow by default either. `fixed_input_size` is about networks that take no other size, unlike ResNets.

    Args:
      about: timm's `pretrained_cfg`.
      what: name of the config in messages.

    Raises:
      ValueError: if the values are invalid.
    """
    _, height, width = about.get("input_size") or (3, 224, 224)
    side = square_side(height, width)
    shorter = math.floor(side / (about.get("crop_pct") or CROP_PCT))
    transform = EvalTransform(shorter, side, about.get("interpolation") or "bicubic")
    mode = about.get("crop_mode") or "center"
    notes = () if mode == "center" else (_note(f"{what} has crop_mode {mode}", transform),)
    return Photos(side, transform, notes)


def processor_photos(pixels: Mapping[str, Any], what: str) -> Photos:
    """Reads `size`, `crop_size`, `crop_pct` and `resample` of an image processor of transformers.

    Args:
      pixels: preprocessor_config.json; its processor is ConvNextImageProcessor, the one of ResNets, unless it names
        another.
      what: name of the config in messages.

    Raises:
      ValueError: if the values are invalid.
    """
    size = pixels.get("size") or 224
    crop_size = pixels.get("crop_size") if pixels.get("do_center_crop") is not False else None
    shorter = _side_of(size)
    side = _side_of(crop_size) if crop_size else shorter
    if not pixels.get("do_resize", True):
        return Photos(side, None)
    name = pixels.get("image_processor_type") or pixels.get("feature_extractor_type") or "ConvNextImageProcessor"
    is_convnext = name.startswith("ConvNext")
    squashes = not crop_size and not (isinstance(size, Mapping) and "shortest_edge" in size)
    if is_convnext:
        squashes = shorter >= CONVNEXT_WARPS_FROM
        if not squashes:
            shorter = int(shorter / (pixels.get("crop_pct") or CROP_PCT))
    number = pixels.get("resample")
    if number is None:
        number = RESAMPLE.index("bicubic" if is_convnext else "bilinear")
    if type(number) is not int or not 0 <= number < len(RESAMPLE):
        raise ValueError(f"resample must be 0 to {len(RESAMPLE) - 1}, got {number!r}")
    transform = EvalTransform(shorter, side, RESAMPLE[number])
    return Photos(side, transform, (_note(f"{what} squashes photos to a square", transform),) if squashes else ())


def square_side(*sides: Any) -> int:
    """Returns the side of a square input.

    Raises:
      ValueError: if the sides differ or are not 1 to 4096 pixels.
    """
    if len(set(sides)) != 1 or type(sides[0]) is not int or not 1 <= sides[0] <= 4096:
        raise ValueError(f"images must be square with sides of 1 to 4096 pixels, got {sides}")
    return sides[0]


def _side_of(size: Any) -> int:
    return square_side(*(size.values() if isinstance(size, Mapping) else [size]))


def _note(difference: str, transform: EvalTransform) -> str:
    return f"{difference}; here they keep their proportions: {transform.words()}."
