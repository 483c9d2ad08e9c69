"""The training loop: compiled execution of an epoch's steps, and one loop over epochs for every task."""

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
from cifar_jax.data.pipeline import batch_reader
from cifar_jax.errors import RunError
from cifar_jax.runtime.progress import EpochRow, Reporter, Silent
from cifar_jax.runtime.sharding import local_rows, make_mesh, replicate, round_up, shard, shard_local
from cifar_jax.train.evaluate import EvalResult
from cifar_jax.train.step import StepMetrics, TrainState, TrainStep, is_finite, scan_steps
from cifar_jax.train.task import Batch, Task

# Steps dispatched to the devices before the host waits for the oldest of them: enough to keep the devices busy, few
# enough to bound the queue.
AHEAD = 8


class EpochOrder(NamedTuple):
    """The order of the training examples, and the key of the steps' randomness."""

    order_key: PRNGKeyArray
    step_key: PRNGKeyArray
    batch_size: int
    shuffle: bool = True

    def batches(
        self, epoch: int, num_examples: int
    ) -> tuple[Int32[np.ndarray, "steps batch"], Int32[np.ndarray, "steps"]]:
        """Example indices and example counts of an epoch's steps; see `epoch_batches`."""
        return epoch_batches(self.order_key, epoch, num_examples, self.batch_size, self.shuffle)


class Advance(NamedTuple):
    """Runs compiled steps of an epoch; made by `make_advance`."""

    # `(state, frozen, *arguments) -> (state, metrics)`; donates the state. The metrics, one per step, may not be ready.
    run: Callable[..., tuple[TrainState, StepMetrics]]
    arguments: Callable[[int, range], tuple[Any, ...]]  # `(epoch, steps) -> arguments` of `run` for these steps
    batch: Callable[[int, int], Batch]  # `(epoch, step) -> Batch`
    order: EpochOrder
    num_examples: int
    one_by_one: bool  # whether `run` takes a single step rather than any number of consecutive ones
    mesh: Mesh

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps per epoch, including a short last one."""
        return -(-self.num_examples // self.order.batch_size)

    def calls(self, steps: range) -> list[range]:
        """Divides consecutive steps between calls of `run`."""
        if self.one_by_one:
            return [range(step, step + 1) for step in steps]
        return [steps] if steps else []

    def __call__(self, state: TrainState, frozen: PyTree, epoch: int, steps: range) -> tuple[TrainState, StepMetrics]:
        """Runs consecutive steps of an epoch; `steps` may be empty. Epochs and steps count from zero."""
        (state, frozen), metrics = replicate(self.mesh, (state, frozen)), []
        for call in self.calls(steps):
            state, sums = self.run(state, frozen, *self.arguments(epoch, call))
            metrics.append(sums)
        return state, joined(metrics)


def make_advance(task: Task, train_step: TrainStep, order: EpochOrder, mesh: Mesh | None = None) -> Advance:
    """Compiles the steps of a task: one scan if its inputs reside on the devices, otherwise one call per step.

    Batches are sharded over the mesh, `make_mesh(None)` if None. The short last batch of an epoch is padded to the
    shape of the others, unless the task has batch_stats: then it keeps its own shape and is padded only as far as
    sharding requires.
    """
    mesh = mesh or make_mesh(None)
    inputs, labels, resident = task.splits["train"]
    num, pads = len(labels), resident or not jax.tree.leaves(task.batch_stats)

    def padded(index: Int32[np.ndarray, "... batch"], count: int = 0) -> Int32[np.ndarray, "... padded"]:
        size = round_up(mesh, order.batch_size if pads else count)
        return np.pad(index, [(0, 0)] * (index.ndim - 1) + [(0, size - index.shape[-1])])

    # Cached, so that the order is drawn once per epoch instead of at every step.
    rows_of = functools.lru_cache(maxsize=1)(lambda epoch: order.batches(epoch, num))

    @functools.lru_cache(maxsize=1)
    def indices_of(epoch: int) -> list[Int32[np.ndarray, "batch"]]:
        indices, counts = rows_of(epoch)
        return [padded(row[:count], count) for row, count in zip(indices, counts.tolist(), strict=True)]

    # Each process reads what its own devices need; images are decoded ahead.
    read = batch_reader(inputs, lambda epoch: [index[local_rows(mesh, len(index))] for index in indices_of(epoch)])

    def batch(epoch: int, step: int) -> Batch:
        index, count = indices_of(epoch)[step], int(rows_of(epoch)[1][step])
        mask = (np.arange(len(index)) < count).astype(np.float32)
        return Batch(shard_local(mesh, read(epoch, step)), *shard(mesh, (labels[index], mask)))

    if not resident:
        step = jax.jit(train_step, donate_argnums=0)
        return Advance(
            step, lambda epoch, steps: (batch(epoch, steps.start), order.step_key), batch, order, num, True, mesh
        )

    on_devices = replicate(mesh, (np.asarray(inputs), np.asarray(labels)))

    def arguments(epoch: int, steps: range) -> tuple[Any, ...]:
        indices, counts = (rows[steps.start : steps.stop] for rows in rows_of(epoch))
        return *on_devices, shard(mesh, padded(indices), axis=1), counts, order.step_key

    return Advance(jax.jit(scan_steps(train_step), donate_argnums=0), arguments, batch, order, num, False, mesh)


def joined(parts: list[StepMetrics]) -> StepMetrics:
    """Concatenates metrics on the host, one entry per step."""
    empty: Any = (np.zeros(0, dtype) for dtype in (np.float32, np.int32, np.int32, np.bool_))
    one_each = [jax.tree.map(np.atleast_1d, part) for part in jax.device_get(parts)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), StepMetrics(*empty), *one_each)


class EpochPart(NamedTuple):
    """The completed steps of an epoch that is unfinished; an epoch ends with its evaluation."""

    metrics: StepMetrics  # one entry per step
    seconds: float


class Diverged(RunError):
    """Raised when a loss, gradient or parameter is not finite.

    `state` is the state after the last good step, or if an update was not finite, the state after that update.
    """

    in_all_processes = True  # of a run, as the state and the metrics of a step are the same in all of them

    def __init__(self, state: TrainState, epoch: int, step: int, fault: str = "", more: str = "") -> None:
        """Takes the epoch and step, counted from one, the first tensor that was not finite, and more sentences."""
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
      frozen: the frozen variables of the task.
      advance: from `make_advance`.
      evaluate: scores a state on the validation split; from `make_evaluate`.
      num_epochs: total number of epochs.
      first_epoch: number of epochs that `state` has already completed.
      part: the steps of the next epoch that `state` has already completed.
      checkpoint_every: number of steps between calls of `on_part` within an epoch.
      on_epoch: called after each epoch with its metrics, its scores and the state, which the next step donates.
      on_part: called with the completed steps of an epoch and the state, every `checkpoint_every` steps and before a
        stop.
      stopping: returns whether to stop; polled after each step, or after the epoch if that is one compiled call.
      reporter: shows a progress bar of examples.

    Raises:
      Diverged: if a loss, gradient or update was not finite. States passed to the callbacks always have finite params
        and batch_stats; opt_state is not checked.
      KeyboardInterrupt: if `stopping` returned True; all completed steps have been passed to the callbacks.
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
        if not np.isfinite(result.loss):  # e.g. running statistics overflowed: not a state to save or continue from
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
    """Runs the remaining steps of an epoch; returns the state and the metrics of all its steps."""
    metrics, running = [before] if before else [], deque[tuple[int, StepMetrics]]()
    total, done = advance.steps_per_epoch, len(before.num) if before else 0
    every = checkpoint_every or total

    def wait_for(left: int) -> None:
        """Waits until at most `left` calls are still running."""
        while len(running) > left:
            first, sums = running.popleft()
            metrics.append(joined([sums]))
            if not (finite := metrics[-1].finite).all():
                raise Diverged(state, epoch + 1, first + int(np.argmin(finite)) + 1)
            bar(min((first + len(finite)) * advance.order.batch_size, advance.num_examples))

    bar(min(done * advance.order.batch_size, advance.num_examples))
    stop = False
    while done < total:
        for steps in advance.calls(range(done, min(total, (done // every + 1) * every))):
            state, sums = advance.run(state, frozen, *advance.arguments(epoch, steps))
            running.append((steps.start, sums))
            done, stop = steps.stop, bool(stopping and stopping())
            wait_for(AHEAD)
            if stop:
                break
        wait_for(0)
        if stop or done < total:
            keep(state, joined(metrics))
        if stop:
            raise KeyboardInterrupt
    return state, joined(metrics)


def _require_finite(state: TrainState, epoch: int, steps: int) -> None:
    """Checks params and batch_stats before a state is saved: finite gradients can still give a non-finite update."""
    if not is_finite((state.params, state.batch_stats)):
        raise Diverged(state, epoch + 1, steps, "an update")
