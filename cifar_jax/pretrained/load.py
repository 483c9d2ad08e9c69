"""From a file or a known name to a backbone that runs as it was trained, or a refusal that says why not."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.files import sha256_of_file
from cifar_jax.pretrained import keras_names, registry
from cifar_jax.pretrained.backbone import Backbone
from cifar_jax.pretrained.canonical import read_backbone
from cifar_jax.pretrained.errors import WeightsError
from cifar_jax.pretrained.keras_h5 import KerasFile, check_signature, read_keras_h5
from cifar_jax.pretrained.merge import merge
from cifar_jax.pretrained.untrained import UNTRAINED
from cifar_jax.pretrained.variants import choose_variant
from cifar_jax.resnet import ResNetConfig

RESNET50 = ResNetConfig().stage_sizes


def load_backbone(
    path_or_name: str | Path,
    variant: str | None = None,
    *,
    cache_dir: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    progress: registry.Progress = registry.no_progress,
) -> Backbone:
    """Loads a pretrained ResNet50 without its top.

    Args:
      path_or_name: a Keras .h5 file of either generation, a .safetensors file of this project, or a name of the
        registry, such as `keras-resnet50`, of which a local copy is found by its hash or downloaded.
      variant: how to run it, where the file leaves that open; see `cifar_jax.pretrained.variants`.
      cache_dir: where downloads are kept; else $CIFAR_JAX_CACHE, else ~/.cache/cifar_jax.
      say: is called with each sentence that the user should see.
      progress: makes the bar that shows a download.

    Returns:
      The backbone; its `variant` says what decided how it is run.

    Raises:
      WeightsError: when there is no such file or name, the file is damaged, or it is another network.

    Example:
      >>> backbone = load_backbone("keras-resnet50")  # doctest: +SKIP
      >>> backbone.config.features, backbone.preprocessing.name  # doctest: +SKIP
      (2048, 'caffe')
    """
    path = Path(os.path.expanduser(path_or_name))
    if str(path_or_name) in UNTRAINED:
        raise WeightsError(
            f"{path_or_name} is an untrained network, which is made from images, not loaded: use `random_backbone`."
        )
    if str(path_or_name) in registry.entries() and not os.path.isfile(path):
        path = registry.fetch(str(path_or_name), cache_dir, say, progress)
    elif not os.path.exists(path) and path.suffix not in (".h5", ".hdf5", ".safetensors") and path.parent == Path():
        raise WeightsError(
            f"There is no file and no known name {str(path_or_name)!r}; --weights takes a path or one of "
            f"{', '.join([*registry.entries(), *UNTRAINED])}."
        )
    if path.suffix == ".safetensors" and os.path.isfile(path):
        if variant is not None:
            raise WeightsError(f"--variant {variant} is not for {path}, which says itself how it is run; leave it out.")
        return read_backbone(path)
    return _from_keras(path, variant, say)


def _from_keras(path: Path, asked: str | None, say: Callable[[str], None]) -> Backbone:
    check_signature(path)
    entry = registry.entry_of_file(path)
    if entry is None and (twins := registry.entries_of_size(path)):
        say(
            f"{path} has the size of {twins[0].name} and not its digest, {twins[0].digest}: changed weights, or a "
            "damaged copy of them."
        )
    file = read_keras_h5(path)
    family = keras_names.family_of(file.layers)
    if family is None:
        raise WeightsError(
            f"{path} is not a ResNet50 of Keras: its layers are called {', '.join(sorted(file.layers)[:4])} and so on."
        )
    if (sizes := keras_names.stage_sizes_of(file.layers, family)) != RESNET50:
        raise WeightsError(f"{path} holds a ResNet with {sizes} blocks, not {RESNET50} as ResNet50; give a ResNet50.")
    by_hash = entry.variant if entry else None
    try:
        variant, reason = choose_variant(family, by_hash, file.model_config, asked, str(path))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} holds a model description that cannot be read; get the file again.") from error
    return Backbone(
        variant.config,
        variant.preprocessing,
        variant.image_size,
        variables_from_keras(file, family, variant.config, str(path)),
        sha256=sha256_of_file(path),
        source=str(path),
        variant=f"{variant.name} (by {reason})",
        top=_top(file),
    )


def variables_from_keras(file: KerasFile, family: str, config: ResNetConfig, what: str) -> dict[str, Any]:
    """The network's variables from a Keras file's tensors: a total merge by name, the top set aside.

    A network of any width and depth converts, as long as `config.stage_sizes` says which.

    Raises:
      WeightsError: when a tensor is missing, not known, or of another shape.
    """
    names = keras_names.name_map(config.stage_sizes, family)
    ignored = [name for name in file.tensors if name.rpartition("/")[0] in keras_names.TOP_LAYERS]
    return merge(file.tensors, names, config, ignored, what)


def _top(file: KerasFile) -> dict[str, np.ndarray] | None:
    """The file's own classifier, for those who want its 1000 classes."""
    for layer in keras_names.TOP_LAYERS:
        if f"{layer}/kernel" in file.tensors:
            return {tensor: file.tensors[f"{layer}/{tensor}"] for tensor in ("kernel", "bias")}
    return None
