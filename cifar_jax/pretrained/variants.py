"""Network variants that share tensor names and shapes but compute different functions.

A file's variant is decided, in this order, by its hash, by a config inside the file or next to it, by the user's
`--variant`, and by the family of its tensor names. The first two are facts about the file, so `--variant` can only
choose what they leave open.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cifar_jax.errors import WeightsError, no_such
from cifar_jax.models.preprocess import CAFFE, TORCH, Preprocessing
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
    family: str, by_hash: str | None, apply_config: Callable[[Variant], Variant] | None, asked: str | None, what: str
) -> tuple[Variant, str]:
    """Chooses the variant of a file.

    Args:
      family: family of its tensor names.
      by_hash: the variant listed in the registry for this file, if any.
      apply_config: updates a variant with the settings of the file's config; None if there is no config.
      asked: the user's `--variant`.
      what: the file's name in error messages.

    Returns:
      The variant, and a phrase for what decided it.

    Raises:
      WeightsError: if `asked` is unknown or contradicts the file.
    """
    check_variant(asked, family, what)
    default = VARIANTS[by_hash or family]
    if apply_config is not None:
        described = apply_config(default)
        if asked is not None and VARIANTS[asked].config != described.config:
            raise WeightsError(f"--variant {asked} contradicts the config of {what}. Omit the option.")
        same = [v for v in VARIANTS.values() if replace(v, name="") == replace(described, name="")]
        chosen = same[0] if same else replace(described, name=f"{family} as described")
        return chosen, "its description"
    if asked is not None:
        return VARIANTS[asked], "--variant"
    return default, "its hash" if by_hash else "its tensor names"


def parse_keras_config(model_config: Mapping[str, Any], what: str) -> Callable[[Variant], Variant]:
    """Returns a function that updates a variant with the settings of a Keras model config."""
    fields = _config_fields(model_config, what)
    return lambda variant: replace(variant, config=replace(variant.config, **fields))


def _config_fields(model_config: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Returns the fields of ResNetConfig that a Keras model config fixes, regardless of layer names."""
    layers = list(_flat_layers(model_config.get("config", {})))
    by_class: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        by_class.setdefault(layer["class_name"], []).append(layer["config"])
    convs, norms = by_class.get("Conv2D", []), by_class.get("BatchNormalization", [])
    epsilons, biases = {norm["epsilon"] for norm in norms}, {conv["use_bias"] for conv in convs}
    # After the stem there are only 1x1 and 3x3 convolutions, and one of the two kinds does all the main-path striding.
    in_3x3 = any(tuple(c["kernel_size"]) == (3, 3) and tuple(c["strides"]) == (2, 2) for c in convs)
    if len(epsilons) != 1 or len(biases) != 1:
        raise WeightsError(
            f"The model config inside {what} is not that of a ResNet: expected one BatchNorm epsilon and one use_bias "
            f"for all layers, got {sorted(epsilons)} and {sorted(biases)}. Get a fresh copy of the file."
        )
    return {
        "bn_epsilon": epsilons.pop(),
        "conv_bias": biases.pop(),
        "stride_in_1x1": not in_3x3,
        "pool_padding": len(by_class.get("ZeroPadding2D", [])) - 1,  # the other one pads the stem's convolution
    }


def _flat_layers(config: Any) -> Any:
    """Yields all layers of a model config, including those of nested models."""
    for layer in config["layers"] if isinstance(config, Mapping) and "layers" in config else []:
        if "layers" in layer.get("config", {}):
            yield from _flat_layers(layer["config"])
        else:
            yield layer
