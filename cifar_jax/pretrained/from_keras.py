"""From the tensors of a Keras file to what they are."""

from dataclasses import replace
from pathlib import Path

from cifar_jax.errors import WeightsError
from cifar_jax.pretrained.formats.keras_h5 import KerasFile
from cifar_jax.pretrained.names import keras as keras_names
from cifar_jax.pretrained.reading import Reading
from cifar_jax.pretrained.variants import check_depth, choose_variant, described_by_keras


def reading_of_keras(path: Path, file: KerasFile, by_hash: str | None = None, asked: str | None = None) -> Reading:
    """Tells what a Keras file holds.

    Args:
      path: the file.
      file: what was read from it.
      by_hash: the variant that the registry knows the file by, if it does.
      asked: the user's `--variant`.

    Raises:
      WeightsError: when it is another network.
    """
    family = keras_names.family_of(file.layers)
    if family is None:
        raise WeightsError(
            f"{path} is not a ResNet50 of Keras: its layers are called {', '.join(sorted(file.layers)[:4])} and so on."
        )
    sizes = keras_names.stage_sizes_of(file.layers, family)
    check_depth(sizes, str(path))
    try:
        describe = None if file.model_config is None else described_by_keras(file.model_config, str(path))
        variant, reason = choose_variant(family, by_hash, describe, asked, str(path))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} holds a model description that cannot be read; get the file again.") from error
    top = next((layer for layer in keras_names.TOP_LAYERS if layer in file.layers), keras_names.TOP_LAYERS[0])
    return Reading(
        path,
        family,
        file.tensors,
        keras_names.name_map(sizes, family),
        (f"{top}/kernel", f"{top}/bias"),
        replace(variant.config, stage_sizes=sizes),
        variant.preprocessing,
        variant.image_size,
        f"{variant.name} (by {reason})",
    )
