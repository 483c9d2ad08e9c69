"""The training loop: how the steps of an epoch are run, and one loop over epochs for every task."""

import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32, PRNGKeyArray, PyTree

from cifar_jax.data import epoch_batches
from cifar_jax.errors import RunError
from cifar_jax.runtime.progress import EpochRow, Reporter, Silent
from cifar_jax.runtime.sharding import make_mesh, replicate, round_up, shard
from cifar_jax.train.evaluate import EvalResult
from cifar_jax.train.step import StepMetrics, TrainState, TrainStep, is_finite, scan_steps
from cifar_jax.train.task import Batch, Task

# Steps that the devices are given before the host waits for the first of them, so that it never waits for the one that
# runs, and what is queued stays within bounds.
AHEAD = 8


class EpochOrder(NamedTuple):
    """The order of the training examples, and the key that steps draw from."""

    order_key: PRNGKeyArray
    step_key: PRNGKeyArray
    batch_size: int
    shuffle: bool = True

    def batches(
        self, epoch: int, num_examples: int
    ) -> tuple[Int32[np.ndarray, "steps batch"], Int32[np.ndarray, "steps"]]:
        """Indices and counts of an epoch's steps; see `epoch_batches`."""
        return epoch_batches(self.order_key, epoch, num_examples, self.batch_size, self.shuffle)

    def steps(self, num_examples: int) -> int:
        """Steps of an epoch, a short last one included."""
        return -(-num_examples // self.batch_size)


class Advance(NamedTuple):
    """Runs steps of an epoch, compiled; from `make_advance`.

    Attributes:
      run: `(state, frozen, *arguments) -> (state, metrics)`, compiled; the state is donated, and the metrics, an entry
        a step, need not be there yet.
      arguments: `(epoch, steps) -> arguments` of `run` for these steps.
      batch: `(epoch, step) -> Batch`, the examples of a step.
      order: of the examples.
      num_examples: how many there are.
      at_once: how many steps one call runs; any number if None.
      mesh: the devices.
    """

    run: Callable[..., tuple[TrainState, StepMetrics]]
    arguments: Callable[[int, range], tuple[Any, ...]]
    batch: Callable[[int, int], Batch]
    order: EpochOrder
    num_examples: int
    at_once: int | None
    mesh: Mesh

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, a short last one included."""
        return self.order.steps(self.num_examples)

    def __call__(self, state: TrainState, frozen: PyTree, epoch: int, steps: range) -> tuple[TrainState, StepMetrics]:
        """Runs consecutive steps of an epoch, which may be none. Epochs and steps count from zero."""
        (state, frozen), metrics = replicate(self.mesh, (state, frozen)), []
        for start in range(steps.start, steps.stop, self.at_once or max(1, len(steps))):
            piece = range(start, min(steps.stop, start + (self.at_once or len(steps))))
            state, sums = self.run(state, frozen, *self.arguments(epoch, piece))
            metrics.append(sums)
        return state, joined(metrics)


def make_advance(task: Task, train_step: TrainStep, order: EpochOrder, mesh: Mesh | None = None) -> Advance:
    """Compiles the steps of a task: one scan where its inputs lie on the devices, else step by step.

    Batches are divided between the devices of the mesh, `make_mesh(None)` if None. The short last one of an epoch is
    padded to the shape of the others, unless the task carries batch_stats: then it is a step of its own shape, padded
    only to be divided.
    """
    mesh = mesh or make_mesh(None)
    inputs, labels, resident = task.splits["train"]
    num, pads = len(labels), resident or not jax.tree.leaves(task.batch_stats)

    def padded(index: Int32[np.ndarray, "... batch"], count: int = 0) -> Int32[np.ndarray, "... padded"]:
        size = round_up(mesh, order.batch_size if pads else count)
        return np.pad(index, [(0, 0)] * (index.ndim - 1) + [(0, size - index.shape[-1])])

    # Drawn once an epoch, not at every step.
    rows_of = functools.lru_cache(maxsize=1)(lambda epoch: order.batches(epoch, num))

    def batch(epoch: int, step: int) -> Batch:
        indices, counts = rows_of(epoch)
        count = int(counts[step])
        index = padded(indices[step, :count], count)
        mask = (np.arange(len(index)) < count).astype(np.float32)
        return Batch(*shard(mesh, (inputs[index], labels[index], mask)))

    if not resident:
        step = jax.jit(train_step, donate_argnums=0)
        return Advance(
            step, lambda epoch, steps: (batch(epoch, steps.start), order.step_key), batch, order, num, 1, mesh
        )

    on_devices = replicate(mesh, (np.asarray(inputs), np.asarray(labels)))

    def arguments(epoch: int, steps: range) -> tuple[Any, ...]:
        indices, counts = (rows[steps.start : steps.stop] for rows in rows_of(epoch))
        return *on_devices, shard(mesh, padded(indices), axis=1), counts, order.step_key

    return Advance(jax.jit(scan_steps(train_step), donate_argnums=0), arguments, batch, order, num, None, mesh)


def joined(parts: list[StepMetrics]) -> StepMetrics:
    """Metrics on the host, one entry a step."""
    empty: Any = (np.zeros(0, dtype) for dtype in (np.float32, np.int32, np.int32, np.bool_))
    one_each = [jax.tree.map(np.atleast_1d, part) for part in jax.device_get(parts)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), StepMetrics(*empty), *one_each)


class EpochPart(NamedTuple):
    """The steps of an epoch that are done, when not all of it is, evaluation included."""

    metrics: StepMetrics  # one entry a step
    seconds: float


class Diverged(RunError):
    """A loss, gradient or parameter that is not finite.

    `state` is that after the last good step; where an update was not finite, it is the state that the update spoilt.
    """

    def __init__(self, state: TrainState, epoch: int, step: int, fault: str = "", more: str = "") -> None:
        """Takes where it happened and what is known of its cause.

        Args:
          state: after the last good step, or spoilt by an update.
          epoch: counted from one.
          step: within the epoch, counted from one.
          fault: the first tensor of the step that was not finite.
          more: further sentences.
        """
        self.state, self.epoch, self.step, self.fault = state, epoch, step, fault
        first = f" (first {fault})" if fault else ""
        super().__init__(f"Loss or gradient was not finite in epoch {epoch}, step {step}{first}.{more and ' ' + more}")


def fit(
    state: TrainState,
    frozen: PyTree,
    advance: Advance,
    evaluate: Callable[[TrainState], EvalResult],
    num_epochs: int,
    *,
    first_epoch: int = 0,
    part: EpochPart | None = None,
    checkpoint_every: int | None = None,
    on_epoch: Callable[[EpochRow, EvalResult, TrainState], None] | None = None,
    on_part: Callable[[EpochPart, TrainState], None] | None = None,
    stopping: Callable[[], bool] | None = None,
    reporter: Reporter | None = None,
) -> tuple[TrainState, list[EpochRow]]:
    """Trains for a number of epochs, evaluating after each.

    Args:
      state: from `init_state`; donated.
      frozen: of the task.
      advance: from `make_advance`.
      evaluate: scores a state on the validation split; from `make_evaluate`.
      num_epochs: how many in all.
      first_epoch: how many of them `state` has behind it already.
      part: of the next epoch, that `state` has behind it too.
      checkpoint_every: steps of an epoch after which `on_part` is called.
      on_epoch: is called after each epoch with its metrics, its scores and the state, which the next step takes over.
      on_part: is called with the steps of an epoch that are done and the state, there and before a stop.
      stopping: whether to stop; asked after each step, or where an epoch is one compiled call after that.
      reporter: shown a bar of examples.

    Raises:
      Diverged: when a loss, gradient or update was not finite. No state was handed out whose params or batch_stats are
        not finite; opt_state is not looked at.
      KeyboardInterrupt: when it was asked to stop, all that was done having been handed out.
    """
    state, frozen = replicate(advance.mesh, (state, frozen))
    rows: list[EpochRow] = []
    bars, compiles = reporter or Silent(), True
    for epoch in range(first_epoch, num_epochs):
        start = time.perf_counter() - (part.seconds if part else 0.0)

        def keep(state: TrainState, metrics: StepMetrics, epoch: int = epoch, start: float = start) -> None:
            _require_finite(state, epoch, len(metrics.num))
            if on_part:
                on_part(EpochPart(metrics, time.perf_counter() - start), state)

        with bars.progress(f"Epoch {epoch + 1}", advance.num_examples, compiles) as bar:
            before = part and part.metrics
            state, metrics = _run_epoch(state, frozen, advance, epoch, before, checkpoint_every, keep, stopping, bar)
        try:
            result = evaluate(state)
        except KeyboardInterrupt:
            keep(state, metrics)
            raise
        _require_finite(state, epoch, advance.steps_per_epoch)
        if not np.isfinite(result.loss):  # as of statistics that grew out of bounds: no state to save or continue from
            raise Diverged(state, epoch + 1, advance.steps_per_epoch, "the loss after the epoch")
        count = metrics.num.sum()
        row = EpochRow(
            epoch=epoch + 1,
            train_loss=float(metrics.loss_sum.sum(dtype=np.float64) / count),
            train_accuracy=float(metrics.correct.sum() / count),
            val_loss=result.loss,
            val_accuracy=result.accuracy,
            seconds=time.perf_counter() - start,
        )
        rows.append(row)
        if on_epoch:
            on_epoch(row, result, state)
        part, compiles = None, False
        if stopping and stopping():
            raise KeyboardInterrupt
    return state, rows


def _run_epoch(
    state: TrainState,
    frozen: PyTree,
    advance: Advance,
    epoch: int,
    before: StepMetrics | None,
    checkpoint_every: int | None,
    keep: Callable[[TrainState, StepMetrics], None],
    stopping: Callable[[], bool] | None,
    bar: Callable[[int], None],
) -> tuple[TrainState, StepMetrics]:
    """The steps of an epoch that are left, and the metrics of all of them."""
    metrics, running = [before] if before else [], deque[tuple[int, StepMetrics]]()
    total, done = advance.steps_per_epoch, len(before.num) if before else 0
    every = checkpoint_every or total

    def wait_for(left: int) -> None:
        """Waits until that many steps at most are under way."""
        while len(running) > left:
            first, sums = running.popleft()
            metrics.append(joined([sums]))
            if not (finite := metrics[-1].finite).all():
                raise Diverged(state, epoch + 1, first + int(np.argmin(finite)) + 1)
            bar(min((first + len(finite)) * advance.order.batch_size, advance.num_examples))

    bar(min(done * advance.order.batch_size, advance.num_examples))
    while done < total:
        boundary, stop = min(total, (done // every + 1) * every), False
        while done < boundary and not stop:
            steps = range(done, min(boundary, done + (advance.at_once or total)))
            state, sums = advance.run(state, frozen, *advance.arguments(epoch, steps))
            running.append((steps.start, sums))
            done, stop = steps.stop, bool(stopping and stopping())
            wait_for(AHEAD)
        wait_for(0)
        if stop or done < total:
            keep(state, joined(metrics))
        if stop:
            raise KeyboardInterrupt
    return state, joined(metrics)


def _require_finite(state: TrainState, epoch: int, steps: int) -> None:
    """Looks at what the optimiser made of finite gradients, before a state is saved."""
    if not is_finite((state.params, state.batch_stats)):
        raise Diverged(state, epoch + 1, steps, "an update")
