"""A parsed weights file, and the strict merge that makes it a backbone.

Every tensor of the file is used or ignored by name, every variable is filled, every shape matches.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cifar_jax.errors import WeightsError
from cifar_jax.files import sha256_of_file
from cifar_jax.models.backbone import Backbone
from cifar_jax.models.preprocess import EvalTransform, Preprocessing
from cifar_jax.models.resnet import ResNet, ResNetConfig, Variables

Path = tuple[str, ...]  # path of a variable, such as ("params", "stage1_block1", "conv1", "kernel")


@dataclass(frozen=True)
class ParsedWeights:
    """A parsed weights file whose tensors are not merged yet, so they may still not fit the network.

    Attributes:
      path: path of the file.
      family: family of its tensor names: keras, keras-2016, torchvision, huggingface or ours.
      tensors: tensors by name, without wrapper prefixes, in the file's axis order.
      names: tensor name by path, for every variable that the network may have.
      top: tensor names of the classifier's kernel and bias.
      config: the network.
      preprocessing: the preprocessing of its input.
      image_size: side of its input in pixels.
      variant: display name of the variant and what decided it.
      transform: the evaluation transform of photos.
      torch_axes: whether kernels are in PyTorch's axis order, [out, in, h, w].
      ignored: names of tensors that are not needed, with the reason.
      refusal: error message if the weights must not be used even if they fit; empty otherwise.
      notes: messages for the user, such as assumptions that were made.
    """

    path: FilePath
    family: str
    tensors: Mapping[str, np.ndarray]
    names: Mapping[Path, str]
    top: tuple[str, str]
    config: ResNetConfig
    preprocessing: Preprocessing
    image_size: int
    variant: str
    transform: EvalTransform = EvalTransform()  # noqa: RUF009 (frozen)
    torch_axes: bool = False
    ignored: Mapping[str, str] = field(default_factory=dict)
    refusal: str = ""
    notes: tuple[str, ...] = ()


def to_network(tensor: np.ndarray, ndim: int, torch_axes: bool) -> np.ndarray:
    """Returns a view of a file's tensor in our axis order: kernels [h, w, in, out], or [in, out] for 1x1 convolutions.

    Args:
      tensor: the tensor in the file.
      ndim: number of axes of the variable that it fills.
      torch_axes: whether the file has PyTorch's axis order.
    """
    if torch_axes and tensor.ndim == 4:
        tensor = tensor.transpose(2, 3, 1, 0)
    return tensor[0, 0] if ndim == 2 and tensor.ndim == 4 and tensor.shape[:2] == (1, 1) else tensor


def from_network(variable: np.ndarray, torch_axes: bool) -> np.ndarray:
    """Returns a view of a variable in a file's axis order, the inverse of `to_network`."""
    if variable.ndim < 2:
        return variable
    kernel = variable[None, None] if variable.ndim == 2 else variable
    return kernel.transpose(3, 2, 0, 1) if torch_axes else kernel


@functools.cache
def variable_shapes(config: ResNetConfig) -> Mapping[Path, tuple[int, ...]]:
    """Returns the shapes of all variables of a network, by abstract evaluation of its definition.

    Cached, because tracing a ResNet50 takes a third of a second, a large part of its loading time.
    """
    side = 2 * config.downsampling
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(ResNet(config).init, jax.random.key(0), x)
    return MappingProxyType({path: leaf.shape for path, leaf in flatten_dict(shapes).items()})


class Match(NamedTuple):
    """The result of matching a file's tensors against its network.

    Attributes:
      views: views of the matching tensors by variable path, in the network's axis order.
      missing: names of tensors that the network needs and the file lacks.
      extra: names of tensors in the file that are neither used nor ignored.
      wrong: (shape, expected shape) by name for tensors of the wrong shape, in the file's axis order.
    """

    views: dict[Path, np.ndarray]
    missing: list[str]
    extra: list[str]
    wrong: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def match(parsed: ParsedWeights) -> Match:
    """Matches a file's tensors against its network."""
    tensors, torch_axes, shapes = parsed.tensors, parsed.torch_axes, variable_shapes(parsed.config)
    needed = {path: parsed.names.get(path, "/".join(path)) for path in shapes}
    present = {path: name for path, name in needed.items() if name in tensors}
    views = {
        path: to_network(np.asarray(tensors[name]), len(shapes[path]), torch_axes) for path, name in present.items()
    }
    # Keras's 1x1 kernels are shown as dense ones. The broadcast array is a view of one number.
    expected = {
        path: from_network(np.broadcast_to(np.float32(0), shape), True).shape if torch_axes else shape
        for path, shape in shapes.items()
    }
    wrong = {
        name: (tuple(tensors[name].shape), expected[path])
        for path, name in present.items()
        if views[path].shape != shapes[path]
    }
    missing = sorted(needed[path] for path in shapes if path not in present)
    extra = sorted(set(tensors) - set(present.values()) - set(parsed.ignored) - set(parsed.top))
    return Match(views, missing, extra, wrong)


def backbone_of(parsed: ParsedWeights) -> Backbone:
    """Builds the backbone of a parsed file.

    Raises:
      WeightsError: if the tensors do not fit the network, or the file must not be used.
    """
    top, variables = read_classifier(parsed), merge(parsed)
    if parsed.refusal:  # raised last, because a mismatch of the tensors tells the user more
        raise WeightsError(parsed.refusal)
    return Backbone(
        parsed.config,
        parsed.preprocessing,
        parsed.image_size,
        variables,
        transform=parsed.transform,
        sha256=sha256_of_file(parsed.path),
        source=str(parsed.path),
        variant=parsed.variant,
        top=top,
    )


def merge(parsed: ParsedWeights) -> Variables:
    """Builds a network's float32 variables from the tensors of a file, by name.

    Raises:
      WeightsError: if a tensor is neither used nor ignored, a variable is not filled, a shape differs or a value is
        not finite; the message lists both sides.
    """
    found, names, what = match(parsed), parsed.names, parsed.path
    if found.missing or found.extra:
        raise WeightsError(
            f"{what} does not match the network: missing tensors: {_join_few(found.missing)}; unexpected tensors: "
            f"{_join_few(found.extra)}. Use weights of a supported network, or get a fresh copy of the file."
        )
    if found.wrong:
        wrong = [f"{name} has shape {has}, expected {needs}" for name, (has, needs) in found.wrong.items()]
        raise WeightsError(
            f"{what} does not match the network: {_join_few(wrong)}. Use weights of a supported network, or get a "
            "fresh copy of the file."
        )
    integers = [path for path, view in found.views.items() if not jnp.issubdtype(view.dtype, jnp.floating)]
    with np.errstate(over="ignore"):  # float64 values that overflow to infinity are refused below
        merged = {path: np.ascontiguousarray(view, np.float32) for path, view in found.views.items()}
    problems = {
        "integers instead of floats": integers,
        "non-finite values": [path for path, value in merged.items() if not np.isfinite(value).all()],
        "negative variances": [path for path, value in merged.items() if path[-1] == "var" and (value < 0).any()],
    }
    for problem, paths in problems.items():
        if paths:
            bad = _join_few([names[path] for path in paths])
            raise WeightsError(f"{what} holds {problem} in {bad}. Get a fresh copy of the file.")
    return unflatten_dict(merged)


def read_classifier(parsed: ParsedWeights) -> dict[str, np.ndarray] | None:
    """Returns the file's own classifier.

    Returns:
      {"kernel": [features, classes], "bias": [classes]} in float32, or None if the file has no classifier.

    Raises:
      WeightsError: if only one of the two is present, or they do not fit the network's features.
    """
    names, features = parsed.top, parsed.config.features
    if not any(name in parsed.tensors for name in names):
        return None
    kernel, bias = (np.asarray(parsed.tensors.get(name, ()), np.float32) for name in names)
    if parsed.torch_axes:
        kernel = np.ascontiguousarray(kernel.T)
    if kernel.ndim != 2 or kernel.shape != (features, bias.size) or bias.ndim != 1:
        raise WeightsError(
            f"{parsed.path} holds a classifier that does not fit its network: {names[0]} has shape {kernel.shape} and "
            f"{names[1]} {bias.shape}, expected ({features}, classes) and (classes,). Get a fresh copy of the file."
        )
    return {"kernel": kernel, "bias": bias}


def _join_few(items: list[str], most: int = 6) -> str:
    """Joins the first few items of a list for a message."""
    if not items:
        return "none"
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
