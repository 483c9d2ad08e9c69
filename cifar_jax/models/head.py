"""Heads on pooled features: the dense one (Dense 1024 relu, Dense 512 relu, Dense 10), and any Flax module."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

HeadParams = tuple[dict[str, Float[Array, "..."]], ...]  # {"kernel": [in, out], "bias": [out]} per layer


def init_head(
    key: PRNGKeyArray, in_features: int, hidden: Sequence[int] = (1024, 512), num_classes: int = 10
) -> HeadParams:
    """Initialises the head's parameters as Keras's `Dense` does: glorot_uniform kernels, zero biases, all float32.

    Args:
      key: a typed key, `jax.random.key(seed)`.
      in_features: width of the features, 2048 for ResNet50.
      hidden: widths of the hidden layers; empty for a linear probe.
      num_classes: width of the logits.

    Reference:
      Glorot and Bengio 2010, https://proceedings.mlr.press/v9/glorot10a.html
    """
    sizes = (in_features, *hidden, num_classes)
    init = jax.nn.initializers.glorot_uniform()
    keys = jax.random.split(key, len(sizes) - 1)
    return tuple(
        {"kernel": init(k, (fan_in, fan_out), jnp.float32), "bias": jnp.zeros(fan_out, jnp.float32)}
        for k, fan_in, fan_out in zip(keys, sizes[:-1], sizes[1:], strict=True)
    )


def head_logits(head_params: HeadParams, features: Float[Array, "batch features"]) -> Float[Array, "batch num_classes"]:
    """Computes class logits of pooled features, with relu after every layer but the last; softmax is not applied."""
    x = features
    for layer in head_params[:-1]:
        x = jax.nn.relu(_dense(layer, x))
    return _dense(head_params[-1], x)


def _dense(layer: dict[str, Float[Array, "..."]], x: Float[Array, "batch fan_in"]) -> Float[Array, "batch out"]:
    # HIGHEST: float32 products on every backend (see ResNet), at a hundredth of the backbone's cost.
    return jnp.dot(x, layer["kernel"], precision=jax.lax.Precision.HIGHEST) + layer["bias"]


class Head(NamedTuple):
    """A head as two functions.

    Attributes:
      init: `(key, in_features, num_classes) -> params`.
      logits: `(params, features [batch, in_features], *, train, key) -> [batch, num_classes]`; `key` is None if
        `train` is False. Calling the head calls this function.
      name: name of the head, recorded with the run.
    """

    init: Callable[[PRNGKeyArray, int, int], PyTree]
    logits: Callable[..., Float[Array, "batch num_classes"]]
    name: str

    def __call__(
        self,
        params: PyTree,
        features: Float[Array, "batch features"],
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch num_classes"]:
        """Computes the logits, by default in evaluation mode."""
        return self.logits(params, features, train=train, key=key)


def dense_head(hidden: Sequence[int] = (1024, 512)) -> Head:
    """Makes a dense head with hidden layers of the given widths; a linear probe if there are none."""

    def init(key: PRNGKeyArray, in_features: int, num_classes: int) -> HeadParams:
        return init_head(key, in_features, hidden, num_classes)

    return Head(init, dense_logits, "-".join(map(str, ("dense", *hidden))))


def dense_logits(
    params: HeadParams,
    features: Float[Array, "batch features"],
    *,
    train: bool = False,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "batch num_classes"]:
    """`head_logits` with the signature of `Head.logits`; `train` and `key` are not used."""
    return head_logits(params, features)


def flax_head(module: nn.Module) -> Head:
    """Makes a head from a Flax module that maps features [batch, in_features] to logits [batch, num_classes].

    If the module's `__call__` has an argument `train`, it is passed; in training the RNG stream `dropout` is available.
    The module must not have variable collections other than `params`.
    """
    takes_train = "train" in inspect.signature(type(module).__call__).parameters

    def init(key: PRNGKeyArray, in_features: int, num_classes: int) -> PyTree:
        more: dict[str, Any] = {"train": False} if takes_train else {}
        return module.init({"params": key}, jnp.zeros((1, in_features)), **more)["params"]

    def logits(
        params: PyTree,
        features: Float[Array, "batch features"],
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch num_classes"]:
        more: dict[str, Any] = {"train": train} if takes_train else {}
        rngs = None if key is None else {"dropout": key}
        output: Any = module.apply({"params": params}, features, rngs=rngs, **more)
        return output

    return Head(init, logits, _module_name(module))


def _module_name(module: nn.Module) -> str:
    """The class name and field values of a module: a module with other values is a different head."""
    values = {one.name: getattr(module, one.name) for one in dataclasses.fields(module)}
    shown = ", ".join(f"{name}={_shown(value)}" for name, value in values.items() if name not in ("parent", "name"))
    return f"{type(module).__name__}({shown})"


def _shown(value: object) -> str:
    if isinstance(value, nn.Module):
        return _module_name(value)
    # Memory addresses differ between processes.
    return getattr(value, "__qualname__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(value))
