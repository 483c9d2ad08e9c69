"""Reader for the layout of Keras 3: weights by class and number, `layers/conv2d_7/vars/0`, in .weights.h5 and .keras.

There are two ways to find the layer that `conv2d_7` belongs to: newer releases store each layer's name with its
weights, and a `.keras` archive holds the model config, in whose order the layers of each class are numbered. Files with
neither are refused rather than guessed at.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cifar_jax.errors import WeightsError
from cifar_jax.pretrained.formats.archive import open_archive
from cifar_jax.pretrained.formats.hdf5 import TensorReader, get_member

# Tensor names by layer class, in the order of their numbers; a convolution without bias has only the first.
TENSORS = {
    "conv2d": ("kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "dense": ("kernel", "bias"),
}
DESCRIPTION, WEIGHTS = "config.json", "model.weights.h5"  # in a .keras archive


def read_archive(path: Path) -> tuple[bytes, dict[str, Any]] | None:
    """Reads the weights file and the model config in a `.keras` archive; returns None for other archives.

    Raises:
      WeightsError: if the archive or its config is corrupt.
    """
    with open_archive(path) as archive:
        if not {DESCRIPTION, WEIGHTS} <= set(archive.namelist()):
            return None
        content, description = archive.read(WEIGHTS), archive.read(DESCRIPTION)
    try:
        config = json.loads(description)
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{DESCRIPTION} in {path} cannot be parsed ({error}). Get a fresh copy of the file."
        ) from error
    return content, config


def read_tensors(root: h5py.Group, description: Mapping[str, Any] | None, path: Path) -> dict[str, np.ndarray]:
    """Reads all tensors as `layer/tensor`.

    Args:
      root: the group with the member `layers`.
      description: the model config, if there is one.
      path: path of the file for error messages.

    Raises:
      WeightsError: if the file does not name the layers, or contradicts itself.
    """
    layers = get_member(root, "layers", path)
    groups = list(_groups_with_weights(layers, path))
    if description is None:
        named = [(_stored_name(group, path), group) for group in groups]
    else:
        named = list(_layers_by_description(layers, description.get("config", {}), path))
        unlisted = sorted({group.name for group in groups} - {group.name for _, group in named})
        if unlisted:
            raise WeightsError(
                f"{path} holds weights in {unlisted[0]} that its model config does not list. Get a fresh copy of the "
                "file."
            )
    tensors: dict[str, np.ndarray] = {}
    read = TensorReader(path)
    for layer, group in named:
        kind = re.sub(r"_\d+$", "", group.name.split("/")[-2])
        known = TENSORS.get(kind, ())
        for number in group:
            name = known[int(number)] if number.isdecimal() and int(number) < len(known) else number
            if f"{layer}/{name}" in tensors:
                raise WeightsError(
                    f"{path} holds {layer}/{name} twice, which is ambiguous. Get a fresh copy of the file."
                )
            tensors[f"{layer}/{name}"] = read(group, number)
    return tensors


def _groups_with_weights(layers: h5py.Group, path: Path) -> Iterator[h5py.Group]:
    """Yields all non-empty groups of variables, those of nested models included."""
    for name in layers:
        group = get_member(layers, name, path)
        if "layers" in group:
            yield from _groups_with_weights(get_member(group, "layers", path), path)
        if "vars" in group and len(variables := get_member(group, "vars", path)):
            yield variables


def _stored_name(variables: h5py.Group, path: Path) -> str:
    if "name" not in variables.attrs:
        raise WeightsError(
            f"{path} was written by Keras 3's save_weights, which stores no layer names. Save the whole model with "
            "model.save('model.h5') and use that file."
        )
    return str(variables.attrs["name"])


def _layers_by_description(layers: h5py.Group, config: Any, path: Path) -> Iterator[tuple[str, h5py.Group]]:
    """Yields the name and variables of each layer with weights, numbered in the order of the model config."""
    used: Counter[str] = Counter()
    for layer in config["layers"]:
        kind, about = snake_case(layer["class_name"]), layer["config"]
        number, used[kind] = used[kind], used[kind] + 1
        group = f"{kind}_{number}" if number else kind
        if "layers" in about:
            yield from _layers_by_description(get_member(layers, f"{group}/layers", path), about, path)
        elif group in layers and "vars" in layers[group]:
            variables = get_member(layers, f"{group}/vars", path)
            if str(variables.attrs.get("name", about["name"])) != about["name"]:
                raise WeightsError(
                    f"{path} contradicts itself: {variables.name} is named {variables.attrs['name']!r}, but "
                    f"{about['name']!r} in the model config. Get a fresh copy of the file."
                )
            yield about["name"], variables


def snake_case(name: str) -> str:
    """Converts a class name to a group name as Keras does: `conv2d`, `batch_normalization`."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
