"""The loop over epochs: steps, evaluation, and what is handed out to be kept."""

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from cifar_jax.checkpoint import Position
from cifar_jax.errors import RunError
from cifar_jax.runners import Evaluate, Runner
from cifar_jax.training import StepMetrics, TrainState


class EpochRow(NamedTuple):
    """A line of metrics.jsonl. Training figures are running means over the epoch, as Keras reports them."""

    epoch: int  # counted from one
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float


class EpochPart(NamedTuple):
    """The steps of an epoch that are done, when not all of it is, evaluation included."""

    metrics: StepMetrics  # one entry a step
    seconds: float


class Diverged(RunError):
    """A loss or gradient that is not finite. `state` is the last good one."""

    def __init__(self, state: TrainState, epoch: int, step: int, fault: str = "", more: str = "") -> None:
        """Takes where it happened and what is known of its cause.

        Args:
          state: the last good one.
          epoch: counted from one.
          step: within the epoch, counted from one.
          fault: the first tensor of the step that was not finite.
          more: further sentences.
        """
        self.state, self.epoch, self.step, self.fault = state, epoch, step, fault
        first = f" (first {fault})" if fault else ""
        super().__init__(f"Loss or gradient was not finite in epoch {epoch}, step {step}{first}.{more and ' ' + more}")

    def at(self, learning_rate: float, saved: Position, out: Path) -> "Diverged":
        """The same, with the learning rate of the step and how to continue from the newest checkpoint."""
        rate = f"The learning rate was {learning_rate:.3g}."
        kept = f"The checkpoint after {saved.words} is kept. " if saved > (0, 0) else ""
        more = (
            f"{rate} {kept}Continue with a lower --learning-rate and --resume --out {shlex.quote(str(out))}, or start "
            "again with --overwrite."
        )
        return Diverged(self.state, self.epoch, self.step, self.fault, more)


def fit(
    state: TrainState,
    runner: Runner,
    evaluate_params: Evaluate,
    num_epochs: int,
    on_epoch: Callable[[EpochRow, TrainState], None] = lambda *_: None,
    *,
    first_epoch: int = 0,
    part: EpochPart | None = None,
    checkpoint_every: int | None = None,
    on_part: Callable[[EpochPart, TrainState], None] = lambda *_: None,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[TrainState, list[EpochRow]]:
    """Trains for a number of epochs, evaluating after each.

    Args:
      state: from `init_state`; donated.
      runner: from `cached_runner`, `live_runner` or `finetune_runner`.
      evaluate_params: from the evaluator of the same name.
      num_epochs: how many in all.
      on_epoch: is called after each with its figures and the state, whose memory the next epoch takes over.
      first_epoch: how many of them `state` has behind it already.
      part: of the next epoch, that `state` has behind it too.
      checkpoint_every: steps of an epoch after which `on_part` is called; it has no other effect where steps are
        compiled one by one, and where an epoch is one compiled call cuts it into pieces.
      on_part: is called with the steps of an epoch that are done and the state, there and before a stop.
      stopping: whether to stop; asked after each step, or where an epoch is one compiled call after that.

    Raises:
      Diverged: when a loss or gradient was not finite; it carries the last good state.
      KeyboardInterrupt: when it was asked to stop, all that was done having been handed out.
    """
    history = []
    for epoch in range(first_epoch, num_epochs):
        start = time.perf_counter() - (part.seconds if part else 0.0)

        def keep(state: TrainState, metrics: StepMetrics, start: float = start) -> None:
            on_part(EpochPart(metrics, time.perf_counter() - start), state)

        state, metrics = _run_epoch(state, runner, epoch, part, checkpoint_every, keep, stopping)
        try:
            result = evaluate_params(state.params, state.batch_stats)
        except KeyboardInterrupt:
            keep(state, metrics)
            raise
        if not np.isfinite(result.loss):  # as of statistics that grew out of bounds: no state to save or continue from
            raise Diverged(state, epoch + 1, runner.steps_per_epoch, "the loss after the epoch")
        count = metrics.num.sum()
        row = EpochRow(
            epoch=epoch + 1,
            train_loss=float(metrics.loss_sum.sum(dtype=np.float64) / count),
            train_accuracy=float(metrics.correct.sum() / count),
            val_loss=result.loss,
            val_accuracy=result.accuracy,
            seconds=time.perf_counter() - start,
        )
        history.append(row)
        on_epoch(row, state)
        part = None
        if stopping():
            raise KeyboardInterrupt
    return state, history


def _run_epoch(
    state: TrainState,
    runner: Runner,
    epoch: int,
    part: EpochPart | None,
    checkpoint_every: int | None,
    keep: Callable[[TrainState, StepMetrics], None],
    stopping: Callable[[], bool],
) -> tuple[TrainState, StepMetrics]:
    """The steps of an epoch that are left, and the metrics of all of them."""
    so_far = [part.metrics] if part else []
    done, total = sum(len(metrics.num) for metrics in so_far), runner.steps_per_epoch
    every = checkpoint_every or total
    while done < total:
        steps = range(done, min(total, (done // every + 1) * every))
        state, metrics = runner(state, epoch, steps, stopping=stopping)
        if not metrics.finite.all():
            step = done + int(np.argmin(metrics.finite))
            raise Diverged(state, epoch + 1, step + 1, runner.fault(state, epoch, step))
        so_far.append(metrics)
        done += len(metrics.num)
        stop = stopping()
        if stop or done < total:
            keep(state, _joined(so_far))
        if stop:
            raise KeyboardInterrupt
    return state, _joined(so_far)


def _joined(parts: list[StepMetrics]) -> StepMetrics:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
