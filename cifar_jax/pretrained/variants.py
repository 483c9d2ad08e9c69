"""Network variants that share tensor names and shapes but compute different functions.

A file's variant is decided, in this order, by its hash, by a config inside the file or next to it, by the user's
`--variant`, and by the family of its tensor names. The first two are facts about the file, so `--variant` can only
choose what they leave open.
"""

from dataclasses import dataclass, replace
from typing import Any

from cifar_jax.errors import WeightsError, no_such
from cifar_jax.models.preprocess import CAFFE, TORCH, EvalTransform, Preprocessing
from cifar_jax.models.resnet import DEPTHS, ResNetConfig


@dataclass(frozen=True)
class Variant:
    """A published kind of ResNet.

    Attributes:
      name: name accepted by `--variant`.
      family: family of tensor names in its files.
      config: configuration of its ResNet50.
      preprocessing: preprocessing it was trained with.
      image_size: side in pixels of the images it was trained with.
    """

    name: str
    family: str
    config: ResNetConfig
    preprocessing: Preprocessing
    image_size: int = 224


@dataclass(frozen=True)
class Description:
    """The settings that a config inside or next to a weights file fixes; None for those it leaves open.

    Attributes:
      config: fields of ResNetConfig, without `stage_sizes`.
      stage_sizes: blocks in each stage.
      preprocessing: the preprocessing of the input.
      image_size: side of the input in pixels.
      transform: the evaluation transform of photos.
      refusal: error message if it describes a different network than the tensor names suggest, else empty.
      notes: messages for the user about settings that are read differently here.
    """

    config: dict[str, Any]
    stage_sizes: tuple[int, ...] | None = None
    preprocessing: Preprocessing | None = None
    image_size: int | None = None
    transform: EvalTransform | None = None
    refusal: str = ""
    notes: tuple[str, ...] = ()


_KERAS = ResNetConfig(stride_in_1x1=True, conv_bias=True, bn_epsilon=1.001e-5, pool_padding=1)
_TORCH = ResNetConfig(stride_in_1x1=False, conv_bias=False, bn_epsilon=1e-5, pool_padding=1)
_KERAS_2016 = replace(_KERAS, bn_epsilon=1e-3)  # Keras's BatchNormalization default, then and now

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("keras", "keras", _KERAS, CAFFE),
        # keras-applications has run the files of 2016 with a padded max-pool since 2018-08-31, and without before.
        Variant("keras-2016", "keras-2016", _KERAS_2016, CAFFE),
        Variant("keras-2016-unpadded", "keras-2016", replace(_KERAS_2016, pool_padding=0), CAFFE),
        # timm uses torchvision's tensor names and network; its mean and std come from its config.json.
        Variant("torchvision", "torchvision", _TORCH, TORCH),
        Variant("huggingface", "huggingface", _TORCH, TORCH),
    )
}

# Library names by which users refer to the variants.
ALIASES = {
    **dict.fromkeys(("tensorflow", "tf", "caffe"), "keras"),
    **dict.fromkeys(("timm", "torch", "pytorch"), "torchvision"),
    **dict.fromkeys(("transformers", "hf", "hugging-face"), "huggingface"),
}


def check_depth(stage_sizes: tuple[int, ...], what: str) -> None:
    """Refuses networks of an unpublished depth.

    Raises:
      WeightsError: if the stage sizes are not those of a published network.
    """
    if stage_sizes not in DEPTHS:
        known = ", ".join(f"{sizes} ({name})" for sizes, name in DEPTHS.items())
        raise WeightsError(f"{what} holds a ResNet with {stage_sizes} blocks; supported are {known}. Use one of these.")


def check_variant(asked: str | None, family: str | None = None, what: str = "") -> None:
    """Refuses an unknown variant, or one that does not belong to the weights' family.

    Args:
      asked: the user's `--variant`.
      family: family of the weights' tensor names, if known.
      what: name of the weights in error messages.

    Raises:
      WeightsError: if the variant is unknown or of another family.
    """
    if asked is None:
        return
    if asked not in VARIANTS:
        raise WeightsError(no_such("--variant", asked, VARIANTS, ALIASES))
    if family is not None and VARIANTS[asked].family != family:
        raise WeightsError(
            f"--variant {asked} does not fit {what}, whose tensors have {family} names. Omit the option."
        )


def choose_variant(
    family: str, by_hash: str | None, description: Description | None, asked: str | None, what: str
) -> tuple[Variant, str]:
    """Chooses the variant of a file.

    Args:
      family: family of its tensor names.
      by_hash: the variant listed in the registry for this file, if any.
      description: the settings of the file's config, if any.
      asked: the user's `--variant`.
      what: the file's name in error messages.

    Returns:
      The variant, and a phrase for what decided it.

    Raises:
      WeightsError: if `asked` is unknown or contradicts the file.
    """
    check_variant(asked, family, what)
    default = VARIANTS[by_hash or family]
    if description is not None:
        described = replace(
            default,
            config=replace(default.config, **description.config),
            preprocessing=description.preprocessing or default.preprocessing,
            image_size=description.image_size or default.image_size,
        )
        if asked is not None and VARIANTS[asked].config != described.config:
            raise WeightsError(f"--variant {asked} contradicts the config of {what}. Omit the option.")
        same = [v for v in VARIANTS.values() if replace(v, name="") == replace(described, name="")]
        return same[0] if same else replace(described, name=f"{family} as described"), "its description"
    if asked is not None:
        return VARIANTS[asked], "--variant"
    return default, "its hash" if by_hash else "its tensor names"
