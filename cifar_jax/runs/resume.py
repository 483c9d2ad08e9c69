"""Resuming a run: what a checkpoint stores of a state, and the progress that a run directory holds."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cifar_jax.config import TrainConfig
from cifar_jax.errors import UserError
from cifar_jax.files import without_nan
from cifar_jax.runs.checkpoint import Position, check_checkpoint, list_checkpoints, load_checkpoint, newest_whole
from cifar_jax.runs.directory import CHECKPOINTS, INPUTS, METRICS, check_run_dir, default_run_dir, is_run, read_inputs
from cifar_jax.runs.match import differing, require_lower_rate, require_same_options, require_same_parts, status
from cifar_jax.runtime.progress import EpochRow
from cifar_jax.train.loop import EpochPart
from cifar_jax.train.step import StepMetrics, TrainState

logger = logging.getLogger(__name__)

# Of the sums that an epoch which is not done keeps, an entry a step.
METRICS_DTYPES = {"loss_sum": np.float32, "correct": np.int32, "num": np.int32, "finite": np.bool_}


class RateChange(NamedTuple):
    """The learning rates from a step on, counted from one like its epoch; the backbone's is None where it is frozen."""

    from_epoch: int
    from_step: int
    learning_rate: float
    backbone_learning_rate: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values, without a rate that there is not."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Progress(NamedTuple):
    """Progress of a resumable run.

    Attributes:
      position: of the checkpoint to resume from.
      rows: metrics of the completed epochs.
      part: the completed steps of the next epoch.
      rates: learning rates until then, more than one where a diverged run was resumed with a lower one.
    """

    position: Position = Position(0)
    rows: tuple[EpochRow, ...] = ()
    part: EpochPart | None = None
    rates: tuple[RateChange, ...] = ()

    def with_rates(self, learning_rate: float, backbone_learning_rate: float | None = None) -> "Progress":
        """The same with the rates that training continues with."""
        change = RateChange(self.position.epoch + 1, self.position.step + 1, learning_rate, backbone_learning_rate)
        if self.rates and self.rates[-1][2:] == change[2:]:
            return self
        return self._replace(rates=(*self.rates, change))

    def to_json(self) -> dict[str, Any]:
        """As JSON values, from which `from_json` restores the same bits."""
        part = self.part and {
            "seconds": self.part.seconds,
            "metrics": {name: np.asarray(v).tolist() for name, v in self.part.metrics._asdict().items()},
        }
        rows = [row._asdict() for row in self.rows]
        rates = [rate.to_json() for rate in self.rates]
        return {"position": list(self.position), "rows": rows, "part": part, "rates": rates}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Progress":
        """Reads the result of `to_json`."""
        part = value["part"]
        if part:
            sums: dict[str, Any] = {
                name: np.array(part["metrics"][name], dtype) for name, dtype in METRICS_DTYPES.items()
            }
            part = EpochPart(StepMetrics(**sums), part["seconds"])
        rows = tuple(EpochRow(**row) for row in value["rows"])
        rates = tuple(RateChange(**rate) for rate in value["rates"])
        return Progress(Position(*value["position"]), rows, part, rates)


NO_PROGRESS = Progress()


def selected_epoch(rows: Sequence[EpochRow], held_out: bool) -> int:
    """The last epoch, or if images were held out for it the best one; 0 before the first."""
    if not held_out:
        return len(rows)
    best = max(rows, key=lambda row: (row.val_accuracy, -row.val_loss), default=None)
    return best.epoch if best else 0


def checkpoint_tree(state: TrainState) -> dict[str, PyTree]:
    """The tree that a checkpoint stores of a state that is good; of a key in it the numbers.

    Order, augmentation and steps draw from the seed by epoch and step, and have no keys there.
    """
    tree = {name: leaf for name, leaf in state._asdict().items() if name != "halted"}
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed key, as an optimiser that draws noise keeps one."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def load_state(directory: Path, like: TrainState, at: Position | None = None) -> TrainState:
    """Reads the state of a checkpoint.

    Args:
      directory: the run's checkpoints.
      like: a state of the same structure.
      at: position of the checkpoint; the newest one if None.

    Raises:
      UserError: if there is none, it is that of another state, or it is corrupt.
    """
    tree = load_checkpoint(directory, jax.eval_shape(lambda: checkpoint_tree(like)), at, whole=True)
    return jax.tree.map(
        lambda old, leaf: jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(old)) if _is_key(old) else leaf,
        like,
        TrainState(**tree),
    )


def check_state(directory: Path, like: TrainState, at: Position) -> None:
    """Checks that `load_state` will find a checkpoint of the same structure; `like` may have shapes as leaves.

    Raises:
      UserError: if it will not.
    """
    check_checkpoint(directory, jax.eval_shape(checkpoint_tree, like), at)


def find_run(config: TrainConfig, parts: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The run's directory, its progress and inputs (None for a new run), and whether it is finished, as JSON values.

    Args:
      config: of the run.
      parts: names of what is passed to `train` in the place of what the options stand for.

    Raises:
      UserError: if it can be neither started nor resumed.
    """
    out = Path(config.run.out) if config.run.out else default_run_dir(config)
    progress = find_progress(out, config, parts) if config.run.resume else None
    finished = is_finished(out, config, progress)
    if not finished:
        check_run_dir(out, config, resumes=progress is not None)
    inputs = read_inputs(out) if progress else None
    return {"out": str(out), "progress": progress and progress.to_json(), "inputs": inputs, "finished": finished}


def check_again(
    out: Path, config: TrainConfig, progress: dict[str, Any] | None, parts: Mapping[str, str] | None = None
) -> None:
    """Checks the directory once more, now that no other process writes it: one may have while this one loaded.

    Takes what `find_run` took and the progress that it found.

    Raises:
      UserError: if the directory is not what it was when `find_run` looked.
    """
    check_run_dir(out, config, resumes=progress is not None)
    if progress is None:
        return
    now = find_progress(out, config, parts, logging.DEBUG)
    if now is None or now.to_json() != progress:
        raise UserError(f"Another process continued the run in {out} meanwhile. Run the command again.")


def is_unfinished(config: TrainConfig) -> bool:
    """Whether the directory of a configuration holds this same run, unfinished, so that options alone resume it."""
    out = Path(config.run.out or "")
    try:
        return bool(
            config.run.out
            and is_run(out)
            and not ((inputs := read_inputs(out)) and inputs.parts)
            and not differing(out, config)
            and status(out) not in ("complete", "diverged")
        )
    except (UserError, OSError):
        return False


def find_progress(
    out: Path, config: TrainConfig, parts: Mapping[str, str] | None = None, level: int = logging.INFO
) -> Progress | None:
    """Progress of the run in a directory; None if there is no run.

    Args:
      out: the run directory.
      config: of the run.
      parts: see `find_run`.
      level: at which corrupt checkpoints and files are logged.

    Raises:
      UserError: if `config` and `parts` do not describe the run in `out`, the run would diverge again, or its
        checkpoints are corrupt.
    """
    if not (out.is_dir() and is_run(out)):
        return None
    parts = parts or {}
    if inputs := read_inputs(out):
        require_same_parts(out, inputs.parts, parts)
    elif list_checkpoints(out / CHECKPOINTS):
        raise UserError(
            f"The run in {out} cannot be resumed: it has no {INPUTS}, which says what it began with. Start again with "
            "--overwrite, or choose another --out."
        )
    if "tx" not in parts:  # else no option tells whether the run would diverge again
        require_lower_rate(out, config)
    require_same_options(out, config, own_tx="tx" in parts)

    def needed(progress: dict[str, Any]) -> list[Position]:
        selected = selected_epoch(Progress.from_json(progress).rows, config.data.val_fraction > 0)
        return [Position(selected)] if config.data.val_fraction and selected else []

    newest = newest_whole(out / CHECKPOINTS, needed, level)
    if newest is None:
        return NO_PROGRESS
    progress = Progress.from_json(newest[1])
    if progress.position > (config.optim.epochs, 0):
        raise UserError(
            f"The run in {out} has {progress.position.words} done, more than --epochs {config.optim.epochs}. Give a "
            "larger --epochs, or another --out."
        )
    if not _are_in(out / METRICS, progress.rows):
        logger.log(level, f"{out / METRICS} is missing or corrupt; writing it again from the checkpoint.")
    return progress


def is_finished(out: Path, config: TrainConfig, progress: Progress | None) -> bool:
    """Whether nothing is left to do."""
    return progress is not None and progress.position >= (config.optim.epochs, 0) and status(out) == "complete"


def _are_in(path: Path, rows: tuple[EpochRow, ...]) -> bool:
    """Whether metrics.jsonl begins with these rows; later ones, which have no checkpoint, do not matter."""
    if not rows:
        return True  # no epoch is complete, so there need not be such a file
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[: len(rows)]
        found = [{name: json.loads(line)[name] for name in EpochRow._fields} for line in lines]
        return found == [without_nan(row._asdict()) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return False
