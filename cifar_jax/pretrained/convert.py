"""Weights from any form that loads to this project's own, and back to those of Keras, torchvision and transformers.

Back only within a family: a weights file holds numbers, not the network they are for, and a network that strides in its
first 1x1 convolutions computes something else with the same numbers than one that strides in its 3x3.
"""

import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from cifar_jax.errors import RunError, UserError, WeightsError
from cifar_jax.files import replacing, sha256_of_file
from cifar_jax.models.backbone import Backbone
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained.formats.keras_h5 import read_keras_h5
from cifar_jax.pretrained.formats.native import read_safetensors, to_bytes
from cifar_jax.pretrained.from_torch import NAMES
from cifar_jax.pretrained.load import load_backbone
from cifar_jax.pretrained.names import huggingface as hf_names, keras as keras_names, layouts, torch as torch_names
from cifar_jax.pretrained.variants import VARIANTS, Variant

logger = logging.getLogger(__name__)

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Target:
    """A form that is written.

    Attributes:
      suffixes: what the name of such a file ends in.
      variants: the networks that the form's library has, or none for a form that says itself how it is run.
    """

    suffixes: tuple[str, ...]
    variants: tuple[str, ...] = ()


TARGETS = {
    "ours": Target((".safetensors",)),
    "keras": Target((".h5", ".hdf5"), ("keras", "keras-2016", "keras-2016-unpadded")),
    "torchvision": Target((".safetensors",), ("torchvision",)),
    "huggingface": Target((".safetensors",), ("huggingface",)),
}
KERAS_TOP = {"keras": "predictions", "keras-2016": "fc1000"}  # what is published as `probs` is called so today

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
    **how: Any,
) -> dict[str, str]:
    """Writes the weights of one file in another form, whole or not at all, and reads them again to compare.

    Args:
      source: whatever `load_backbone` takes.
      target: the file to write; .h5 is Keras's form, .safetensors this project's own unless `to` says otherwise.
      to: one of TARGETS.
      variant: how the source is run, where it leaves that open.
      overwrite: replace a file that is there.
      how: goes to `load_backbone`.

    Returns:
      What was done, in words, by topic.

    Raises:
      UserError: when the target cannot be, or the network is none of its library's.
      RunError: when it cannot be written.
    """
    path = Path(os.path.expanduser(target))
    to = _checked_target(path, to, overwrite)
    backbone = load_backbone(source, variant, **how)
    if os.path.exists(path) and os.path.samefile(path, backbone.source or path):
        raise UserError(f"{path} is the file to convert; give another name for the result.")
    fitting = fitting_variant(backbone.config, to, str(source))
    if fitting and (fitting.preprocessing, fitting.image_size) != (backbone.preprocessing, backbone.image_size):
        logger.info(
            f"The form {to} cannot say what the input of {source} goes through, so remember it: "
            f"{backbone.preprocessing}, {backbone.image_size} pixels."
        )
    try:
        with replacing(path) as temporary:
            count = _write(temporary, backbone, to, fitting)
    except OSError as error:
        raise RunError(f"{path} could not be written ({error.strerror or error}); nothing was left there.") from error
    return {
        "from": backbone.source,
        "variant": backbone.variant,
        "to": f"{path} ({to})",
        "tensors": str(count),
        "top": "none" if backbone.top is None else f"{len(backbone.top['bias'])} classes",
        "bytes": str(path.stat().st_size),
        "sha256": sha256_of_file(path),
    }


def _checked_target(path: Path, to: str | None, overwrite: bool) -> str:
    """The form to write, before anything is read."""
    to = to or next((name for name, form in TARGETS.items() if path.suffix in form.suffixes), None)
    if to not in TARGETS:
        raise UserError(f"{path} ends in neither .safetensors nor .h5, so its form is not known; name it so.")
    if path.suffix not in TARGETS[to].suffixes:
        raise UserError(f"{path} does not end in {TARGETS[to].suffixes[0]}, as files of the form {to} do; name it so.")
    if os.path.isdir(path) or not os.path.isdir(path.parent):
        raise UserError(f"{path} cannot be a file: it is a directory, or its own directory is not there; name another.")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path} is there already; give --overwrite to replace it.")
    return to


def fitting_variant(config: ResNetConfig, to: str, what: str) -> Variant | None:
    """The network of a form's library that computes what this one does; None where any can be.

    Raises:
      WeightsError: when its library has no such network, with the difference.
    """
    variants = [VARIANTS[name] for name in TARGETS[to].variants]
    if not variants:
        return None
    for variant in variants:
        if replace(variant.config, stage_sizes=config.stage_sizes) == config:
            return variant
    usual = variants[0].config
    ours, theirs = (
        " and ".join(
            words(getattr(one, field))
            for field, words in _DIFFERENCES.items()
            if getattr(config, field) != getattr(usual, field)
        )
        for one in (config, usual)
    )
    raise WeightsError(
        f"{what} cannot become a file of {to}: with the same numbers it must {ours}, and every network of {to} would "
        f"{theirs}; convert it to .safetensors of this project, which says how it is run."
    )


def _write(path: Path, backbone: Backbone, to: str, variant: Variant | None) -> int:
    """Writes the file; how many tensors it holds.

    Raises:
      OSError: when what is read back is not what was written.
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
        raise OSError("what was read back is not what was written")
    return len(tensors)


def keras_tensors(backbone: Backbone, family: str) -> Tensors:
    """A network's tensors as `layer/tensor`, in the order in which Keras has its layers."""
    leaves = flatten_dict(backbone.variables)
    named = {name: at for at, name in keras_names.name_map(backbone.config.stage_sizes, family).items() if at in leaves}
    layers = keras_names.layer_order(backbone.config.stage_sizes, family)
    tensors = {
        f"{layer}/{tensor}": _out(leaves[named[f"{layer}/{tensor}"]], layouts.KERAS)
        for layer in layers
        for tensor in (keras_names.CONV_TENSORS | keras_names.NORM_TENSORS)
        if f"{layer}/{tensor}" in named
    }
    top = {f"{KERAS_TOP[family]}/{name}": np.asarray((backbone.top or {})[name]) for name in backbone.top or {}}
    return tensors | top


def write_keras_h5(path: Path, tensors: Tensors) -> None:
    """Writes `layer/tensor` arrays in the layout that `save_weights` of Keras 2 wrote and every Keras reads."""
    layers: dict[str, list[str]] = {}
    for name in tensors:
        layers.setdefault(name.rpartition("/")[0], []).append(name)
    # In memory first: on a full disk HDF5 fails a second time when it closes the file.
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        # Without a version Keras takes a file for one of Keras 1, whose kernels it turns round.
        file.attrs.update(keras_version="2.15.0", backend="tensorflow")
        file.attrs["layer_names"] = np.array([layer.encode() for layer in layers])
        for layer, names in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = np.array([f"{name}:0".encode() for name in names])
            for name in names:
                group[f"{name}:0"] = tensors[name]
    path.write_bytes(content.getbuffer())


def torch_tensors(backbone: Backbone, family: str) -> Tensors:
    """A network's tensors under their names in torchvision or transformers, in PyTorch's order of axes.

    BatchNorm's counts of training steps, which are not kept here, are zero.
    """
    names = NAMES[family]
    leaves = flatten_dict(backbone.variables)
    named = {at: name for at, name in names.name_map(backbone.config.stage_sizes).items() if at in leaves}
    tensors = {name: _out(leaves[at], layouts.TORCH) for at, name in named.items()}
    norms = [name.removesuffix(".running_var") for name in tensors if name.endswith(".running_var")]
    tensors |= {f"{name}.{torch_names.IGNORED}": np.zeros((), np.int64) for name in norms}
    if backbone.top is None:
        return tensors
    if names is hf_names:  # a network with a classifier has the rest behind a prefix
        tensors = {f"{hf_names.PREFIX}{name}": tensor for name, tensor in tensors.items()}
    kernel, bias = (np.asarray(backbone.top[name], np.float32) for name in ("kernel", "bias"))
    return tensors | {names.TOP[0]: np.ascontiguousarray(kernel.T), names.TOP[1]: bias}


def _out(leaf: Any, layout: layouts.Layout) -> np.ndarray:
    array = np.asarray(leaf, np.float32)
    return np.ascontiguousarray(layout.from_network(array) if array.ndim > 1 else array)
