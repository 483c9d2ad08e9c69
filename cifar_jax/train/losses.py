"""Loss functions: `(logits, labels) -> float32 [batch]`, one loss per example. The step masks and averages them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from cifar_jax.errors import UserError

# Integer labels, or a distribution over the classes for each example, such as mixup produces.
Labels = Int32[Array, "batch"] | Float[Array, "batch classes"]
LossFn = Callable[[Float[Array, "batch classes"], Labels], Float[Array, "batch"]]


def losses_of(loss_fn: LossFn, logits: Float[Array, "batch classes"], labels: Labels) -> Float[Array, "batch"]:
    """Computes the losses of a batch.

    Raises:
      UserError: unless there is one loss per example. Any other shape would broadcast against the mask, or include
        padding.
    """
    losses, expected = loss_fn(logits, labels), labels.shape[:1]
    if jnp.shape(losses) != expected:
        raise UserError(
            f"The loss function returns shape {list(jnp.shape(losses))} for a batch of {expected[0]}, expected "
            f"{list(expected)}: one loss for each example, neither their mean nor a column."
        )
    return losses


def cross_entropy(logits: Float[Array, "batch classes"], labels: Labels) -> Float[Array, "batch"]:
    """Softmax cross-entropy of logits.

    Mathematically equal to Keras's `SparseCategoricalCrossentropy` of softmax probabilities, but more accurate.
    """
    if labels.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, labels)


def smoothed_cross_entropy(label_smoothing: float) -> LossFn:
    """Cross-entropy with label smoothing; `cross_entropy` itself if `label_smoothing` is 0.

    Reference:
      Szegedy et al. 2015, https://arxiv.org/abs/1512.00567, section 7
    """
    if not label_smoothing:
        return cross_entropy

    def loss_fn(logits: Float[Array, "batch classes"], labels: Labels) -> Float[Array, "batch"]:
        even = -jax.nn.log_softmax(logits).mean(axis=-1)
        return (1 - label_smoothing) * cross_entropy(logits, labels) + label_smoothing * even

    return loss_fn
