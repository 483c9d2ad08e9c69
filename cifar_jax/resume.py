"""Going on with a run that was stopped: what a checkpoint holds of a state, and how far a run directory has come."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from cifar_jax.checkpoint import list_checkpoints, load_checkpoint
from cifar_jax.config import TrainConfig
from cifar_jax.errors import UserError
from cifar_jax.fit import EpochRow
from cifar_jax.run_dir import CHECKPOINTS, CONFIG, CONTENTS, METRICS, SUMMARY, is_run, read_json
from cifar_jax.training import TrainState

# What may differ between a run and the command that goes on with it. Where the learning rate follows a schedule, the
# number of epochs may not.
MAY_DIFFER = {"out", "resume", "overwrite", "progress", "debug", "epochs", "cache_limit", "profile"}


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
    return parts | ({"training": _named(_progress(state))} if resumable else {})


def load_state(directory: Path, like: TrainState, epoch: int | None = None) -> TrainState:
    """The state of a checkpoint.

    Args:
      directory: of the run's checkpoints.
      like: a state of the same structure.
      epoch: that it was made after; the newest one if None.

    Raises:
      UserError: when there is none, or it is damaged, or of a run that diverged.
    """
    parts = load_checkpoint(directory, jax.eval_shape(lambda: checkpoint_parts(like)), epoch)
    names = list(_named(_progress(like)))
    leaves = [parts["training"][name] for name in names]
    progress = jax.tree.unflatten(jax.tree.structure(_progress(like)), leaves)
    params, batch_stats = parts["head"], like.batch_stats
    if "backbone" in parts:
        params = {"backbone": parts["backbone"]["params"], "head": params}
        batch_stats = parts["backbone"]["batch_stats"]
    return TrainState(params, batch_stats, **progress)


def _progress(state: TrainState) -> dict[str, PyTree]:
    return {"opt_state": state.opt_state, "step": state.step}


def _named(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def epochs_done(out: Path, config: TrainConfig) -> int | None:
    """How many epochs of a run are done and can be gone on from; None where there is no run.

    Raises:
      UserError: when the run in `out` is another one than `config` describes, diverged, or is damaged.
    """
    if not (out.is_dir() and is_run(out)):
        return None
    theirs, ours = TrainConfig.from_json(read_json(out / CONFIG)).to_json(), config.to_json()
    may_differ = MAY_DIFFER - ({"epochs"} if config.schedule != "constant" else set())
    if differing := [name for name in ours if name not in may_differ and ours[name] != theirs[name]]:
        about = ", ".join(f"--{name.replace('_', '-')} ({theirs[name]} there, {ours[name]} here)" for name in differing)
        raise UserError(
            f"The run in {out} cannot be resumed, as it differs in {about}; give its options or another --out."
        )
    if (out / SUMMARY).exists() and read_json(out / SUMMARY).get("status") == "diverged":
        raise UserError(f"The run in {out} diverged and would again; change its options and --overwrite it.")
    checkpoints = list_checkpoints(out / CHECKPOINTS)
    return int(checkpoints[-1].name) if checkpoints else 0


def is_finished(out: Path, config: TrainConfig, done: int | None) -> bool:
    """Whether there is nothing left to do."""
    if not done or done < config.epochs or not (out / SUMMARY).exists():
        return False
    return read_json(out / SUMMARY).get("status") == "complete"


def read_rows(out: Path, done: int) -> list[EpochRow]:
    """The figures of the epochs that are done; later ones, whose checkpoint never came to be, are left out.

    Raises:
      UserError: when metrics.jsonl is missing or damaged.
    """
    try:
        lines = (out / METRICS).read_text(encoding="utf-8").splitlines()[:done]
        rows = [EpochRow(**json.loads(line)) for line in lines]
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{out / METRICS} cannot be read ({error}); start the run again with --overwrite.") from error
    if [row.epoch for row in rows] != list(range(1, done + 1)):
        raise UserError(f"{out / METRICS} does not hold {done} epochs; start the run again with --overwrite.")
    return rows


def clear_leftovers(out: Path) -> None:
    """Removes what a killed run leaves: files that were being written, and the summary that no longer holds."""
    (out / SUMMARY).unlink(missing_ok=True)
    for name in CONTENTS:
        for path in out.glob(f".{name}.*"):
            path.unlink()
    for path in (out / CHECKPOINTS).glob(".*"):
        shutil.rmtree(path)
