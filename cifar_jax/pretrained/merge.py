"""A strict merge: every tensor of a file is used or ignored by name, every variable is filled, every shape matches."""

import functools
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cifar_jax.errors import WeightsError
from cifar_jax.models.resnet import ResNet, ResNetConfig, Variables
from cifar_jax.pretrained import axis_order

Path = tuple[str, ...]  # path of a variable, such as ("params", "stage1_block1", "conv1", "kernel")


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
    """The result of matching a file's tensors against a network.

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


def match(
    tensors: Mapping[str, np.ndarray],
    names: Mapping[Path, str],
    config: ResNetConfig,
    ignored: Collection[str],
    layout: axis_order.Layout,
) -> Match:
    """Matches a file's tensors against a network; takes the same arguments as `merge`."""
    shapes = variable_shapes(config)
    needed = {path: names.get(path, "/".join(path)) for path in shapes}
    present = {path: name for path, name in needed.items() if name in tensors}
    views = {path: layout.to_network(np.asarray(tensors[name]), len(shapes[path])) for path, name in present.items()}
    wrong = {
        name: (tuple(tensors[name].shape), _file_shape(shapes[path], layout))
        for path, name in present.items()
        if views[path].shape != shapes[path]
    }
    missing = sorted(needed[path] for path in shapes if path not in present)
    extra = sorted(set(tensors) - set(present.values()) - set(ignored))
    return Match(views, missing, extra, wrong)


def merge(
    tensors: Mapping[str, np.ndarray],
    names: Mapping[Path, str],
    config: ResNetConfig,
    ignored: Collection[str] = (),
    what: str = "the weights",
    layout: axis_order.Layout = axis_order.KERAS,
) -> Variables:
    """Builds a network's variables from the tensors of a file, by name.

    Args:
      tensors: the tensors of the file, by name.
      names: tensor name by variable path.
      config: the network.
      ignored: names of known tensors that are not needed, such as the classifier's.
      what: the file's name in error messages.
      layout: the axis order in the file.

    Returns:
      float32 variables in the network's structure.

    Raises:
      WeightsError: if a tensor is neither used nor ignored, a variable is not filled, a shape differs or a value is
        not finite; the message lists both sides.
    """
    found = match(tensors, names, config, ignored, layout)
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
    views = found.views
    if bad := [names[path] for path, view in views.items() if not jnp.issubdtype(view.dtype, jnp.floating)]:
        raise WeightsError(
            f"{what} holds integers instead of floats in {_join_few(bad)}. Get a fresh copy of the file."
        )
    with np.errstate(over="ignore"):  # float64 values that overflow to infinity are refused below
        merged = {path: np.ascontiguousarray(view, np.float32) for path, view in views.items()}
    if bad := [names[path] for path, value in merged.items() if not np.isfinite(value).all()]:
        raise WeightsError(f"{what} holds non-finite values in {_join_few(bad)}. Get a fresh copy of the file.")
    if bad := [names[path] for path, value in merged.items() if path[-1] == "var" and (value < 0).any()]:
        raise WeightsError(f"{what} holds negative variances in {_join_few(bad)}. Get a fresh copy of the file.")
    return unflatten_dict(merged)


def read_classifier(
    tensors: Mapping[str, np.ndarray], names: tuple[str, str], config: ResNetConfig, what: str, transposed: bool = False
) -> dict[str, np.ndarray] | None:
    """Returns the file's own classifier.

    Args:
      tensors: the tensors of the file, by name.
      names: names of the classifier's kernel and bias.
      config: the network below it.
      what: the file's name in error messages.
      transposed: whether the kernel is [classes, features], as in PyTorch.

    Returns:
      {"kernel": [features, classes], "bias": [classes]} in float32, or None if the file has no classifier.

    Raises:
      WeightsError: if only one of the two is present, or they do not fit the network's features.
    """
    if not any(name in tensors for name in names):
        return None
    found = [np.asarray(tensors.get(name, ()), np.float32) for name in names]
    kernel, bias = np.ascontiguousarray(found[0].T) if transposed else found[0], found[1]
    if kernel.ndim != 2 or kernel.shape != (config.features, bias.size) or bias.ndim != 1:
        raise WeightsError(
            f"{what} holds a classifier that does not fit its network: {names[0]} has shape {kernel.shape} and "
            f"{names[1]} {bias.shape}, expected ({config.features}, classes) and (classes,). Get a fresh copy of the "
            "file."
        )
    return {"kernel": kernel, "bias": bias}


def _file_shape(shape: tuple[int, ...], layout: axis_order.Layout) -> tuple[int, ...]:
    """Returns a variable's shape in the file's axis order."""
    return shape if layout is axis_order.KERAS else layout.shape(np.broadcast_to(np.float32(0), shape))


def _join_few(items: list[str], most: int = 6) -> str:
    """Joins the first few items of a list for a message."""
    if not items:
        return "none"
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
