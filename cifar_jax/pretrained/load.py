"""Loads a backbone from a weights file or a registry name."""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cifar_jax.errors import WeightsError, did_you_mean
from cifar_jax.models.backbone import Backbone
from cifar_jax.pretrained import registry
from cifar_jax.pretrained.formats import safetensors_file
from cifar_jax.pretrained.formats.detect import detect_format, find_weights
from cifar_jax.pretrained.formats.keras_h5 import read_keras_archive, read_keras_h5
from cifar_jax.pretrained.formats.torch_file import read_torch, without_prefixes
from cifar_jax.pretrained.from_keras import parse_keras
from cifar_jax.pretrained.from_torch import is_known, parse_torch
from cifar_jax.pretrained.merge import ParsedWeights, backbone_of
from cifar_jax.pretrained.random_init import UNTRAINED
from cifar_jax.pretrained.variants import VARIANTS, check_variant

logger = logging.getLogger(__name__)

# Suffixes that mark an argument as a path, even if the file does not exist.
SUFFIXES = (".h5", ".hdf5", ".keras", ".pth", ".pt", ".bin", ".safetensors")


def load_backbone(
    path_or_name: str | Path,
    variant: str | None = None,
    *,
    cache_dir: str | None = None,
    progress: registry.Progress | None = None,
    known: Mapping[str, registry.Entry] | None = None,
) -> Backbone:
    """Loads a pretrained ResNet50, ResNet101 or ResNet152 without its top.

    Args:
      path_or_name: a weights file of Keras (.h5, .keras), PyTorch (.pth, .bin), timm or transformers (.safetensors), or
        of this project; a directory written by timm or transformers; or a name in the registry, such as
        `keras-resnet50`, for which a local copy is found by its hash or downloaded.
      variant: the variant, for files that leave it open; see `cifar_jax.pretrained.variants`.
      cache_dir: directory for downloads; defaults to $CIFAR_JAX_CACHE, then ~/.cache/cifar_jax.
      progress: creates the progress bar of a download.
      known: the registry of known files; by default weights/registry.json.

    Returns:
      The backbone; its `variant` also names what decided the variant.

    Raises:
      WeightsError: if there is no such file or name, the file is corrupt, or it holds another network.

    Example:
      >>> backbone = load_backbone("keras-resnet50")  # doctest: +SKIP
      >>> backbone.config.features, backbone.preprocessing.name  # doctest: +SKIP
      (2048, 'caffe')
    """
    parsed = read_weights(path_or_name, variant, cache_dir=cache_dir, progress=progress, known=known)
    for note in parsed.notes:
        logger.info(note)
    return backbone_of(parsed)


def read_weights(
    path_or_name: str | Path,
    variant: str | None = None,
    *,
    cache_dir: str | None = None,
    progress: registry.Progress | None = None,
    known: Mapping[str, registry.Entry] | None = None,
) -> ParsedWeights:
    """Parses weights without building the backbone, so they may still not fit; takes `load_backbone`'s arguments."""
    path, given = Path(os.path.expanduser(path_or_name)), str(path_or_name)
    known = registry.entries() if known is None else known
    if given in UNTRAINED:
        raise WeightsError(
            f"{given} is an untrained network, which is initialised rather than loaded. Use `random_backbone`."
        )
    entry = None if os.path.isfile(path) else known.get(given)
    # Checked first, so that a typo in the variant does not cost a download.
    by_name = VARIANTS.get(entry.variant) if entry else None
    check_variant(variant, by_name.family if by_name else None, given)
    if entry is not None:
        path = registry.fetch(entry, cache_dir, progress)
    elif not os.path.exists(path) and path.suffix not in SUFFIXES and path.parent == Path():
        names = [*known, *UNTRAINED]
        raise WeightsError(
            f"No file or known weights named {given!r}.{did_you_mean(given, names, registry.ALIASES)} --weights takes "
            f"a path or one of {', '.join(names)}."
        )
    if os.path.isdir(path):
        path = find_weights(path)
    notes: list[str] = []
    try:
        parsed = _parse(path, variant, known, notes)
    except WeightsError:
        for note in notes:  # they may explain the error
            logger.info(note)
        raise
    return replace(parsed, notes=(*notes, *parsed.notes))


def _parse(path: Path, asked: str | None, known: Mapping[str, registry.Entry], notes: list[str]) -> ParsedWeights:
    """Parses a file; appends to `notes` the findings that hold even if parsing fails later."""
    file_format = detect_format(path)
    if file_format == "safetensors":
        safe = safetensors_file.read_safetensors(path)
        tensors = without_prefixes(safe.tensors)
        if safetensors_file.KEY in safe.metadata or not is_known(tensors):
            if asked is not None and safetensors_file.KEY in safe.metadata:
                raise WeightsError(
                    f"--variant {asked} does not apply to {path}, which records its own variant. Omit it."
                )
            return safetensors_file.parse_native(path, safe)
    entry, mismatch = registry.entry_of_file(path, known)
    by_hash = entry.variant if entry else None
    if mismatch:
        notes.append(mismatch)
    if file_format == "safetensors":
        parsed = parse_torch(path, tensors, by_hash, asked)
    elif file_format == "hdf5":
        parsed = parse_keras(path, read_keras_h5(path, known=entry is not None), by_hash, asked)
    elif file_format == "zip" and (file := read_keras_archive(path)) is not None:
        parsed = parse_keras(path, file, by_hash, asked)
    else:
        checkpoint = read_torch(path)
        if checkpoint.others:
            place, others = checkpoint.place, ", ".join(checkpoint.others)
            notes.append(f"{path} holds several state dicts: loading {place}, ignoring {others}.")
        parsed = parse_torch(path, checkpoint.tensors, by_hash, asked)
    return replace(parsed, transform=entry.transform) if entry and entry.transform else parsed
