"""The run directory: its files, and the checks before a run is written to it."""

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
# All files that a run writes. `--overwrite` removes these and nothing else.
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
    """The inputs of a run in addition to its options, as stored in inputs.json.

    Attributes:
      digests: digests of images and weights, by name.
      parts: names of the components passed to `train` to replace those that the options describe.
    """

    digests: dict[str, str]
    parts: dict[str, str]


def default_run_dir(config: TrainConfig) -> Path:
    """The default run directory: runs/TIME-PRESET below the current directory, with a number appended if it exists."""
    base = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.preset}"
    numbered = (base.with_name(f"{base.name}-{n}") for n in range(2, 1000))
    return base if not base.exists() else next(path for path in numbered if not path.exists())


def check_run_dir(path: Path, config: TrainConfig, resumes: bool = False) -> None:
    """Checks, before any work is done, that a run can be written to `path`.

    Args:
      path: the run directory.
      config: the configuration of the run.
      resumes: whether to resume the run in the directory.

    Raises:
      UserError: if it is a file, cannot be written, or is not empty.
    """
    try:
        _check_run_dir(path, config, resumes)
    except OSError as error:
        raise UserError(f"--out {path} cannot be used ({error.strerror}); choose another directory.") from error


def _check_run_dir(path: Path, config: TrainConfig, resumes: bool) -> None:
    if path.is_symlink() and not path.exists():
        raise UserError(f"--out {path} is a broken symlink; choose another directory.")
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file; choose a directory.")
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"--out {path} cannot be made, as {existing} is a file; choose another directory.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {path} cannot be written, as {existing} is read-only; choose another directory.")
    if path.is_dir() and (entries := sorted(entry.name for entry in path.iterdir() if not _is_leftover(entry.name))):
        if (path / CONFIG).exists() and (path / CHECKPOINTS).is_dir():
            read_json(path / CONFIG)  # raises if the file is corrupt
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
    """Returns whether a directory's config.json is one of ours: other programs write files of that name too."""
    try:
        return {"preset", "dataset", "weights"} <= set(read_json(path / CONFIG))
    except UserError:
        return False


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Creates the directory if necessary, and locks it against other runs until the block or the process ends.

    A directory that was created here and is still empty at the end is removed.

    Raises:
      UserError: if the directory cannot be created, or another process holds the lock.
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
    """Removes a previous run from the directory, if any, and writes config.json and inputs.json.

    Raises:
      UserError: if the directory cannot be written.
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
    """The configuration as JSON values with absolute paths, so that it does not depend on the current directory."""
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
    """Returns whether a file has the name of a temporary file that only a killed run leaves."""
    return any(name.startswith(f".{content}.") for content in CONTENTS)


def clear_leftovers(path: Path) -> None:
    """Removes the temporary files of a killed run, and the summary, which is out of date once the run continues."""
    (path / SUMMARY).unlink(missing_ok=True)
    for name in CONTENTS:
        remove_leftovers(path, f".{name}.*")
    remove_leftovers(path / CHECKPOINTS, ".*")


def write_about(path: Path, config: TrainConfig, inputs: RunInputs) -> None:
    """Writes config.json and inputs.json of a resumed run, some of whose options may have changed.

    Raises:
      UserError: if they cannot be written.
    """
    try:
        _write_about(path, config, inputs)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror}); make room there.") from error


def _write_about(path: Path, config: TrainConfig, inputs: RunInputs) -> None:
    # config.json first: without it the directory would look like another program's.
    write_json(path / CONFIG, recorded(config))
    write_json(path / INPUTS, inputs._asdict())


def read_inputs(path: Path) -> RunInputs | None:
    """Reads inputs.json; None if the run was killed before it was written, or was made by an older version.

    Raises:
      UserError: if inputs.json is corrupt.
    """
    if not (path / INPUTS).exists():
        return None
    found = read_json(path / INPUTS)
    if set(found) != set(RunInputs._fields) or not all(isinstance(value, dict) for value in found.values()):
        raise UserError(f"{path / INPUTS} is not as `train` wrote it; name another run directory.")
    return RunInputs(**found)


def write_metrics(path: Path, rows: list[Mapping[str, Any]]) -> None:
    """Writes metrics.jsonl, one line per epoch, replacing the whole file."""
    write_text(path / METRICS, "".join(json.dumps(without_nan(row)) + "\n" for row in rows))


def read_json(path: Path) -> dict[str, Any]:
    """Reads one of a run's JSON files.

    Raises:
      UserError: if it is missing or corrupt.
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
