"""Evaluation over all examples: sums are divided by counts once, at the end, so the batch size does not matter."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int, Int32, PyTree

from cifar_jax.data.pipeline import read_batches
from cifar_jax.models.head import dense_logits
from cifar_jax.runtime.devices import is_out_of_memory
from cifar_jax.runtime.progress import Reporter, Silent
from cifar_jax.runtime.sharding import (
    local_rows,
    make_mesh,
    replicate,
    replicated_sharding,
    round_up,
    shard,
    shard_local,
)
from cifar_jax.train.losses import LossFn, cross_entropy, losses_of
from cifar_jax.train.step import TrainState, classes_of
from cifar_jax.train.task import Batch, Forward, Task, head_forward

logger = logging.getLogger(__name__)

# Batches dispatched to the devices before the host waits for the first of them.
AHEAD = 2


class EvalSums(NamedTuple):
    """Sums over a batch, and the logits of the batch."""

    loss_sum: Float[Array, ""]
    confusion: Int32[Array, "classes classes"]  # rows true, columns predicted
    logits: Float[Array, "batch classes"]


class EvalResult(NamedTuple):
    """Scores on a split.

    Attributes:
      loss: mean loss over the examples.
      accuracy: fraction of the examples that were classified correctly.
      confusion: confusion matrix of counts; rows are true classes, columns predicted ones.
      logits: logits of every example, in the order of the split.
    """

    loss: float
    accuracy: float
    confusion: Int[np.ndarray, "classes classes"]
    logits: Float32[np.ndarray, "n classes"]

    @property
    def num(self) -> int:
        """Number of examples."""
        return int(self.confusion.sum())

    @property
    def class_accuracy(self) -> Float[np.ndarray, "classes"]:
        """Fraction of each class's examples that were classified correctly; NaN for a class without examples."""
        return _share(np.diag(self.confusion), self.support)

    @property
    def support(self) -> Int[np.ndarray, "classes"]:
        """Number of examples of each class."""
        return self.confusion.sum(axis=1)

    @property
    def recall(self) -> Float[np.ndarray, "classes"]:
        """The same as `class_accuracy`."""
        return self.class_accuracy

    @property
    def precision(self) -> Float[np.ndarray, "classes"]:
        """Fraction of the predictions of each class that were correct; NaN for a class that was never predicted."""
        return _share(np.diag(self.confusion), self.confusion.sum(axis=0))

    @property
    def f1(self) -> Float[np.ndarray, "classes"]:
        """Harmonic mean of precision and recall; NaN for a class without examples that was never predicted."""
        return _share(2 * np.diag(self.confusion), self.support + self.confusion.sum(axis=0))

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall over the classes that have examples."""
        return float(self.recall[self.support > 0].mean())


def _share(counts: Int[np.ndarray, "classes"], totals: Int[np.ndarray, "classes"]) -> Float[np.ndarray, "classes"]:
    return np.where(totals > 0, counts / np.maximum(totals, 1), np.nan)


EvalStep = Callable[[PyTree, PyTree, PyTree, Batch], EvalSums]


def make_eval_step(forward: Forward, loss_fn: LossFn) -> EvalStep:
    """Makes the pure function that evaluates one batch, for validation, test and figures.

    Args:
      forward: the forward function of a `Task`.
      loss_fn: the loss that the task trains on, so that training and validation losses are comparable.

    Returns:
      `eval_step(params, batch_stats, frozen, batch) -> EvalSums`.
    """

    def eval_step(params: PyTree, batch_stats: PyTree, frozen: PyTree, batch: Batch) -> EvalSums:
        logits, _ = forward(params, batch_stats, frozen, batch.inputs, train=False, key=None, mask=batch.mask)
        num_classes = logits.shape[-1]
        losses = losses_of(loss_fn, logits, batch.labels) * batch.mask
        cells = classes_of(batch.labels) * num_classes + jnp.argmax(logits, axis=-1).astype(jnp.int32)
        confusion = jnp.zeros(num_classes**2, jnp.int32).at[cells].add(batch.mask.astype(jnp.int32))
        return EvalSums(losses.sum(), confusion.reshape(num_classes, num_classes), logits)

    return eval_step


_head_eval_step = make_eval_step(head_forward(dense_logits), cross_entropy)


@jax.jit
def eval_step(params: PyTree, batch: Batch) -> EvalSums:
    """Evaluates the dense head on a batch of features; `params` is {"head": params of `init_head`}."""
    return _head_eval_step(params, {}, {}, batch)


# `(state, frozen, split) -> EvalResult`. `frozen` defaults to the task's, `split` to `val`, or to `test` without one.
Evaluate = Callable[..., EvalResult]


def make_evaluate(
    task: Task,
    loss_fn: LossFn,
    mesh: Mesh | None = None,
    batch_size: int = 256,
    reporter: Reporter | None = None,
    stopping: Callable[[], bool] | None = None,
) -> Evaluate:
    """Makes the function that evaluates a task's splits, compiled once for all of them.

    Args:
      task: the task whose splits are scored, all but `train`.
      loss_fn: the loss that the task trains on.
      mesh: the devices that a batch is sharded over; `make_mesh(None)` if None.
      batch_size: examples per batch; affects the result only by rounding of the loss. If the devices of a
        single process run out of memory on images, it is halved, which is logged.
      reporter: shows a progress bar if the inputs do not reside on the devices.
      stopping: polled for each batch; returns whether to stop.

    Returns:
      `evaluate(state, frozen, split) -> EvalResult`, which raises KeyboardInterrupt if `stopping` returns True. `fit`
      calls it as `evaluate(state)`.

    Raises:
      ValueError: if there is no split to score.
    """
    mesh = mesh or make_mesh(None)
    step = jax.jit(make_eval_step(task.forward, loss_fn), out_shardings=replicated_sharding(mesh))
    scored = {name: split for name, split in task.splits.items() if name != "train"}
    if not scored:
        raise ValueError("the task has no split to evaluate on: give it `val` or `test` beside `train`")
    batch_size = min(batch_size, max(len(split.labels) for split in scored.values()))
    # Features stay on the devices; images are transferred batch by batch at every evaluation.
    kept = {
        name: list(eval_batches(split.inputs, split.labels, batch_size, mesh))
        for name, split in scored.items()
        if split.resident
    }
    reporter, compiles = reporter or Silent(), iter((True,))

    def evaluate(state: TrainState, frozen: PyTree = None, split: str | None = None) -> EvalResult:
        nonlocal batch_size
        split = split or ("val" if "val" in scored else next(iter(scored)))
        frozen = task.frozen if frozen is None else frozen
        placed = replicate(mesh, (state.params, state.batch_stats, frozen))
        inputs, labels, resident = scored[split]
        name, shown = {"val": "held-out"}.get(split, split), Silent() if resident else reporter
        while True:
            batches = kept[split] if resident else eval_batches(inputs, labels, batch_size, mesh)
            with shown.progress(f"Evaluating {name} images", len(labels), next(compiles, False)) as bar:
                bar(0)
                tally = _Tally(len(labels), bar)
                try:
                    for batch in batches:
                        if not resident and stopping and stopping():
                            raise KeyboardInterrupt
                        tally.add(step(*placed, batch))
                    return tally.result()
                except jax.errors.JaxRuntimeError as error:
                    # Other processes would not know that this one begins again.
                    alone = jax.process_count() == 1
                    if resident or not alone or not is_out_of_memory(error) or batch_size <= mesh.size:
                        raise
                    batch_size //= 2
                    logger.info(f"Out of memory in the evaluation; repeating it with batches of {batch_size}.")

    return evaluate


def evaluate(
    step: Callable[[PyTree, Batch], EvalSums],
    params: PyTree,
    inputs: Array | np.ndarray,
    labels: Int32[np.ndarray, "n"],
    batch_size: int = 2048,
    on_examples: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
) -> EvalResult:
    """Computes loss, accuracy, confusion matrix and logits over all examples.

    Args:
      step: `eval_step`, or another `(params, batch) -> EvalSums`.
      params: the first argument of `step`.
      inputs: inputs of `step`, [n, ...].
      labels: labels in 0..classes - 1.
      batch_size: examples per batch; affects the result only by rounding of the loss.
      on_examples: called after each batch with the number of examples evaluated so far.
      mesh: the devices that a batch is sharded over; one device if None.

    Raises:
      ValueError: if there are no examples.
    """
    mesh = mesh or make_mesh()
    tally, params = _Tally(len(labels), on_examples), replicate(mesh, params)
    for batch in eval_batches(inputs, labels, min(batch_size, len(labels)), mesh):
        tally.add(step(params, batch))
    return tally.result()


def eval_batches(
    inputs: Array | np.ndarray, labels: Int32[np.ndarray, "n"], batch_size: int, mesh: Mesh
) -> Iterator[Batch]:
    """Yields all examples in batches of one shape, sharded over the devices; the last batch is padded."""
    batch_size = round_up(mesh, batch_size)
    starts = range(0, len(labels), batch_size)
    numbers = [np.arange(start, start + batch_size) for start in starts]
    batches = [np.where(rows < len(labels), rows, 0) for rows in numbers]
    own = local_rows(mesh, batch_size)
    images = read_batches(inputs, [rows[own] for rows in batches])
    for number, rows, local in zip(numbers, batches, images, strict=True):
        real = (number < len(labels)).astype(np.float32)
        yield Batch(shard_local(mesh, local), *shard(mesh, (labels[rows], real)))


class _Tally:
    """Accumulates the sums of batches, reading each a few batches late so that the devices stay busy."""

    def __init__(self, num_examples: int, on_examples: Callable[[int], None] | None = None) -> None:
        if not num_examples:
            raise ValueError("there are no examples to evaluate on")
        self._num, self._on_examples = num_examples, on_examples
        self._running: deque[EvalSums] = deque()
        self._loss_sum, self._confusion, self._logits = 0.0, np.zeros((), np.int64), list[np.ndarray]()

    def add(self, sums: EvalSums) -> None:
        """Adds the sums of the next batch."""
        self._running.append(sums)
        self._wait_for(AHEAD)

    def _wait_for(self, left: int) -> None:
        while len(self._running) > left:
            loss_sum, confusion, logits = jax.device_get(self._running.popleft())
            self._loss_sum += float(loss_sum)
            self._confusion = self._confusion + confusion
            self._logits.append(logits)
            if self._on_examples:
                self._on_examples(min(len(self._logits) * len(logits), self._num))

    def result(self) -> EvalResult:
        """Waits for the last batch and returns the scores."""
        self._wait_for(0)
        assert self._confusion.sum() == self._num, "every example is counted once"
        accuracy = float(np.trace(self._confusion) / self._num)
        return EvalResult(
            self._loss_sum / self._num, accuracy, self._confusion, np.concatenate(self._logits)[: self._num]
        )


def wilson_interval(accuracy: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval, 95 % by default, of an accuracy measured on `count` examples.

    Reference:
      Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22.
    """
    centre = accuracy + z**2 / (2 * count)
    spread = z * math.sqrt(accuracy * (1 - accuracy) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
