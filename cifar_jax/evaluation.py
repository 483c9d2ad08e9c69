"""Evaluation over all examples: sums and counts, divided once at the end, so the batch size cannot matter."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Int32, PyTree

from cifar_jax.head import HeadParams, head_logits
from cifar_jax.training import Batch, real_weights


class EvalSums(NamedTuple):
    """What a batch adds."""

    loss_sum: Float[Array, ""]
    confusion: Int32[Array, "classes classes"]  # rows true, columns predicted


class EvalResult(NamedTuple):
    """What an evaluation found."""

    loss: float
    accuracy: float
    confusion: Int[np.ndarray, "classes classes"]

    @property
    def num(self) -> int:
        """Number of examples."""
        return int(self.confusion.sum())

    @property
    def class_accuracy(self) -> Float[np.ndarray, "classes"]:
        """Share of each class's examples that were classified rightly; NaN for a class without examples."""
        totals = self.confusion.sum(axis=1)
        return np.where(totals > 0, np.diag(self.confusion) / np.maximum(totals, 1), np.nan)


def logits_sums(logits: Float[Array, "batch classes"], batch: Batch) -> EvalSums:
    """Sums over the real examples of a batch."""
    num_classes = logits.shape[-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels) * batch.weights
    cells = batch.labels * num_classes + jnp.argmax(logits, axis=-1).astype(jnp.int32)
    confusion = jnp.zeros(num_classes**2, jnp.int32).at[cells].add(batch.weights.astype(jnp.int32))
    return EvalSums(losses.sum(), confusion.reshape(num_classes, num_classes))


@jax.jit
def eval_step(params: HeadParams, batch: Batch) -> EvalSums:
    """Sums of the head on a batch of features."""
    return logits_sums(head_logits(params, batch.inputs), batch)


def eval_batches(inputs: Array | np.ndarray, labels: Int32[np.ndarray, "n"], batch_size: int) -> Iterator[Batch]:
    """All examples in batches of one shape, the last one filled up and weighted."""
    batch_size = min(batch_size, len(labels))
    for start in range(0, len(labels), batch_size):
        rows = np.arange(start, start + batch_size)
        real = min(batch_size, len(labels) - start)
        rows[real:] = 0
        yield Batch(jnp.asarray(inputs[rows]), jnp.asarray(labels[rows]), real_weights(batch_size, jnp.int32(real)))


def evaluate(
    step: Callable[[PyTree, Batch], EvalSums],
    params: PyTree,
    inputs: Array | np.ndarray,
    labels: Int32[np.ndarray, "n"],
    batch_size: int = 2048,
    on_examples: Callable[[int], None] = lambda _: None,
) -> EvalResult:
    """Loss, accuracy and confusion matrix over all examples.

    Args:
      step: `eval_step`, or another `(params, batch) -> EvalSums`.
      params: its first argument.
      inputs: what the step takes, [n, ...].
      labels: in 0..classes - 1.
      batch_size: examples at a time; the result does not depend on it but for rounding of the loss.
      on_examples: is called with the number done after each batch.

    Raises:
      ValueError: when there are no examples.
    """
    if not len(labels):
        raise ValueError("there are no examples to evaluate on")
    loss_sum, confusion, done = 0.0, None, 0
    for batch in eval_batches(inputs, labels, batch_size):
        sums = jax.device_get(step(params, batch))
        loss_sum += float(sums.loss_sum)
        confusion = sums.confusion.astype(np.int64) + (0 if confusion is None else confusion)
        done = min(done + batch_size, len(labels))
        on_examples(done)
    assert confusion is not None and confusion.sum() == len(labels), "every example is counted once"
    return EvalResult(loss_sum / len(labels), float(np.trace(confusion) / len(labels)), confusion)


def wilson_interval(accuracy: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of an accuracy measured on `count` examples.

    Reference:
      Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22.
    """
    centre = accuracy + z**2 / (2 * count)
    spread = z * math.sqrt(accuracy * (1 - accuracy) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
