"""Reads the HDF5 files of Keras, with h5py alone: weights files of Keras 1 and 2, and whole models of Keras 2 and 3."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cifar_jax.pretrained.errors import WeightsError
from cifar_jax.pretrained.keras_names import OLDEST_TENSORS

# The largest tensor of a ResNet50 has 2.4 million. A file of a few bytes can claim any number.
MOST_NUMBERS = 100_000_000


@dataclass(frozen=True)
class KerasFile:
    """What a file holds: its tensors as `layer/tensor`, and the model's description where it is a whole model."""

    tensors: dict[str, np.ndarray]
    model_config: dict[str, Any] | None

    @property
    def layers(self) -> set[str]:
        """Names of the layers that have tensors."""
        return {name.rpartition("/")[0] for name in self.tensors}


def read_keras_h5(path: Path) -> KerasFile:
    """Reads all tensors of a file.

    Args:
      path: an HDF5 file written by `save_weights` or `save` of any Keras that wrote the legacy layout.

    Raises:
      WeightsError: when the file is no HDF5 file, is cut short, or is not laid out as Keras does.
    """
    check_signature(path)
    try:
        with h5py.File(path, "r") as file:
            root = _own(file, "model_weights", path) if "model_weights" in file else file
            if "layers" in root and "layer_names" not in root.attrs:
                raise WeightsError(
                    f"{path} was written by Keras 3's save_weights, which keeps no layer names to match by; save the "
                    "whole model with model.save('model.h5') and give that file."
                )
            if "layer_names" not in root.attrs:
                raise WeightsError(
                    f"{path} is an HDF5 file but not one of Keras's: it has no layer_names; give the weights file of a "
                    "Keras ResNet50."
                )
            tensors: dict[str, np.ndarray] = {}
            for layer in _texts(root, "layer_names"):
                group = _own(root, layer, path)
                for weight in _texts(group, "weight_names"):
                    name = _canonical_name(layer, weight)
                    if name in tensors:
                        raise WeightsError(f"{path} holds {name} twice; it cannot be told which one is meant.")
                    tensors[name] = _tensor(group, weight, path)
            config = file.attrs.get("model_config")
            return KerasFile(tensors, None if config is None else json.loads(config))
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise WeightsError(f"{path} is damaged or cut short ({error}); get the file again.") from error


def check_signature(path: Path) -> None:
    """Tells apart, from its first bytes, an HDF5 file and what is often found in its place.

    Raises:
      WeightsError: when the file is missing, a directory, unreadable, empty, a web page, or something else.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        what = "a directory" if os.path.isdir(path) else "not a regular file"
        raise WeightsError(f"{path} is {what}; --weights takes a weights file or a name that `info` lists.")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise WeightsError(
            f"{path} does not exist; --weights takes a weights file or a name that `info` lists."
        ) from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); check its name and permissions.") from error
    if not start:
        raise WeightsError(f"{path} is empty; get the file again.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(
            f"{path} is a web page, not weights: the download was answered with an error or a login page; get it again."
        )
    if not start.startswith(b"\x89HDF\r\n\x1a\n"):
        raise WeightsError(f"{path} is not an HDF5 file, so not weights of Keras; give a Keras .h5 file.")


def _own(group: h5py.Group, name: str, path: Path) -> Any:
    """What a group holds under a name, read from this file and no other: that one was asked for and hashed."""
    at: Any = group
    for part in filter(None, name.split("/")):
        link = at.get(part, getlink=True) if isinstance(at, h5py.Group) else None
        if not isinstance(link, h5py.HardLink):
            raise WeightsError(f"{path} has no {group.name.rstrip('/')}/{name} of its own; get the file again.")
        at = at[part]
    return at


def _tensor(group: h5py.Group, weight: str, path: Path) -> np.ndarray:
    tensor = _own(group, weight, path)
    if not isinstance(tensor, h5py.Dataset) or tensor.dtype.kind != "f" or tensor.size is None:
        raise WeightsError(
            f"{path} holds {group.name}/{weight}, which is not an array of floating-point numbers; get the file again."
        )
    if tensor.external or tensor.is_virtual:
        raise WeightsError(f"{path} keeps {group.name}/{weight} in another file; get the file again.")
    if tensor.size > MOST_NUMBERS:
        raise WeightsError(f"{path} holds {group.name}/{weight} {tensor.shape}, too large for a ResNet50.")
    return np.asarray(tensor[()], np.float32)


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
