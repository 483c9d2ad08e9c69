"""Resuming a run: the part of the state that checkpoints store, and the progress recorded in a run directory."""

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
from cifar_jax.runs.checkpoint import Position, find_checkpoint, list_checkpoints, load_checkpoint, newest_whole
from cifar_jax.runs.directory import CHECKPOINTS, INPUTS, METRICS, RunInputs, check_contents, is_run, read_inputs
from cifar_jax.runs.match import differing, require_lower_rate, require_same_options, require_same_parts, status
from cifar_jax.runtime.progress import EpochRow
from cifar_jax.train.loop import EpochPart
from cifar_jax.train.step import StepMetrics, TrainState

logger = logging.getLogger(__name__)

# Dtypes of the per-step metrics stored for an unfinished epoch.
METRICS_DTYPES = {"loss_sum": np.float32, "correct": np.int32, "num": np.int32, "finite": np.bool_}


class RateChange(NamedTuple):
    """The learning rates from a step on; epoch and step count from one. A frozen backbone's rate is None."""

    from_epoch: int
    from_step: int
    learning_rate: float
    backbone_learning_rate: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Converts to JSON values, omitting a rate that is None."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Progress(NamedTuple):
    """Progress of a resumable run.

    Attributes:
      position: position of the checkpoint to resume from.
      rows: metrics of the completed epochs.
      part: the completed steps of the next epoch.
      rates: learning rates up to that position; more than one if a diverged run was resumed with a lower rate.
    """

    position: Position = Position(0)
    rows: tuple[EpochRow, ...] = ()
    part: EpochPart | None = None
    rates: tuple[RateChange, ...] = ()

    def with_rates(self, learning_rate: float, backbone_learning_rate: float | None = None) -> "Progress":
        """Returns a copy with the learning rates that training continues with appended, if they changed."""
        change = RateChange(self.position.epoch + 1, self.position.step + 1, learning_rate, backbone_learning_rate)
        if self.rates and self.rates[-1][2:] == change[2:]:
            return self
        return self._replace(rates=(*self.rates, change))

    def to_json(self) -> dict[str, Any]:
        """Converts to JSON values, from which `from_json` restores bit-identical progress."""
        part = self.part and {
            "seconds": self.part.seconds,
            "metrics": {name: np.asarray(v).tolist() for name, v in self.part.metrics._asdict().items()},
        }
        rows = [row._asdict() for row in self.rows]
        rates = [rate.to_json() for rate in self.rates]
        return {"position": list(self.position), "rows": rows, "part": part, "rates": rates}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Progress":
        """Restores progress from the result of `to_json`."""
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
    """The last epoch, or the best one if images were held out; 0 before the first epoch."""
    if not held_out:
        return len(rows)
    best = max(rows, key=lambda row: (row.val_accuracy, -row.val_loss), default=None)
    return best.epoch if best else 0


def checkpoint_tree(state: TrainState) -> dict[str, PyTree]:
    """The tree that a checkpoint stores of a finite state, with typed keys converted to their key data.

    Order, augmentation and steps derive their keys from the seed by epoch and step, so none of those are stored.
    """
    tree = {name: leaf for name, leaf in state._asdict().items() if name != "halted"}
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _is_key(leaf: Any) -> bool:
    """Returns whether a leaf is a typed key, such as the state of an optimiser that adds noise has."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def load_state(directory: Path, like: TrainState, at: Position) -> TrainState:
    """Reads the state stored in a checkpoint; `like` is a state of the same structure.

    Raises:
      UserError: if there is no such checkpoint, its structure differs, or it is corrupt.
    """
    tree = load_checkpoint(directory, jax.eval_shape(lambda: checkpoint_tree(like)), at, whole=True)
    return jax.tree.map(
        lambda old, leaf: jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(old)) if _is_key(old) else leaf,
        like,
        TrainState(**tree),
    )


def check_state(directory: Path, like: TrainState, at: Position) -> None:
    """Raises UserError if there is no checkpoint that `load_state` could read; the leaves of `like` may be shapes."""
    find_checkpoint(directory, jax.eval_shape(checkpoint_tree, like), at, whole=True)


def find_run(out: Path, config: TrainConfig, parts: Mapping[str, str]) -> dict[str, Any]:
    """Progress and inputs of the run in a locked directory, and whether it is finished, as JSON values.

    Progress and inputs are None for a new run. `parts` names the components passed to `train` to replace those that the
    options describe.

    Raises:
      UserError: if the directory holds other files or a run that may not be replaced, if `config` and `parts` do not
        describe the run in it, or if that would diverge again or has no checkpoint that is not corrupt.
    """
    resumes = config.run.resume and is_run(out)
    inputs = read_inputs(out) if resumes else None
    progress = _find_progress(out, config, inputs, parts) if resumes else None
    finished = progress is not None and progress.position >= (config.optim.epochs, 0) and status(out) == "complete"
    if not finished:
        check_contents(out, config, resumes)
    return {"progress": progress and progress.to_json(), "inputs": inputs, "finished": finished}


def is_unfinished(config: TrainConfig) -> bool:
    """Returns whether a configuration's directory holds the same run, unfinished, so that options suffice to resume."""
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


def _find_progress(out: Path, config: TrainConfig, inputs: RunInputs | None, parts: Mapping[str, str]) -> Progress:
    """Progress of a run that is resumed; raises UserError as `find_run`."""
    if inputs:
        require_same_parts(out, inputs.parts, parts)
    elif list_checkpoints(out / CHECKPOINTS):
        raise UserError(
            f"The run in {out} cannot be resumed: it has no {INPUTS}, which says what it began with. Start again with "
            "--overwrite, or choose another --out."
        )
    if "tx" not in parts:  # the rates of a user-supplied optimiser are not known
        require_lower_rate(out, config)
    require_same_options(out, config, own_tx="tx" in parts)

    def needed(progress: dict[str, Any]) -> list[Position]:
        selected = selected_epoch(Progress.from_json(progress).rows, config.data.val_fraction > 0)
        return [Position(selected)] if config.data.val_fraction and selected else []

    newest = newest_whole(out / CHECKPOINTS, needed)
    if newest is None:
        return NO_PROGRESS
    progress = Progress.from_json(newest[1])
    if progress.position > (config.optim.epochs, 0):
        raise UserError(
            f"The run in {out} has {progress.position.words} done, more than --epochs {config.optim.epochs}. Give a "
            "larger --epochs, or another --out."
        )
    if not _are_in(out / METRICS, progress.rows):
        logger.info(f"{out / METRICS} is missing or corrupt; writing it again from the checkpoint.")
    return progress


def _are_in(path: Path, rows: tuple[EpochRow, ...]) -> bool:
    """Returns whether metrics.jsonl begins with these rows; later rows have no checkpoint and are ignored."""
    if not rows:
        return True  # before the first completed epoch the file may not exist
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[: len(rows)]
        found = [{name: json.loads(line)[name] for name in EpochRow._fields} for line in lines]
        return found == [without_nan(row._asdict()) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return False
