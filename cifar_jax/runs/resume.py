"""Resuming a run: what a checkpoint stores of a state, and the progress that a run directory holds."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cifar_jax.config import TrainConfig
from cifar_jax.config.groups import RUN_ONLY
from cifar_jax.errors import UserError
from cifar_jax.files import without_nan
from cifar_jax.pretrained import UNTRAINED
from cifar_jax.runs.checkpoint import Position, list_checkpoints, load_checkpoint, newest_whole
from cifar_jax.runs.layout import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    SUMMARY,
    check_run_dir,
    default_run_dir,
    is_run,
    read_json,
    recorded,
)
from cifar_jax.runtime.reporter import EpochRow
from cifar_jax.train.loop import EpochPart
from cifar_jax.train.step import StepMetrics, TrainState

logger = logging.getLogger(__name__)

# Arguments of `train` that are recorded by name beside the digests of images and weights, and what they are otherwise.
PARTS, OWN = ("loss_fn", "head", "tx", "augment"), "that of the options"

# Of the sums that an epoch which is not done keeps, an entry a step.
METRICS_DTYPES = {"loss_sum": np.float32, "correct": np.int32, "num": np.int32, "finite": np.bool_}


class RateChange(NamedTuple):
    """The learning rate from a step on, both counted from one."""

    from_epoch: int
    from_step: int
    learning_rate: float


class Progress(NamedTuple):
    """Progress of a resumable run.

    Attributes:
      position: of the checkpoint to resume from.
      rows: metrics of the completed epochs.
      part: the completed steps of the next epoch.
      inputs: digests of images and weights by name.
      rates: learning rates until then, more than one where a diverged run was resumed with a lower one.
    """

    position: Position = Position(0)
    rows: tuple[EpochRow, ...] = ()
    part: EpochPart | None = None
    inputs: dict[str, str] | None = None
    rates: tuple[RateChange, ...] = ()

    def with_rate(self, learning_rate: float) -> "Progress":
        """The same with the rate that training continues with."""
        if self.rates and self.rates[-1].learning_rate == learning_rate:
            return self
        change = RateChange(self.position.epoch + 1, self.position.step + 1, learning_rate)
        return self._replace(rates=(*self.rates, change))

    def to_json(self) -> dict[str, Any]:
        """As JSON values, from which `from_json` restores the same bits."""
        part = self.part and {
            "seconds": self.part.seconds,
            "metrics": {name: np.asarray(v).tolist() for name, v in self.part.metrics._asdict().items()},
        }
        rows = [row._asdict() for row in self.rows]
        rates = [rate._asdict() for rate in self.rates]
        return {"position": list(self.position), "rows": rows, "part": part, "inputs": self.inputs, "rates": rates}

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
        return Progress(Position(*value["position"]), rows, part, value["inputs"], rates)


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
      UserError: if there is none, or it is corrupt.
    """
    tree = load_checkpoint(directory, jax.eval_shape(lambda: checkpoint_tree(like)), at)
    return jax.tree.map(
        lambda old, leaf: jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(old)) if _is_key(old) else leaf,
        like,
        TrainState(**tree),
    )


def differing(out: Path, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Options in which the run in a directory differs from `config`: its values, and those of `config`.

    Raises:
      UserError: if its config.json cannot be read.
    """
    theirs, ours = recorded(TrainConfig.from_json(read_json(out / CONFIG))), recorded(config)
    # Places are not content: digests tell whether the images are the same.
    may_differ = set(RUN_ONLY)
    # A schedule goes over all epochs; without one, more of them only go on.
    if config.optim.schedule == "constant":
        may_differ |= {"epochs"}
    # A checkpoint holds the digest of the weights, which may have moved. Untrained ones are nowhere.
    if list_checkpoints(out / CHECKPOINTS) and not {theirs["weights"], ours["weights"]} & set(UNTRAINED):
        may_differ |= {"weights"}
    if status(out) == "diverged" and ours["learning_rate"] < theirs["learning_rate"]:
        may_differ |= {"learning_rate"}
    return {name: (theirs[name], ours[name]) for name in ours if name not in may_differ and ours[name] != theirs[name]}


def find_run(config: TrainConfig, own_tx: bool = False) -> dict[str, Any]:
    """The run's directory, its progress (None for a new run) and whether it is finished, as JSON values.

    Args:
      config: of the run.
      own_tx: whether the optimiser is another one than the options describe.

    Raises:
      UserError: if it can be neither started nor resumed.
    """
    out = Path(config.run.out) if config.run.out else default_run_dir(config)
    progress = find_progress(out, config, own_tx) if config.run.resume else None
    finished = is_finished(out, config, progress)
    if not finished:
        check_run_dir(out, config, resumes=progress is not None)
    return {"out": str(out), "progress": progress and progress.to_json(), "finished": finished}


def check_again(out: Path, config: TrainConfig, progress: dict[str, Any] | None, own_tx: bool = False) -> None:
    """Checks the directory once more, now that no other process writes it: one may have while this one loaded.

    Takes what `find_run` took and the progress that it found.

    Raises:
      UserError: if the directory is not what it was when `find_run` looked.
    """
    check_run_dir(out, config, resumes=progress is not None)
    if progress is None:
        return
    now = find_progress(out, config, own_tx, logging.DEBUG)
    if now is None or now.to_json() != progress:
        raise UserError(f"Another process continued the run in {out} meanwhile. Run the command again.")


def is_unfinished(config: TrainConfig) -> bool:
    """Whether the directory of a configuration holds this same run, unfinished, so that it can be resumed."""
    out = Path(config.run.out or "")
    try:
        return bool(
            config.run.out
            and is_run(out)
            and not differing(out, config)
            and status(out) not in ("complete", "diverged")
        )
    except (UserError, OSError):
        return False


def find_progress(out: Path, config: TrainConfig, own_tx: bool = False, level: int = logging.INFO) -> Progress | None:
    """Progress of the run in a directory; None if there is no run.

    Args:
      out: the run directory.
      config: of the run.
      own_tx: whether the optimiser is another one than the options describe: then no option tells whether the run
        would diverge again.
      level: at which corrupt checkpoints and files are logged.

    Raises:
      UserError: if `config` does not describe the run in `out`, the run would diverge again, or its checkpoints are
        corrupt.
    """
    if not (out.is_dir() and is_run(out)):
        return None
    if not own_tx and status(out) == "diverged" and config.optim.learning_rate >= (tried := _last_rate(out)):
        raise UserError(
            f"The run in {out} diverged and would diverge again. Resume it with a --learning-rate below {tried:g}, or "
            "start again with --overwrite."
        )
    if others := differing(out, config):
        about = ", ".join(
            f"--{name.replace('_', '-')} ({theirs} there, {ours} here)" for name, (theirs, ours) in others.items()
        )
        raise UserError(f"Cannot resume the run in {out}: it differs in {about}. Give its options, or another --out.")

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


def _last_rate(out: Path) -> float:
    """The learning rate that a run diverged with."""
    try:
        return float(read_json(out / SUMMARY)["learning_rates"][-1]["learning_rate"])
    except (UserError, KeyError, IndexError, TypeError, ValueError):
        return float(read_json(out / CONFIG)["learning_rate"])


def require_same_inputs(out: Path, progress: Progress, inputs: dict[str, str]) -> None:
    """Checks that a run resumes with the images and weights that it began with, wherever they are now.

    Raises:
      UserError: naming those that differ.
    """
    theirs = progress.inputs or inputs
    others = [name for name in inputs | theirs if inputs.get(name) != theirs.get(name)]
    if parts := [name for name in others if name in PARTS]:
        changes = (f"its {part} was {theirs.get(part, OWN)}, now it is {inputs.get(part, OWN)}" for part in parts)
        raise UserError(
            f"Cannot resume the run in {out}: {'; '.join(changes)}. Pass to `train` what the run began with, or choose "
            "another --out."
        )
    if others:
        raise UserError(
            f"Cannot resume the run in {out}: its {' and '.join(others)} have changed. Restore them, or choose "
            "another --out."
        )


def is_finished(out: Path, config: TrainConfig, progress: Progress | None) -> bool:
    """Whether nothing is left to do."""
    return progress is not None and progress.position >= (config.optim.epochs, 0) and status(out) == "complete"


def status(out: Path) -> str | None:
    """The status in a run's summary.json: `complete`, `interrupted`, `diverged` or `failed`; None without a summary."""
    try:
        return read_json(out / SUMMARY).get("status")
    except UserError:
        return None


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
