"""The total merge: every tensor of a file is used or ignored by name, every variable is filled, every shape agrees."""

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
from cifar_jax.pretrained.names import layouts

Path = tuple[str, ...]  # of a variable: ("params", "stage1_block1", "conv1", "kernel")


@functools.cache
def variable_shapes(config: ResNetConfig) -> Mapping[Path, tuple[int, ...]]:
    """Shapes of all variables of a network, from its own definition; nothing is computed.

    Tracing a ResNet50 takes a third of a second, which is a good part of the loading of one, so it is done once.
    """
    side = 2 * config.downsampling
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(ResNet(config).init, jax.random.key(0), x)
    return MappingProxyType({path: leaf.shape for path, leaf in flatten_dict(shapes).items()})


class Match(NamedTuple):
    """How the tensors of a file fit a network.

    Attributes:
      views: of the tensors that fill a variable, by variable, in the network's order of axes.
      missing: tensors that the network needs and the file lacks.
      extra: tensors that the file has and nobody knows.
      wrong: tensors of another shape than the network needs: their shape and that one, in the file's order of axes.
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
    layout: layouts.Layout,
) -> Match:
    """Holds a file's tensors against a network; the arguments are those of `merge`."""
    shapes = variable_shapes(config)
    needed = {path: names.get(path, "/".join(path)) for path in shapes}
    there = {path: name for path, name in needed.items() if name in tensors}
    views = {path: layout.to_network(np.asarray(tensors[name]), len(shapes[path])) for path, name in there.items()}
    wrong = {
        name: (tuple(tensors[name].shape), _shown(shapes[path], layout))
        for path, name in there.items()
        if views[path].shape != shapes[path]
    }
    missing = sorted(needed[path] for path in shapes if path not in there)
    extra = sorted(set(tensors) - set(there.values()) - set(ignored))
    return Match(views, missing, extra, wrong)


def merge(
    tensors: Mapping[str, np.ndarray],
    names: Mapping[Path, str],
    config: ResNetConfig,
    ignored: Collection[str] = (),
    what: str = "the weights",
    layout: layouts.Layout = layouts.KERAS,
) -> Variables:
    """Makes a network's variables from the tensors of a file, by name.

    Args:
      tensors: what the file holds.
      names: for each variable of the network the tensor that fills it.
      config: the network.
      ignored: tensors that are known and not wanted, such as the classifier's.
      what: the file, for the error.
      layout: the order of the axes in the file.

    Returns:
      float32 variables in the network's structure.

    Raises:
      WeightsError: when a tensor is neither used nor ignored, a variable stays empty, a shape differs or a value is
        not finite; it lists both sides.
    """
    found = match(tensors, names, config, ignored, layout)
    if found.missing or found.extra:
        raise WeightsError(
            f"{what} does not fit the network: it lacks {_some(found.missing)} and has {_some(found.extra)} that the "
            "network does not know; nothing was loaded."
        )
    if found.wrong:
        wrong = [f"{name} {has} where the network has {needs}" for name, (has, needs) in found.wrong.items()]
        raise WeightsError(f"{what} does not fit the network: {_some(wrong)}; nothing was loaded.")
    views = found.views
    if bad := [names[path] for path, view in views.items() if not jnp.issubdtype(view.dtype, jnp.floating)]:
        raise WeightsError(f"{what} holds whole numbers where weights belong, in {_some(bad)}; get the file again.")
    with np.errstate(over="ignore"):  # of float64; what becomes infinite is refused below
        merged = {path: np.ascontiguousarray(view, np.float32) for path, view in views.items()}
    if bad := [names[path] for path, value in merged.items() if not np.isfinite(value).all()]:
        raise WeightsError(f"{what} holds values that are not finite, in {_some(bad)}; get the file again.")
    if bad := [names[path] for path, value in merged.items() if path[-1] == "var" and (value < 0).any()]:
        raise WeightsError(f"{what} holds variances below zero, in {_some(bad)}; get the file again.")
    return unflatten_dict(merged)


def top_of(
    tensors: Mapping[str, np.ndarray], names: tuple[str, str], config: ResNetConfig, what: str, transposed: bool = False
) -> dict[str, np.ndarray] | None:
    """A file's own classifier, for those who want its classes.

    Args:
      tensors: what the file holds.
      names: of the classifier's kernel and bias.
      config: the network before it.
      what: the file, for the error.
      transposed: whether the kernel is [classes, features], as PyTorch has it.

    Returns:
      {"kernel": [features, classes], "bias": [classes]} in float32, or None where there is none.

    Raises:
      WeightsError: when it is half there or does not fit the network's features.
    """
    if not any(name in tensors for name in names):
        return None
    found = [np.asarray(tensors.get(name, ()), np.float32) for name in names]
    kernel, bias = np.ascontiguousarray(found[0].T) if transposed else found[0], found[1]
    if kernel.ndim != 2 or kernel.shape != (config.features, bias.size) or bias.ndim != 1:
        raise WeightsError(
            f"{what} holds a classifier that does not fit its network: {names[0]} of {kernel.shape} and {names[1]} of "
            f"{bias.shape} where ({config.features}, classes) and (classes,) belong; get the file again."
        )
    return {"kernel": kernel, "bias": bias}


def _shown(shape: tuple[int, ...], layout: layouts.Layout) -> tuple[int, ...]:
    """A variable's shape, as a person finds it in the file."""
    return shape if layout is layouts.KERAS else layout.shape(np.broadcast_to(np.float32(0), shape))


def _some(items: list[str], most: int = 6) -> str:
    """The first few of a list, for a sentence."""
    if not items:
        return "nothing"
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
