"""The dense head on pooled features: Dense 1024 relu, Dense 512 relu, Dense 10, as two pure functions."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

HeadParams = tuple[dict[str, Float[Array, "..."]], ...]  # a {"kernel": [in, out], "bias": [out]} for each layer


def init_head(
    key: PRNGKeyArray, in_features: int, hidden: Sequence[int] = (1024, 512), num_classes: int = 10
) -> HeadParams:
    """Draws the head's parameters as Keras's `Dense` does: glorot_uniform kernels, zero biases, all float32.

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
    """Class logits of pooled features; relu between layers, none behind the last. Their softmax are probabilities."""
    x = features
    for layer in head_params[:-1]:
        x = jax.nn.relu(_dense(layer, x))
    return _dense(head_params[-1], x)


def _dense(layer: dict[str, Float[Array, "..."]], x: Float[Array, "batch fan_in"]) -> Float[Array, "batch out"]:
    # HIGHEST: float32 products on every backend (see ResNet); a hundredth of the backbone's work.
    return jnp.dot(x, layer["kernel"], precision=jax.lax.Precision.HIGHEST) + layer["bias"]
