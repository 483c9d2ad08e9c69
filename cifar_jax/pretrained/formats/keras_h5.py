"""Reader for Keras files, using h5py only: weights files of Keras 1, 2 and 3, whole models of Keras 2 and 3."""

import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from cifar_jax.errors import WeightsError
from cifar_jax.pretrained.formats import keras3
from cifar_jax.pretrained.formats.hdf5 import TensorReader, get_member, probe
from cifar_jax.pretrained.names.keras import OLDEST_TENSORS


class KerasFile(NamedTuple):
    """The content of a Keras file: its tensors as `layer/tensor`, and the model config if it is a whole model."""

    tensors: dict[str, np.ndarray]
    model_config: dict[str, Any] | None


def read_keras_h5(path: Path, known: bool = False) -> KerasFile:
    """Reads all tensors of a file.

    Args:
      path: an HDF5 file written by `save_weights` or `save` of any Keras version.
      known: whether it is bit-identical to a known file, which makes the probe in a separate process unnecessary.

    Raises:
      WeightsError: if the file is not HDF5, is truncated, or does not have Keras's layout.
    """
    if not known:
        probe(path, path)
    return _read(path, path, None)


def read_keras_archive(path: Path) -> KerasFile | None:
    """Reads all tensors of a `.keras` archive of Keras 2 or 3; returns None for other archives.

    Raises:
      WeightsError: if the archive is corrupt or does not have Keras's layout.
    """
    found = keras3.read_archive(path)
    if found is None:
        return None
    content, description = found
    probe(content, path)
    return _read(io.BytesIO(content), path, description)


def _read(source: Path | io.BytesIO, path: Path, description: dict[str, Any] | None) -> KerasFile:
    try:
        with h5py.File(source, "r") as file:
            root = get_member(file, "model_weights", path) if "model_weights" in file else file
            if "layers" in root and "layer_names" not in root.attrs:
                return KerasFile(keras3.read_tensors(root, description, path), description)
            if "layer_names" not in root.attrs:
                raise WeightsError(
                    f"{path} is an HDF5 file but not a Keras file: it has no layer_names. Use the weights of a Keras "
                    "ResNet50, ResNet101 or ResNet152."
                )
            config = file.attrs.get("model_config")
            return KerasFile(_layer_tensors(root, path), None if config is None else json.loads(config))
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} is corrupt or truncated ({error}). Get a fresh copy of the file.") from error


def _layer_tensors(root: h5py.Group, path: Path) -> dict[str, np.ndarray]:
    """Reads all tensors in the layout of Keras 1 and 2, as `layer/tensor`."""
    tensors: dict[str, np.ndarray] = {}
    read = TensorReader(path)
    for layer in _read_names(root, "layer_names"):
        group = get_member(root, layer, path)
        for weight in _read_names(group, "weight_names"):
            name = _canonical_name(layer, weight)
            if name in tensors:
                raise WeightsError(f"{path} holds {name} twice, which is ambiguous. Get a fresh copy of the file.")
            tensors[name] = read(group, weight)
    return tensors


def _read_names(group: h5py.Group, attribute: str) -> list[str]:
    """Reads a list of names from an attribute; Keras splits lists over 64 kB into attribute0, attribute1, ..."""
    if attribute in group.attrs:
        chunks = [group.attrs[attribute]]
    else:
        numbered = (f"{attribute}{n}" for n in range(len(group.attrs)))
        chunks = [group.attrs[name] for name in numbered if name in group.attrs]
    return [item.decode() if isinstance(item, bytes) else str(item) for chunk in chunks for item in chunk]


def _canonical_name(layer: str, weight: str) -> str:
    """Returns today's `layer/tensor` name for `conv1_conv/kernel:0` as well as for Keras 1's `conv1_W:0`."""
    *scopes, last = weight.split("/")
    layer = scopes[-1] if scopes else layer
    tensor = re.sub(r":\d+$", "", last).removeprefix(f"{layer}_")
    return f"{layer}/{OLDEST_TENSORS.get(tensor, tensor)}"
