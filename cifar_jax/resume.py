"""Going on with a run that was stopped: what a checkpoint holds of a state, and how far a run directory has come."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from cifar_jax.checkpoint import Position, load_checkpoint, newest_whole
from cifar_jax.config import TrainConfig
from cifar_jax.errors import UserError
from cifar_jax.files import without_nan
from cifar_jax.fit import EpochPart, EpochRow
from cifar_jax.run_dir import CHECKPOINTS, CONFIG, METRICS, SUMMARY, is_run, read_json
from cifar_jax.training import StepMetrics, TrainState

# What may differ between a run and the command that goes on with it. Where the learning rate follows a schedule, the
# number of epochs may not; where an epoch is one compiled call, neither may the pieces that checkpoints cut it into.
MAY_DIFFER = {
    *("out", "resume", "overwrite", "progress", "debug", "epochs", "cache_limit", "profile", "keep_checkpoints"),
    *("checkpoint_every", "cache_dir"),
}

# Of the sums that an epoch which is not done keeps, an entry a step.
METRICS_DTYPES = {"loss_sum": np.float32, "correct": np.int32, "num": np.int32, "finite": np.bool_}


class Progress(NamedTuple):
    """How far a run has come.

    Attributes:
      position: of the checkpoint to go on from.
      rows: figures of the epochs that are done.
      part: of an epoch that is not.
      inputs: digests of what was trained on, by name.
    """

    position: Position = Position(0)
    rows: tuple[EpochRow, ...] = ()
    part: EpochPart | None = None
    inputs: dict[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values, from which `from_json` makes the same bits."""
        part = self.part and {
            "seconds": self.part.seconds,
            "metrics": {name: np.asarray(v).tolist() for name, v in self.part.metrics._asdict().items()},
        }
        rows = [row._asdict() for row in self.rows]
        return {"position": list(self.position), "rows": rows, "part": part, "inputs": self.inputs}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Progress":
        """Reads what `to_json` gave."""
        part = value["part"]
        if part:
            sums: dict[str, Any] = {
                name: np.array(part["metrics"][name], dtype) for name, dtype in METRICS_DTYPES.items()
            }
            part = EpochPart(StepMetrics(**sums), part["seconds"])
        rows = tuple(EpochRow(**row) for row in value["rows"])
        return Progress(Position(*value["position"]), rows, part, value["inputs"])


NO_PROGRESS = Progress()


def checkpoint_parts(state: TrainState, resumable: bool = True) -> dict[str, PyTree]:
    """A state as a checkpoint keeps it: `head`, `backbone` where it trains, and `training`, needed only to go on.

    `training` holds the optimiser's state and the step by name, as Optax's tuples have structures that are its own.
    Keys are no part: order, augmentation and steps draw from the seed by epoch and step.
    """
    if isinstance(state.params, dict):
        variables = {"params": state.params["backbone"], "batch_stats": state.batch_stats}
        parts: dict[str, PyTree] = {"head": state.params["head"], "backbone": variables}
    else:
        parts = {"head": state.params}
    return parts | ({"training": _named(_changing(state))} if resumable else {})


def load_state(directory: Path, like: TrainState, at: Position | None = None) -> TrainState:
    """The state of a checkpoint.

    Args:
      directory: of the run's checkpoints.
      like: a state of the same structure.
      at: the position that it was made at; the newest one if None.

    Raises:
      UserError: when there is none, or it is damaged, or of a run that diverged.
    """
    parts = load_checkpoint(directory, jax.eval_shape(lambda: checkpoint_parts(like)), at)
    names = list(_named(_changing(like)))
    leaves = [parts["training"][name] for name in names]
    changing = jax.tree.unflatten(jax.tree.structure(_changing(like)), leaves)
    params, batch_stats = parts["head"], like.batch_stats
    if "backbone" in parts:
        params = {"backbone": parts["backbone"]["params"], "head": params}
        batch_stats = parts["backbone"]["batch_stats"]
    return TrainState(params, batch_stats, **changing)


def _changing(state: TrainState) -> dict[str, PyTree]:
    return {"opt_state": state.opt_state, "step": state.step}


def _named(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def differing(out: Path, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The options in which the run in a directory is not the one that `config` describes: what it has, and `config`.

    Raises:
      UserError: when its config.json cannot be read.
    """
    theirs, ours = TrainConfig.from_json(read_json(out / CONFIG)).to_json(), config.to_json()
    must_agree = set() if config.schedule == "constant" else {"epochs"}
    must_agree |= {"checkpoint_every"} if config.mode == "cached" else set()
    may_differ = MAY_DIFFER - must_agree
    return {name: (theirs[name], ours[name]) for name in ours if name not in may_differ and ours[name] != theirs[name]}


def find_progress(out: Path, config: TrainConfig, say: Callable[[str], None]) -> Progress | None:
    """How far a run has come that can be gone on with; None where there is no run.

    Args:
      out: the run directory.
      config: of the run.
      say: is told of checkpoints and files that are damaged.

    Raises:
      UserError: when the run in `out` is another one than `config` describes, diverged, or is damaged.
    """
    if not (out.is_dir() and is_run(out)):
        return None
    if others := differing(out, config):
        about = ", ".join(
            f"--{name.replace('_', '-')} ({theirs} there, {ours} here)" for name, (theirs, ours) in others.items()
        )
        raise UserError(
            f"The run in {out} cannot be resumed, as it differs in {about}; give its options or another --out."
        )
    if status(out) == "diverged":
        raise UserError(f"The run in {out} diverged and would again; change its options and --overwrite it.")
    newest = newest_whole(out / CHECKPOINTS, say)
    if newest is None:
        return NO_PROGRESS
    progress = Progress.from_json(newest[1])
    if not _are_in(out / METRICS, progress.rows):
        say(f"{out / METRICS} is missing or damaged: it is written again from the checkpoint.")
    return progress


def require_same_inputs(out: Path, progress: Progress, inputs: dict[str, str]) -> None:
    """Sees to it that a run goes on with what it began with, whatever has become of the files of the same names.

    Raises:
      UserError: naming what is another.
    """
    theirs = progress.inputs or inputs
    if others := [name for name in inputs if inputs[name] != theirs.get(name)]:
        raise UserError(
            f"The run in {out} cannot be resumed, as its {' and '.join(others)} have changed since; put them back, or "
            "choose another --out."
        )


def is_finished(out: Path, config: TrainConfig, progress: Progress | None) -> bool:
    """Whether there is nothing left to do."""
    return progress is not None and progress.position >= (config.epochs, 0) and status(out) == "complete"


def status(out: Path) -> str | None:
    """What summary.json says became of a run; None where it says nothing."""
    try:
        return read_json(out / SUMMARY).get("status")
    except UserError:
        return None  # it is written last, and again


def _are_in(path: Path, rows: tuple[EpochRow, ...]) -> bool:
    """Whether metrics.jsonl begins with these rows; later ones, whose checkpoint never came to be, are left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[: len(rows)]
        return [json.loads(line) for line in lines] == [without_nan(row._asdict()) for row in rows]
    except (OSError, ValueError):
        return False
