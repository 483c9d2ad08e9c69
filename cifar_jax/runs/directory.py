"""The run directory: its files, its lock, and the checks before a run is written to it."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cifar_jax.config import TrainConfig
from cifar_jax.config.option_groups import PATHS
from cifar_jax.errors import UserError
from cifar_jax.files import (
    locked_directory,
    read_json_value,
    remove,
    remove_leftovers,
    write_json,
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


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Creates the run directory if necessary, and locks it against other runs until the block or the process ends.

    Directories that were created here and are still empty at the end are removed.

    Raises:
      UserError: if the directory cannot be created or written, or another process holds the lock.
    """

    def refuse() -> None:
        raise BlockingIOError

    created: list[Path] = []
    try:
        with contextlib.ExitStack() as stack:
            with _usable(path):
                _check_place(path)
                created = [parent for parent in (path, *path.absolute().parents) if not parent.exists()]
                path.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(locked_directory(path, refuse))
                except BlockingIOError:
                    raise UserError(
                        f"Another process is writing the run in {path}; wait for it, or choose another --out."
                    ) from None
            yield
    finally:
        with contextlib.suppress(OSError):
            for directory in created:
                directory.rmdir()


def _check_place(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise UserError(f"--out {path} is a broken symlink; choose another directory.")
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file; choose a directory.")
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"--out {path} cannot be made, as {existing} is a file; choose another directory.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {path} cannot be written, as {existing} is read-only; choose another directory.")


def check_contents(path: Path, config: TrainConfig, resumes: bool) -> None:
    """Raises UserError unless the directory is empty, or holds a run that is resumed or may be replaced."""
    with _usable(path):
        entries = sorted(entry.name for entry in path.iterdir() if not _is_leftover(entry.name))
    if not entries:
        return
    if (path / CONFIG).exists() and (path / CHECKPOINTS).is_dir():
        read_json(path / CONFIG)  # raises if the file is corrupt
    if not is_run(path):
        raise UserError(f"--out {path} holds other files ({entries[0]}, ...); choose an empty or a new directory.")
    if resumes:
        return
    # A run that ended before its first checkpoint has nothing that could be lost.
    if not config.run.overwrite and any((path / CHECKPOINTS).glob("[0-9]*")):
        raise UserError(
            f"--out {path} already holds a run; choose another directory or --overwrite it, or "
            "--resume it where it is unfinished."
        )
    if Path(config.backbone.weights).resolve().is_relative_to(path.resolve()):
        raise UserError(
            f"--weights {config.backbone.weights} lies in the run that --overwrite removes; move it out first."
        )


@contextlib.contextmanager
def _usable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {path} cannot be used ({error.strerror}); choose another directory.") from error


def is_run(path: Path) -> bool:
    """Returns whether a directory's config.json is one of ours: other programs write files of that name too."""
    try:
        return {"preset", "dataset", "weights"} <= set(read_json(path / CONFIG))
    except UserError:
        return False


def start_run_dir(path: Path, config: TrainConfig, inputs: RunInputs, resumes: bool) -> None:
    """Writes config.json and inputs.json, and removes the previous run or, if it is resumed, what is out of date of it.

    Raises:
      UserError: if the directory cannot be written.
    """
    try:
        if resumes:
            # Before the summary is removed: it records that a run diverged and so may have a new learning rate.
            _write_about(path, config, inputs)
            remove_leftovers(path / CHECKPOINTS, ".*")
        # config.json last: without it the directory would look like another program's.
        for name in reversed(CONTENTS):
            remove_leftovers(path, f".{name}.*")
            if name == SUMMARY or not resumes:
                remove(path / name)
        if not resumes:
            _write_about(path, config, inputs)
    except OSError as error:
        advice = "make room there" if resumes else "choose another directory"
        raise UserError(f"--out {path} cannot be written ({error.strerror}); {advice}.") from error


def _write_about(path: Path, config: TrainConfig, inputs: RunInputs) -> None:
    write_json(path / CONFIG, recorded(config))  # first: see above
    write_json(path / INPUTS, inputs._asdict())


def recorded(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON values with absolute paths, so that it does not depend on the current directory."""
    fields = config.to_json()
    for name in PATHS:
        if fields[name] is not None:
            fields[name] = os.path.abspath(os.path.expanduser(fields[name]))
    weights = os.path.expanduser(config.backbone.weights)
    # As `load_backbone` reads it: a file goes before the name of known weights, and that before a directory.
    is_path = os.path.isfile(weights) or (os.path.isdir(weights) and config.backbone.weights not in registry.entries())
    if is_path and config.backbone.weights not in UNTRAINED:
        fields["weights"] = os.path.abspath(weights)
    dataset = os.path.expanduser(config.data.dataset)
    if os.path.exists(dataset) and config.data.dataset != "shapes":  # as `data.load.kind_of` reads it
        fields["dataset"] = os.path.abspath(dataset)
    return fields


def _is_leftover(name: str) -> bool:
    """Returns whether a file has the name of a temporary file that only a killed run leaves."""
    return any(name.startswith(f".{content}.") for content in CONTENTS)


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
