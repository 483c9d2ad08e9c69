"""From a file or a known name to a backbone that runs as it was trained, or a refusal that says why not."""

import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from cifar_jax.errors import WeightsError, did_you_mean
from cifar_jax.models.backbone import Backbone
from cifar_jax.pretrained import registry
from cifar_jax.pretrained.formats import native
from cifar_jax.pretrained.formats.detect import form_of, weights_in
from cifar_jax.pretrained.formats.keras_h5 import read_keras_archive, read_keras_h5
from cifar_jax.pretrained.formats.torch_file import read_torch, without_prefixes
from cifar_jax.pretrained.from_keras import reading_of_keras
from cifar_jax.pretrained.from_torch import family_of, reading_of_torch
from cifar_jax.pretrained.reading import Reading, backbone_of
from cifar_jax.pretrained.untrained import UNTRAINED
from cifar_jax.pretrained.variants import VARIANTS, check_variant

logger = logging.getLogger(__name__)

# What the name of a file ends in that was meant as one, even if it is not there.
SUFFIXES = (".h5", ".hdf5", ".keras", ".pth", ".pt", ".bin", ".safetensors")


def load_backbone(
    path_or_name: str | Path,
    variant: str | None = None,
    *,
    cache_dir: str | None = None,
    progress: registry.Progress = registry.no_progress,
) -> Backbone:
    """Loads a pretrained ResNet50, 101 or 152 without its top.

    Args:
      path_or_name: a weights file of Keras (.h5, .keras), PyTorch (.pth, .bin), timm or transformers (.safetensors), or
        of this project; a directory of the latter two; or a name of the registry, such as `keras-resnet50`, of which a
        local copy is found by its hash or downloaded.
      variant: how to run it, where the file leaves that open; see `cifar_jax.pretrained.variants`.
      cache_dir: where downloads are kept; else $CIFAR_JAX_CACHE, else ~/.cache/cifar_jax.
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
    reading = read_weights(path_or_name, variant, cache_dir=cache_dir, progress=progress)
    _log(reading.notes)
    return backbone_of(reading)


def read_weights(
    path_or_name: str | Path,
    variant: str | None = None,
    *,
    cache_dir: str | None = None,
    progress: registry.Progress = registry.no_progress,
) -> Reading:
    """Tells what weights are, which may still not fit their network; the arguments are those of `load_backbone`."""
    path = Path(os.path.expanduser(path_or_name))
    if str(path_or_name) in UNTRAINED:
        raise WeightsError(
            f"{path_or_name} is an untrained network, which is made from images, not loaded: use `random_backbone`."
        )
    entry = None if os.path.isfile(path) else registry.entries().get(str(path_or_name))
    # Before a download, which a variant typed wrong should not cost.
    known = VARIANTS.get(entry.variant) if entry else None
    check_variant(variant, known.family if known else None, str(path_or_name))
    if entry is not None:
        path = registry.fetch(str(path_or_name), cache_dir, progress)
    elif not os.path.exists(path) and path.suffix not in SUFFIXES and path.parent == Path():
        names = [*registry.entries(), *UNTRAINED]
        raise WeightsError(
            f"There is no file and no known name {str(path_or_name)!r}."
            f"{did_you_mean(str(path_or_name), names, registry.ALIASES)} --weights takes a path or one of "
            f"{', '.join(names)}."
        )
    return _from_file(weights_in(path) if os.path.isdir(path) else path, variant)


def _from_file(path: Path, asked: str | None) -> Reading:
    notes: list[str] = []
    try:
        reading = _reading_of(path, asked, notes)
    except WeightsError:
        _log(notes)  # which may explain the error
        raise
    return replace(reading, notes=(*notes, *reading.notes))


def _reading_of(path: Path, asked: str | None, notes: list[str]) -> Reading:
    """What a file holds; adds to the notes what is known of it before all of it is read."""
    form = form_of(path)
    if form == "safetensors":
        safe = native.read_safetensors(path)
        tensors = without_prefixes(safe.tensors)
        if native.KEY in safe.metadata or family_of(tensors) is None:
            if asked is not None:
                raise WeightsError(
                    f"--variant {asked} is not for {path}, which says itself how it is run; leave it out."
                )
            return native.reading_of_ours(path, safe)
        return reading_of_torch(path, tensors, _known_variant(path, notes), asked)
    by_hash = _known_variant(path, notes)
    if form == "hdf5":
        return reading_of_keras(path, read_keras_h5(path, known=by_hash is not None), by_hash, asked)
    if form == "zip" and (file := read_keras_archive(path)) is not None:
        return reading_of_keras(path, file, by_hash, asked)
    checkpoint = read_torch(path)
    if checkpoint.others:
        place, others = checkpoint.place, ", ".join(checkpoint.others)
        notes.append(f"{path} holds {place} and {others}: {place} is loaded.")
    return reading_of_torch(path, checkpoint.tensors, by_hash, asked)


def _known_variant(path: Path, notes: list[str]) -> str | None:
    """The variant that the registry knows a file by; notes if the file has the size of a known one and is another."""
    entry = registry.entry_of_file(path)
    if entry is None and (twins := registry.entries_of_size(path)):
        notes.append(
            f"{path} has the size of {twins[0].name} and not its digest, {twins[0].digest}: changed weights, or a "
            "damaged copy of them."
        )
    return entry.variant if entry else None


def _log(notes: Iterable[str]) -> None:
    for note in notes:
        logger.info(note)
