"""Converts weights between formats: from any supported one to ours, and back to Keras, torchvision and transformers.

Converting back works only within a family. A weights file holds numbers, not the network that they belong to, and the
same numbers give different results in a network that strides in its first 1x1 convolutions and one that strides in its
3x3.
"""

import io
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from cifar_jax.errors import RunError, UserError, WeightsError
from cifar_jax.files import check_target, replacing, sha256_of_file
from cifar_jax.models.backbone import Backbone
from cifar_jax.models.preprocess import EvalTransform
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained.formats.keras_h5 import read_keras_h5
from cifar_jax.pretrained.formats.safetensors_file import read_safetensors, to_bytes
from cifar_jax.pretrained.load import load_backbone
from cifar_jax.pretrained.merge import from_network
from cifar_jax.pretrained.names import Family, keras as keras_names, torch as torch_names
from cifar_jax.pretrained.variants import VARIANTS, Variant

logger = logging.getLogger(__name__)

Tensors = dict[str, np.ndarray]


class Target(NamedTuple):
    """An output format: its file name suffixes, and the variants that its library can build; ours takes any network."""

    suffixes: tuple[str, ...]
    variants: tuple[str, ...] = ()


TARGETS = {
    "ours": Target((".safetensors",)),
    "keras": Target((".h5", ".hdf5"), ("keras", "keras-2016", "keras-2016-unpadded")),
    "torchvision": Target((".safetensors",), ("torchvision",)),
    "huggingface": Target((".safetensors",), ("huggingface",)),
}
KERAS_TOP = {"keras": "predictions", "keras-2016": "fc1000"}  # published files call it `probs`, today's Keras this

_DIFFERENCES: dict[str, Callable[[Any], str]] = {
    "stride_in_1x1": lambda yes: f"stride in its {'first 1x1' if yes else '3x3'} convolutions",
    "conv_bias": lambda yes: f"{'have' if yes else 'do without'} biases on its convolutions",
    "bn_epsilon": lambda epsilon: f"add {epsilon:g} to its variances",
    "width": lambda width: f"begin with {width} channels",
    "pool_padding": lambda padding: f"pad its max-pool by {padding}",
}


def convert(
    source: str | Path,
    target: str | Path,
    to: str | None = None,
    variant: str | None = None,
    *,
    overwrite: bool = False,
    **load_kwargs: Any,
) -> dict[str, str]:
    """Converts a weights file to another format; the write is atomic, and the result is read back and compared.

    Args:
      source: any path or name that `load_backbone` accepts.
      target: the file to write; .h5 selects Keras's format, .safetensors ours unless `to` says otherwise.
      to: a key of TARGETS.
      variant: variant of the source, for files that leave it open.
      overwrite: replace an existing file.
      load_kwargs: passed to `load_backbone`.

    Returns:
      A summary of the conversion, by topic.

    Raises:
      UserError: if the target path is invalid, or the target's library has no such network.
      RunError: if the file cannot be written.
    """
    path = Path(os.path.expanduser(target))
    to = to or next((name for name, form in TARGETS.items() if path.suffix in form.suffixes), None)
    if to not in TARGETS:
        raise UserError(f"Cannot tell the format of {path}: the target must end in .safetensors or .h5.")
    if path.suffix not in TARGETS[to].suffixes:
        raise UserError(f"Files in {to} format must end in {TARGETS[to].suffixes[0]}, got {path}.")
    check_target(path, overwrite)
    backbone = load_backbone(source, variant, **load_kwargs)
    if os.path.exists(path) and os.path.samefile(path, backbone.source or path):
        raise UserError(f"{path} is the file to convert. Choose another name for the result.")
    fitting = matching_variant(backbone.config, to, str(source))
    assumed = fitting and (fitting.preprocessing, fitting.image_size, EvalTransform())
    if assumed and assumed != (backbone.preprocessing, backbone.image_size, backbone.transform):
        photos = backbone.transform.at(backbone.image_size).words()
        logger.info(
            f"The {to} format cannot record the preprocessing of {source}, so keep a note of it: "
            f"{backbone.preprocessing}, {backbone.image_size} pixels, photos: {photos}."
        )
    try:
        with replacing(path) as temporary:
            count = _write(temporary, backbone, to, fitting)
    except OSError as error:
        raise RunError(
            f"{path} could not be written ({error.strerror or error}). No partial file was left behind."
        ) from error
    return {
        "from": backbone.source,
        "variant": backbone.variant,
        "to": f"{path} ({to})",
        "tensors": str(count),
        "top": "none" if backbone.top is None else f"{len(backbone.top['bias'])} classes",
        "bytes": str(path.stat().st_size),
        "sha256": sha256_of_file(path),
    }


def matching_variant(config: ResNetConfig, to: str, what: str) -> Variant | None:
    """Finds the variant of a format's library that computes the same function; None if the format takes any network.

    Raises:
      WeightsError: if the library has no such network; the message names the differences.
    """
    variants = [VARIANTS[name] for name in TARGETS[to].variants]
    if not variants:
        return None
    for variant in variants:
        if replace(variant.config, stage_sizes=config.stage_sizes) == config:
            return variant
    default = variants[0].config
    ours, theirs = (
        " and ".join(
            describe(getattr(network, field))
            for field, describe in _DIFFERENCES.items()
            if getattr(config, field) != getattr(default, field)
        )
        for network in (config, default)
    )
    raise WeightsError(
        f"{what} cannot be converted to {to}: its network must {ours}, but every {to} network would {theirs}. Convert "
        "it to this project's .safetensors format, which records the network."
    )


def _write(path: Path, backbone: Backbone, to: str, variant: Variant | None) -> int:
    """Writes the file and returns its number of tensors.

    Raises:
      OSError: if the tensors read back differ from those written.
    """
    if variant is None:
        path.write_bytes(to_bytes(backbone))
        return len(read_safetensors(path).tensors)
    if to == "keras":
        tensors = keras_tensors(backbone, variant.family)
        write_keras_h5(path, tensors)
        found = read_keras_h5(path, known=True).tensors
    else:
        tensors = torch_tensors(backbone, variant.family)
        safetensors.numpy.save_file(tensors, path, {"format": "pt"})
        found = read_safetensors(path).tensors
    if found.keys() != tensors.keys() or not all(np.array_equal(found[name], tensors[name]) for name in tensors):
        raise OSError("the tensors read back differ from those written")
    return len(tensors)


def keras_tensors(backbone: Backbone, family: str) -> Tensors:
    """Returns a network's tensors as `layer/tensor`, in Keras's layer order."""
    tensors = _tensors(backbone, keras_names.FAMILIES[family], torch_axes=False)
    top = {f"{KERAS_TOP[family]}/{name}": np.asarray(value) for name, value in (backbone.top or {}).items()}
    return tensors | top


def write_keras_h5(path: Path, tensors: Tensors) -> None:
    """Writes `layer/tensor` arrays in the layout of Keras 2's `save_weights`, which every Keras reads."""
    layers: dict[str, list[str]] = {}
    for name in tensors:
        layers.setdefault(name.rpartition("/")[0], []).append(name)
    # Built in memory: on a full disk HDF5 would fail a second time when closing the file.
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        # Without a version Keras assumes a Keras 1 file and transposes the kernels.
        file.attrs.update(keras_version="2.15.0", backend="tensorflow")
        file.attrs["layer_names"] = np.array([layer.encode() for layer in layers])
        for layer, names in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = np.array([f"{name}:0".encode() for name in names])
            for name in names:
                group[f"{name}:0"] = tensors[name]
    path.write_bytes(content.getbuffer())


def torch_tensors(backbone: Backbone, family: str) -> Tensors:
    """Returns a network's tensors with the names of torchvision or transformers, in PyTorch's axis order.

    BatchNorm's `num_batches_tracked` is not kept here, so it is written as zero.
    """
    tensors = _tensors(backbone, torch_names.FAMILIES[family], torch_axes=True)
    norms = [name.removesuffix(".running_var") for name in tensors if name.endswith(".running_var")]
    tensors |= {f"{name}.{torch_names.IGNORED}": np.zeros((), np.int64) for name in norms}
    if backbone.top is None:
        return tensors
    if family == "huggingface":  # with a classifier, all other tensors have a prefix
        tensors = {f"{torch_names.PREFIX}{name}": tensor for name, tensor in tensors.items()}
    weight, bias = torch_names.top_names(family)
    kernel = np.asarray(backbone.top["kernel"], np.float32)
    return tensors | {weight: np.ascontiguousarray(kernel.T), bias: np.asarray(backbone.top["bias"], np.float32)}


def _tensors(backbone: Backbone, family: Family, torch_axes: bool) -> Tensors:
    """Returns a network's variables under a family's names and in its axis order, in the order of its files."""
    leaves = flatten_dict(backbone.variables)
    return {
        name: np.ascontiguousarray(from_network(np.asarray(leaves[path], np.float32), torch_axes))
        for path, name in family.name_map(backbone.config.stage_sizes).items()
        if path in leaves
    }
