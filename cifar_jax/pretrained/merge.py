"""The total merge: every tensor of a file is used or ignored by name, every variable is filled, every shape agrees."""

from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cifar_jax.pretrained.errors import WeightsError
from cifar_jax.resnet import ResNet, ResNetConfig, Variables

Path = tuple[str, ...]  # of a variable: ("params", "stage1_block1", "conv1", "kernel")


def variable_shapes(config: ResNetConfig) -> dict[Path, tuple[int, ...]]:
    """Shapes of all variables of a network, from its own definition; nothing is computed."""
    side = 2 * config.downsampling
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(ResNet(config).init, jax.random.key(0), x)
    return {path: leaf.shape for path, leaf in flatten_dict(shapes).items()}


def merge(
    tensors: Mapping[str, np.ndarray],
    names: Mapping[Path, str],
    config: ResNetConfig,
    ignored: Collection[str] = (),
    what: str = "the weights",
) -> Variables:
    """Makes a network's variables from the tensors of a file, by name.

    Args:
      tensors: what the file holds.
      names: for each variable of the network the tensor that fills it.
      config: the network.
      ignored: tensors that are known and not wanted, such as the classifier's.
      what: the file, for the error.

    Returns:
      float32 variables in the network's structure.

    Raises:
      WeightsError: when a tensor is neither used nor ignored, a variable stays empty, a shape differs or a value is
        not finite; it lists both sides.
    """
    shapes = variable_shapes(config)
    missing = sorted(names.get(path, "/".join(path)) for path in shapes if names.get(path) not in tensors)
    extra = sorted(set(tensors) - {names.get(path) for path in shapes} - set(ignored))
    if missing or extra:
        raise WeightsError(
            f"{what} does not fit the network: it lacks {_some(missing)} and has {_some(extra)} that the network does "
            "not know; nothing was loaded."
        )
    merged = {path: _to_flax_layout(np.asarray(tensors[names[path]]), shape) for path, shape in shapes.items()}
    wrong = [
        f"{names[path]} {tuple(tensors[names[path]].shape)} where the network has {shape}"
        for path, shape in shapes.items()
        if merged[path].shape != shape
    ]
    if wrong:
        raise WeightsError(f"{what} does not fit the network: {_some(wrong)}; nothing was loaded.")
    if bad := [names[path] for path, value in merged.items() if not np.isfinite(value).all()]:
        raise WeightsError(f"{what} holds values that are not finite, in {_some(bad)}; get the file again.")
    if bad := [names[path] for path, value in merged.items() if path[-1] == "var" and (value < 0).any()]:
        raise WeightsError(f"{what} holds variances below zero, in {_some(bad)}; get the file again.")
    return unflatten_dict(merged)


def _to_flax_layout(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A 1x1 convolution's kernel [1, 1, in, out] is this network's dense kernel [in, out]; all else is alike."""
    if len(shape) == 2 and tensor.ndim == 4 and tensor.shape[:2] == (1, 1):
        tensor = tensor[0, 0]
    return np.ascontiguousarray(tensor, np.float32)


def _some(items: list[str], most: int = 6) -> str:
    """The first few of a list, for a sentence."""
    if not items:
        return "nothing"
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
