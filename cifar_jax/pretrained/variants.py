"""What differs between files that load without an error, and how a file's variant is chosen.

In this order: the file's known hash, a description inside the file or beside it, what the user says, the family of its
names.
The first two are facts about the file, so a user's `--variant` may only choose among what they leave open.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cifar_jax.errors import WeightsError, no_such
from cifar_jax.models.preprocess import CAFFE, TORCH, Preprocessing
from cifar_jax.models.resnet import DEPTHS, ResNetConfig


@dataclass(frozen=True)
class Variant:
    """One way in which a published ResNet was trained and is run.

    Attributes:
      name: as `--variant` takes it.
      family: the family of tensor names that its files have.
      config: of its ResNet50.
      preprocessing: what its input went through.
      image_size: side in pixels of the images it was trained with.
    """

    name: str
    family: str
    config: ResNetConfig
    preprocessing: Preprocessing
    image_size: int = 224


_KERAS = ResNetConfig(stride_in_1x1=True, conv_bias=True, bn_epsilon=1.001e-5, pool_padding=1)
_TORCH = ResNetConfig(stride_in_1x1=False, conv_bias=False, bn_epsilon=1e-5, pool_padding=1)
_KERAS_2016 = replace(_KERAS, bn_epsilon=1e-3)  # the BatchNormalization default of Keras at the time, and today

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("keras", "keras", _KERAS, CAFFE),
        # keras-applications runs the files of 2016 with a padded max-pool since 2018-08-31, and without it before.
        Variant("keras-2016", "keras-2016", _KERAS_2016, CAFFE),
        Variant("keras-2016-unpadded", "keras-2016", replace(_KERAS_2016, pool_padding=0), CAFFE),
        # timm has torchvision's names and network; the mean and deviation are those of its config.json.
        Variant("torchvision", "torchvision", _TORCH, TORCH),
        Variant("huggingface", "huggingface", _TORCH, TORCH),
    )
}

# What people call them by the library that a file is from.
ALIASES = {
    **dict.fromkeys(("tensorflow", "tf", "caffe"), "keras"),
    **dict.fromkeys(("timm", "torch", "pytorch"), "torchvision"),
    **dict.fromkeys(("transformers", "hf", "hugging-face"), "huggingface"),
}


def check_depth(stage_sizes: tuple[int, ...], what: str) -> None:
    """Refuses a network of another depth than those that are published.

    Raises:
      WeightsError: which says how many blocks there are and how many there should be.
    """
    if stage_sizes not in DEPTHS:
        known = ", ".join(f"{sizes} as {name}" for sizes, name in DEPTHS.items())
        raise WeightsError(f"{what} holds a ResNet with {stage_sizes} blocks, not {known}; give one of these.")


def check_variant(asked: str | None, family: str | None = None, what: str = "") -> None:
    """Refuses an unknown variant, or one of other weights than those at hand.

    Args:
      asked: the user's `--variant`.
      family: of the weights' tensor names, where it is known.
      what: the weights, for the error.

    Raises:
      WeightsError: which says what to give instead.
    """
    if asked is None:
        return
    if asked not in VARIANTS:
        raise WeightsError(no_such("--variant", asked, VARIANTS, ALIASES))
    if family is not None and VARIANTS[asked].family != family:
        raise WeightsError(
            f"--variant {asked} does not fit {what}, whose tensors have the names of {family}; leave the option out."
        )


def choose_variant(
    family: str, by_hash: str | None, describe: Callable[[Variant], Variant] | None, asked: str | None, what: str
) -> tuple[Variant, str]:
    """Chooses how a file is run.

    Args:
      family: of its tensor names.
      by_hash: the variant that the registry knows the file by, if it does.
      describe: puts what a description says into a variant, where there is a description.
      asked: the user's `--variant`.
      what: the file, for the error.

    Returns:
      The variant, and what decided it, in words.

    Raises:
      WeightsError: when `asked` is unknown or contradicts the file.
    """
    check_variant(asked, family, what)
    default = VARIANTS[by_hash or family]
    if describe is not None:
        described = describe(default)
        if asked is not None and VARIANTS[asked].config != described.config:
            raise WeightsError(f"--variant {asked} contradicts the description of {what}; leave the option out.")
        same = [v for v in VARIANTS.values() if replace(v, name="") == replace(described, name="")]
        chosen = same[0] if same else replace(described, name=f"{family} as described")
        return chosen, "its description"
    if asked is not None:
        return VARIANTS[asked], "--variant"
    return default, "its hash" if by_hash else "its tensor names"


def described_by_keras(model_config: Mapping[str, Any], what: str) -> Callable[[Variant], Variant]:
    """Puts what a Keras model description decides into a variant."""
    fields = _fields_of_keras(model_config, what)
    return lambda variant: replace(variant, config=replace(variant.config, **fields))


def _fields_of_keras(model_config: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The fields of ResNetConfig that a Keras model description decides, whatever its layers are called."""
    layers = list(_flat_layers(model_config.get("config", {})))
    by_class: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        by_class.setdefault(layer["class_name"], []).append(layer["config"])
    convs, norms = by_class.get("Conv2D", []), by_class.get("BatchNormalization", [])
    epsilons, biases = {norm["epsilon"] for norm in norms}, {conv["use_bias"] for conv in convs}
    # Behind the stem only 1x1 and 3x3 convolutions are left; one of the two kinds does all the striding of main paths.
    in_3x3 = any(tuple(c["kernel_size"]) == (3, 3) and tuple(c["strides"]) == (2, 2) for c in convs)
    if len(epsilons) != 1 or len(biases) != 1:
        raise WeightsError(
            f"The model description inside {what} is not that of a ResNet: its layers have the BatchNorm epsilons "
            f"{sorted(epsilons)} and biases {sorted(biases)} where one of each is expected."
        )
    return {
        "bn_epsilon": epsilons.pop(),
        "conv_bias": biases.pop(),
        "stride_in_1x1": not in_3x3,
        "pool_padding": len(by_class.get("ZeroPadding2D", [])) - 1,  # one is the stem's
    }


def _flat_layers(config: Any) -> Any:
    """All layers of a description, those of models inside models included."""
    for layer in config["layers"] if isinstance(config, Mapping) and "layers" in config else []:
        if "layers" in layer.get("config", {}):
            yield from _flat_layers(layer["config"])
        else:
            yield layer
