"""Evaluation over all examples: sums and counts, divided once at the end, so the batch size cannot matter."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int32, PyTree

from cifar_jax.head import HeadParams, head_logits
from cifar_jax.parallel import make_mesh, replicate, round_up, shard
from cifar_jax.training import Batch


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


def eval_batches(
    inputs: Array | np.ndarray, labels: Int32[np.ndarray, "n"], batch_size: int, mesh: Mesh
) -> Iterator[Batch]:
    """All examples in batches of one shape, divided between the devices, the last one filled up and weighted."""
    batch_size = round_up(mesh, min(batch_size, len(labels)))
    for start in range(0, len(labels), batch_size):
        rows = np.arange(start, start + batch_size)
        real = rows < len(labels)
        rows[~real] = 0
        yield Batch(*shard(mesh, (inputs[rows], labels[rows], real.astype(np.float32))))


def evaluate(
    step: Callable[[PyTree, Batch], EvalSums],
    params: PyTree,
    inputs: Array | np.ndarray,
    labels: Int32[np.ndarray, "n"],
    batch_size: int = 2048,
    on_examples: Callable[[int], None] = lambda _: None,
    mesh: Mesh | None = None,
) -> EvalResult:
    """Loss, accuracy and confusion matrix over all examples.

    Args:
      step: `eval_step`, or another `(params, batch) -> EvalSums`.
      params: its first argument.
      inputs: what the step takes, [n, ...].
      labels: in 0..classes - 1.
      batch_size: examples at a time; the result does not depend on it but for rounding of the loss.
      on_examples: is called with the number done after each batch.
      mesh: the devices that a batch is divided between; one if None.

    Raises:
      ValueError: when there are no examples.
    """
    mesh = mesh or make_mesh()
    batches = eval_batches(inputs, labels, batch_size, mesh)
    return evaluate_batches(step, replicate(mesh, params), batches, len(labels), on_examples)


def evaluate_batches(
    step: Callable[[PyTree, Batch], EvalSums],
    params: PyTree,
    batches: Iterable[Batch],
    num_examples: int,
    on_examples: Callable[[int], None] = lambda _: None,
) -> EvalResult:
    """The same of batches from `eval_batches`, which hold `num_examples` real examples."""
    if not num_examples:
        raise ValueError("there are no examples to evaluate on")
    loss_sum, confusion, done = 0.0, None, 0
    for batch in batches:
        sums = jax.device_get(step(params, batch))
        loss_sum += float(sums.loss_sum)
        confusion = sums.confusion.astype(np.int64) + (0 if confusion is None else confusion)
        done = min(done + len(batch.labels), num_examples)
        on_examples(done)
    assert confusion is not None and confusion.sum() == num_examples, "every example is counted once"
    return EvalResult(loss_sum / num_examples, float(np.trace(confusion) / num_examples), confusion)


def wilson_interval(accuracy: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of an accuracy measured on `count` examples.

    Reference:
      Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22.
    """
    centre = accuracy + z**2 / (2 * count)
    spread = z * math.sqrt(accuracy * (1 - accuracy) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
