"""Checks that a resumed run has the same options, replaced components, images and weights as before."""

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar_jax.config import TrainConfig
from cifar_jax.config.option_groups import RUN_ONLY
from cifar_jax.errors import UserError
from cifar_jax.pretrained import UNTRAINED
from cifar_jax.runs.directory import CONFIG, INPUTS, SUMMARY, RunInputs, read_json, recorded

logger = logging.getLogger(__name__)

OWN = "that of the options"  # description of a component that was not passed to `train`

# Options of the optimiser, which have no effect if another optimiser was passed to `train`.
OPTIMIZER = (
    *("learning_rate", "backbone_learning_rate", "momentum", "nesterov", "weight_decay", "clip_norm"),
    *("schedule", "warmup_epochs"),
)


def status(out: Path) -> str | None:
    """The status in a run's summary.json: `complete`, `interrupted`, `diverged` or `failed`; None without a summary."""
    try:
        return read_json(out / SUMMARY).get("status")
    except UserError:
        return None


def differing(out: Path, config: TrainConfig, own_tx: bool = False) -> dict[str, tuple[Any, Any]]:
    """Options that differ between the run in a directory and `config`, as pairs of the run's and `config`'s value.

    `own_tx`: whether an optimiser was passed to `train` instead of the one that the options describe.
    """
    theirs, ours = recorded(TrainConfig.from_json(read_json(out / CONFIG))), recorded(config)
    # Paths may differ: digests decide whether the images are the same.
    may_differ = {*RUN_ONLY, *(OPTIMIZER if own_tx else ())}
    # A schedule depends on the number of epochs; with a constant rate, more epochs only continue the run.
    if own_tx or config.optim.schedule == "constant":
        may_differ |= {"epochs"}
    # Weights files may have moved, so their digests are compared instead. Untrained weights have no file.
    if (out / INPUTS).exists() and not {theirs["weights"], ours["weights"]} & set(UNTRAINED):
        may_differ |= {"weights"}
    # A folder of pictures may have moved too.
    if (out / INPUTS).exists() and os.path.isabs(theirs["dataset"]) and os.path.isabs(ours["dataset"]):
        may_differ |= {"dataset"}
    if status(out) == "diverged":  # checked by `require_lower_rate`
        may_differ |= {"learning_rate", "backbone_learning_rate"}
    return {name: (theirs[name], ours[name]) for name in ours if name not in may_differ and ours[name] != theirs[name]}


def require_same_options(out: Path, config: TrainConfig, own_tx: bool) -> None:
    """Checks that a configuration agrees with that of the run in a directory; see `differing`.

    Raises:
      UserError: if it does not, naming the options that differ.
    """
    if others := differing(out, config, own_tx):
        about = ", ".join(
            f"--{name.replace('_', '-')} ({theirs} there, {ours} here)" for name, (theirs, ours) in others.items()
        )
        raise UserError(f"Cannot resume the run in {out}: it differs in {about}. Give its options, or another --out.")


def rates_of(config: TrainConfig) -> tuple[float, float | None]:
    """The learning rates of the head and, in `finetune` mode, of the backbone (otherwise None)."""
    rate = config.optim.learning_rate
    return rate, (config.finetune.backbone_learning_rate or rate) if config.optim.mode == "finetune" else None


def require_lower_rate(out: Path, config: TrainConfig) -> None:
    """Checks that a run that diverged is resumed with at least one lower and no higher learning rate.

    Raises:
      UserError: if it is not, as the run would diverge again.
    """
    if status(out) != "diverged":
        return
    # config.json may already hold the lower rate of a resumption that was killed.
    last = read_json(out / SUMMARY)["learning_rates"][-1]
    tried, backbone_tried = last["learning_rate"], last.get("backbone_learning_rate")
    rate, backbone_rate = rates_of(config)
    pairs = [(rate, tried), (backbone_rate or math.nan, backbone_tried or math.nan)]
    if any(ours < theirs for ours, theirs in pairs) and not any(ours > theirs for ours, theirs in pairs):
        return
    lower = f"a --learning-rate below {tried:g}"
    if backbone_tried:
        lower += f" or a --backbone-learning-rate below {backbone_tried:g}, and neither above it"
    raise UserError(
        f"The run in {out} diverged and would diverge again. Resume it with {lower}, or start again with --overwrite."
    )


def require_same_parts(out: Path, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Checks that `train` received the same components as when the run began; a backbone is compared later, by digest.

    Raises:
      UserError: if it did not, naming the components that differ.
    """
    others = [name for name in {**ours, **theirs} if name != "backbone" and ours.get(name) != theirs.get(name)]
    if others:
        raise _of_parts(out, others, theirs, ours)


def require_same_inputs(out: Path, began: RunInputs, inputs: RunInputs) -> None:
    """Checks that a run is resumed with the same images and weights, wherever their files are now.

    Raises:
      UserError: if it is not, naming the inputs that differ.
    """
    theirs, ours = began.digests, inputs.digests
    others = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if "weights" in others and began.parts.get("backbone") != inputs.parts.get("backbone"):
        raise _of_parts(out, ["backbone"], began.parts, inputs.parts)
    if others == ["program"]:
        logger.warning(
            f"The backbone function of the run in {out} compiles to a different program than when the run began: its "
            "code or the version of JAX has changed."
        )
    elif others:
        raise UserError(
            f"Cannot resume the run in {out}: its {' and '.join(others)} have changed. Restore them, or choose "
            "another --out."
        )


def _of_parts(out: Path, names: list[str], theirs: Mapping[str, str], ours: Mapping[str, str]) -> UserError:
    changes = (f"its {name} was {theirs.get(name, OWN)}, now it is {ours.get(name, OWN)}" for name in names)
    return UserError(
        f"Cannot resume the run in {out}: {'; '.join(changes)}. Pass to `train` what the run began with, or choose "
        "another --out."
    )
