"""The run directory: what a run leaves behind, and what may be written there."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cifar_jax.config import TrainConfig
from cifar_jax.config.option_groups import PATHS
from cifar_jax.errors import UserError
from cifar_jax.files import (
    locked_directory,
    read_json_value,
    remove_leftovers,
    without_nan,
    write_json,
    write_text,
)
from cifar_jax.pretrained import UNTRAINED, registry

FORMAT_VERSION = 2
CONFIG, INPUTS, METRICS, SUMMARY, CHECKPOINTS, BACKBONE = (
    "config.json",
    "inputs.json",
    "metrics.jsonl",
    "summary.json",
    "checkpoints",
    "backbone.safetensors",
)
# All that a run writes. `--overwrite` removes these and nothing else.
CONTENTS = (
    CONFIG,
    INPUTS,
    METRICS,
    SUMMARY,
    CHECKPOINTS,
    BACKBONE,
    "samples.png",
    "curves.png",
    "predictions.png",
    "confusion.png",
    "test_predictions.png",
    "test_confusion.png",
)


class RunInputs(NamedTuple):
    """What a run began with, beside its options: the content of inputs.json.

    Attributes:
      digests: of images and weights, by name.
      parts: names of the arguments that were passed to `train` in the place of what the options stand for.
    """

    digests: dict[str, str]
    parts: dict[str, str]


def default_run_dir(config: TrainConfig) -> Path:
    """runs/TIME-PRESET below the current directory; a number is added where that is taken."""
    base = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.preset}"
    numbered = (base.with_name(f"{base.name}-{n}") for n in range(2, 1000))
    return base if not base.exists() else next(path for path in numbered if not path.exists())


def check_run_dir(path: Path, config: TrainConfig, resumes: bool = False) -> None:
    """Finds out, before any work is done, whether a run can be written to `path`.

    Args:
      path: of the run directory.
      config: of the run.
      resumes: whether the run in the directory is the one to go on with.

    Raises:
      UserError: when it is a file, cannot be written, or holds something already.
    """
    try:
        _check_run_dir(path, config, resumes)
    except OSError as error:
        raise UserError(f"--out {path} cannot be used ({error.strerror}); choose another directory.") from error


def _check_run_dir(path: Path, config: TrainConfig, resumes: bool) -> None:
    if path.is_symlink() and not path.exists():
        raise UserError(f"--out {path} is a link to nothing; choose another directory.")
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file; choose a directory.")
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"--out {path} cannot be made, as {existing} is a file; choose another directory.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {path} cannot be written, as {existing} is read-only; choose another directory.")
    if path.is_dir() and (entries := sorted(entry.name for entry in path.iterdir() if not _is_leftover(entry.name))):
        if (path / CONFIG).exists() and (path / CHECKPOINTS).is_dir():
            read_json(path / CONFIG)  # which says that it is damaged
        if not is_run(path):
            raise UserError(f"--out {path} holds other files ({entries[0]}, ...); choose an empty or a new directory.")
        if resumes:
            return
        if not config.run.overwrite:
            raise UserError(
                f"--out {path} already holds a run; choose another directory or --overwrite it, or "
                "--resume it where it is unfinished."
            )
        if Path(config.backbone.weights).resolve().is_relative_to(path.resolve()):
            raise UserError(
                f"--weights {config.backbone.weights} lies in the run that --overwrite removes; move it out first."
            )


def is_run(path: Path) -> bool:
    """Whether the directory's config.json is one of ours: other programs have files of that name too."""
    try:
        return {"preset", "dataset", "weights"} <= set(read_json(path / CONFIG))
    except UserError:
        return False


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Makes the directory if need be, and keeps other runs out of it until the block or the process ends.

    Where the directory was made and holds nothing, it goes again.

    Raises:
      UserError: when it cannot be made, or another process has it.
    """

    def refuse() -> None:
        raise BlockingIOError

    with contextlib.ExitStack() as stack:
        try:
            made = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_directory(path, refuse))
        except BlockingIOError:
            raise UserError(
                f"Another process is writing the run in {path}; wait for it, or choose another --out."
            ) from None
        except OSError as error:
            raise UserError(f"--out {path} cannot be written ({error.strerror}); choose another directory.") from error
        try:
            yield
        finally:
            if made:
                with contextlib.suppress(OSError):
                    path.rmdir()


def start_run_dir(path: Path, config: TrainConfig, inputs: RunInputs) -> None:
    """Empties the directory of the run that may have been in it, and writes config.json and inputs.json.

    Raises:
      UserError: when the directory cannot be written.
    """
    try:
        clear_leftovers(path)
        for name in CONTENTS:
            if (path / name).is_dir() and not (path / name).is_symlink():
                shutil.rmtree(path / name)
            else:
                (path / name).unlink(missing_ok=True)
        _write_about(path, config, inputs)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror}); choose another directory.") from error


def recorded(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON values with absolute paths, so that it means the same in every directory."""
    fields = config.to_json()
    for name in PATHS:
        if fields[name] is not None:
            fields[name] = os.path.abspath(os.path.expanduser(fields[name]))
    weights = os.path.expanduser(config.backbone.weights)
    is_name = config.backbone.weights in registry.entries() or config.backbone.weights in UNTRAINED
    if (os.path.isfile(weights) and config.backbone.weights not in UNTRAINED) or (
        os.path.isdir(weights) and not is_name
    ):
        fields["weights"] = os.path.abspath(weights)
    return fields


def _is_leftover(name: str) -> bool:
    """Whether only a run that was killed while it wrote leaves a file of that name."""
    return any(name.startswith(f".{content}.") for content in CONTENTS)


def clear_leftovers(path: Path) -> None:
    """Removes what a killed run leaves: files that were being written, and the summary that no longer holds."""
    (path / SUMMARY).unlink(missing_ok=True)
    for name in CONTENTS:
        remove_leftovers(path, f".{name}.*")
    remove_leftovers(path / CHECKPOINTS, ".*")


def write_about(path: Path, config: TrainConfig, inputs: RunInputs) -> None:
    """Writes config.json and inputs.json of a run that is resumed, some of whose options may be new.

    Raises:
      UserError: when they cannot be written.
    """
    try:
        _write_about(path, config, inputs)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror}); make room there.") from error


def _write_about(path: Path, config: TrainConfig, inputs: RunInputs) -> None:
    # In this order: without a config.json the directory would look like another program's.
    write_json(path / CONFIG, recorded(config))
    write_json(path / INPUTS, inputs._asdict())


def read_inputs(path: Path) -> RunInputs | None:
    """What the run in a directory began with; None if it was killed before that was written, or an older version ran.

    Raises:
      UserError: when inputs.json is damaged.
    """
    if not (path / INPUTS).exists():
        return None
    found = read_json(path / INPUTS)
    if set(found) != set(RunInputs._fields) or not all(isinstance(value, dict) for value in found.values()):
        raise UserError(f"{path / INPUTS} is not as `train` wrote it; name another run directory.")
    return RunInputs(**found)


def write_metrics(path: Path, rows: list[Mapping[str, Any]]) -> None:
    """Writes metrics.jsonl: a line an epoch, the whole file at once."""
    write_text(path / METRICS, "".join(json.dumps(without_nan(row)) + "\n" for row in rows))


def read_json(path: Path) -> dict[str, Any]:
    """Reads one of a run's JSON files.

    Raises:
      UserError: when it is missing or damaged.
    """
    try:
        value = read_json_value(path)
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} is not a run directory: it has no {path.name}; name a directory that `train` wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); name another run directory.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold what `train` writes; name another run directory.")
    return value
