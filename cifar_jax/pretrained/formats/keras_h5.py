"""Reads the files of Keras, with h5py alone: weights files of Keras 1, 2 and 3, whole models of Keras 2 and 3."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cifar_jax.errors import WeightsError
from cifar_jax.pretrained.formats import keras3
from cifar_jax.pretrained.formats.hdf5 import TensorReader, own, probe
from cifar_jax.pretrained.names.keras import OLDEST_TENSORS


@dataclass(frozen=True)
class KerasFile:
    """What a file holds: its tensors as `layer/tensor`, and the model's description where it is a whole model."""

    tensors: dict[str, np.ndarray]
    model_config: dict[str, Any] | None

    @property
    def layers(self) -> set[str]:
        """Names of the layers that have tensors."""
        return {name.rpartition("/")[0] for name in self.tensors}


def read_keras_h5(path: Path, known: bool = False) -> KerasFile:
    """Reads all tensors of a file.

    Args:
      path: an HDF5 file written by `save_weights` or `save` of any Keras.
      known: whether its bytes are those of a known file, which need not be read by another process first.

    Raises:
      WeightsError: when the file is no HDF5 file, is cut short, or is not laid out as Keras does.
    """
    if not known:
        probe(path, path)
    return _read(lambda: h5py.File(path, "r"), path, None)


def read_keras_archive(path: Path) -> KerasFile | None:
    """Reads all tensors of a `.keras` archive of Keras 2 or 3, or gives None for another archive.

    Raises:
      WeightsError: when the archive is damaged or not laid out as Keras does.
    """
    found = keras3.read_archive(path)
    if found is None:
        return None
    content, description = found
    probe(content, path)
    return _read(lambda: keras3.opened(content), path, description)


def _read(opened: Callable[[], h5py.File], path: Path, description: dict[str, Any] | None) -> KerasFile:
    try:
        with opened() as file:
            root = own(file, "model_weights", path) if "model_weights" in file else file
            if "layers" in root and "layer_names" not in root.attrs:
                return KerasFile(keras3.tensors_of(root, description, path), description)
            if "layer_names" not in root.attrs:
                raise WeightsError(
                    f"{path} is an HDF5 file but not one of Keras's: it has no layer_names; give the weights file of a "
                    "Keras ResNet50."
                )
            config = file.attrs.get("model_config")
            return KerasFile(_layer_tensors(root, path), None if config is None else json.loads(config))
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} is damaged or cut short ({error}); get the file again.") from error


def _layer_tensors(root: h5py.Group, path: Path) -> dict[str, np.ndarray]:
    """All tensors of the layout of Keras 1 and 2, as `layer/tensor`."""
    tensors: dict[str, np.ndarray] = {}
    read = TensorReader(path)
    for layer in _texts(root, "layer_names"):
        group = own(root, layer, path)
        for weight in _texts(group, "weight_names"):
            name = _canonical_name(layer, weight)
            if name in tensors:
                raise WeightsError(f"{path} holds {name} twice; it cannot be told which one is meant.")
            tensors[name] = read(group, weight)
    return tensors


def _texts(group: h5py.Group, attribute: str) -> list[str]:
    """A list of names kept as an attribute; Keras splits those over 64 kB into attribute0, attribute1, ..."""
    if attribute in group.attrs:
        chunks = [group.attrs[attribute]]
    else:
        numbered = (f"{attribute}{n}" for n in range(len(group.attrs)))
        chunks = [group.attrs[name] for name in numbered if name in group.attrs]
    return [item.decode() if isinstance(item, bytes) else str(item) for chunk in chunks for item in chunk]


def _canonical_name(layer: str, weight: str) -> str:
    """`layer/tensor` in today's words, from `conv1_conv/kernel:0` as well as from Keras 1's `conv1_W:0`."""
    *scopes, last = weight.split("/")
    layer = scopes[-1] if scopes else layer
    tensor = re.sub(r":\d+$", "", last).removeprefix(f"{layer}_")
    return f"{layer}/{OLDEST_TENSORS.get(tensor, tensor)}"
