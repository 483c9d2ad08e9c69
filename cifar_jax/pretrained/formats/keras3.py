"""Reads the layout of Keras 3: weights by class and number, `layers/conv2d_7/vars/0`, in .weights.h5 and .keras files.

Whose weights `conv2d_7` are, the file tells in one of two ways: newer releases keep each layer's name beside them, and
a `.keras` archive holds the model's description, whose layers of each class are numbered in its order. Where there is
neither, nothing is guessed.
"""

import io
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
from cifar_jax.pretrained.formats.hdf5 import TensorReader, own

# The tensors of a layer by its class, numbered from 0; a convolution without bias has one less.
TENSORS = {
    "conv2d": ("kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "dense": ("kernel", "bias"),
}
DESCRIPTION, WEIGHTS = "config.json", "model.weights.h5"  # in a .keras archive


def read_archive(path: Path) -> tuple[bytes, dict[str, Any]] | None:
    """The weights file and the description inside a `.keras` archive, or None for another archive.

    Raises:
      WeightsError: when the archive or its description is damaged.
    """
    with open_archive(path) as archive:
        if not {DESCRIPTION, WEIGHTS} <= set(archive.names):
            return None
        try:
            description = json.loads(archive.read(DESCRIPTION))
            if not isinstance(description, dict):
                raise ValueError("it is no JSON object")
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{path} has a {DESCRIPTION} that cannot be read ({error}); get it again.") from error
        return archive.read(WEIGHTS), description


def opened(content: bytes) -> h5py.File:
    """An HDF5 file that lies in memory."""
    return h5py.File(io.BytesIO(content), "r")


def tensors_of(root: h5py.Group, description: Mapping[str, Any] | None, path: Path) -> dict[str, np.ndarray]:
    """All tensors of the layers, as `layer/tensor`.

    Args:
      root: the group that has `layers`.
      description: the model's, where there is one.
      path: the file, for the error.

    Raises:
      WeightsError: when nothing says whose weights they are, or what says it is wrong.
    """
    layers = own(root, "layers", path)
    if description is None:
        named = list(_named(layers, path))
    else:
        named = list(_described(layers, description.get("config", {}), path))
        untold = sorted(_with_weights(layers, path) - {group.name for _, _, group in named})
        if untold:
            raise WeightsError(f"{path} holds weights in {untold[0]} of which its description says nothing.")
    tensors: dict[str, np.ndarray] = {}
    read = TensorReader(path)
    for layer, kind, group in named:
        for number in group:
            words = TENSORS.get(kind, ())
            word = words[int(number)] if number.isdecimal() and int(number) < len(words) else number
            if f"{layer}/{word}" in tensors:
                raise WeightsError(f"{path} holds {layer}/{word} twice; it cannot be told which one is meant.")
            tensors[f"{layer}/{word}"] = read(group, number)
    return tensors


def _described(layers: h5py.Group, config: Any, path: Path) -> Iterator[tuple[str, str, h5py.Group]]:
    """(name, class, variables) of each layer with weights, numbered as the description has them."""
    used: Counter[str] = Counter()
    for layer in config["layers"]:
        kind, about = snake_case(layer["class_name"]), layer["config"]
        number, used[kind] = used[kind], used[kind] + 1
        group = f"{kind}_{number}" if number else kind
        if "layers" in about:
            yield from _described(own(layers, f"{group}/layers", path), about, path)
        elif group in layers and "vars" in layers[group]:
            variables = own(layers, f"{group}/vars", path)
            if str(variables.attrs.get("name", about["name"])) != about["name"]:
                raise WeightsError(
                    f"{path} calls {variables.name} {variables.attrs['name']!r} and describes it as {about['name']!r}."
                )
            yield about["name"], kind, variables


def _named(layers: h5py.Group, path: Path) -> Iterator[tuple[str, str, h5py.Group]]:
    """The same from the names that are kept beside the weights."""
    for name in layers:
        group = own(layers, name, path)
        if "layers" in group:
            yield from _named(own(group, "layers", path), path)
        elif "vars" in group and len(variables := own(group, "vars", path)):
            if "name" not in variables.attrs:
                raise WeightsError(
                    f"{path} was written by Keras 3's save_weights, which keeps no layer names to match by; save the "
                    "whole model with model.save('model.h5') and give that file."
                )
            yield str(variables.attrs["name"]), re.sub(r"_\d+$", "", name), variables


def _with_weights(layers: h5py.Group, path: Path) -> set[str]:
    """Names of all groups of variables that are not empty."""
    found: set[str] = set()
    for name in layers:
        group = own(layers, name, path)
        if "layers" in group:
            found |= _with_weights(own(group, "layers", path), path)
        if "vars" in group and len(variables := own(group, "vars", path)):
            found.add(variables.name)
    return found


def snake_case(name: str) -> str:
    """A class's name as Keras makes a group's of it: `conv2d`, `batch_normalization`."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
