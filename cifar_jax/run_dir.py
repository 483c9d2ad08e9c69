"""The run directory: what a run leaves behind, and how it is found and read again."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from cifar_jax.checkpoint import load_checkpoint
from cifar_jax.config import TrainConfig
from cifar_jax.errors import UserError
from cifar_jax.files import sha256_of_file, without_nan, write_json, write_text
from cifar_jax.head import HeadParams, init_head
from cifar_jax.pretrained import Backbone, load_backbone, registry
from cifar_jax.pretrained.canonical import is_ours

FORMAT_VERSION = 1
CONFIG, METRICS, SUMMARY, CHECKPOINTS, BACKBONE = (
    "config.json",
    "metrics.jsonl",
    "summary.json",
    "checkpoints",
    "backbone.safetensors",
)
# All that a run writes. `--overwrite` removes these and nothing else.
CONTENTS = (
    CONFIG,
    METRICS,
    SUMMARY,
    CHECKPOINTS,
    BACKBONE,
    "samples.png",
    "curves.png",
    "predictions.png",
    "confusion.png",
)


@dataclass(frozen=True)
class Run:
    """A run that was read back, ready to predict.

    Attributes:
      path: of its directory.
      config: what it was told.
      summary: what summary.json holds.
      backbone: the network, found again by its hash, with the image size of the run.
      head_params: the trained head.
      class_names: by label.
    """

    path: Path
    config: TrainConfig
    summary: dict[str, Any]
    backbone: Backbone
    head_params: HeadParams
    class_names: tuple[str, ...]


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
        str(path.absolute()).encode()  # Orbax writes below no other name
    except UnicodeEncodeError as error:
        raise UserError(f"--out {path.absolute()} is not UTF-8; choose another directory.") from error
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
    if path.is_dir() and (entries := sorted(entry.name for entry in path.iterdir())):
        if not is_run(path):
            raise UserError(f"--out {path} holds other files ({entries[0]}, ...); choose an empty or a new directory.")
        if resumes:
            return
        if not config.overwrite:
            raise UserError(
                f"--out {path} already holds a run; choose another directory or --overwrite it, or "
                "--resume it where it is unfinished."
            )
        if Path(config.weights).resolve().is_relative_to(path.resolve()):
            raise UserError(f"--weights {config.weights} lies in the run that --overwrite removes; move it out first.")


def is_run(path: Path) -> bool:
    """Whether the directory's config.json is one of ours: other programs have files of that name too."""
    try:
        return {"preset", "dataset", "weights"} <= set(read_json(path / CONFIG))
    except UserError:
        return False


def start_run_dir(path: Path, config: TrainConfig) -> None:
    """Makes the directory, without the run that may have been in it, and writes config.json.

    Raises:
      UserError: when the directory cannot be written.
    """
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name in CONTENTS:
            if (path / name).is_dir() and not (path / name).is_symlink():
                shutil.rmtree(path / name)
            else:
                (path / name).unlink(missing_ok=True)
        write_json(path / CONFIG, config.to_json())
    except OSError as error:
        if made:
            shutil.rmtree(path, ignore_errors=True)
        raise UserError(f"--out {path} cannot be written ({error.strerror}); choose another directory.") from error


def write_config(path: Path, config: TrainConfig) -> None:
    """Writes the config.json of a run that goes on: it may be told another number of epochs.

    Raises:
      UserError: when it cannot be written.
    """
    try:
        write_json(path / CONFIG, config.to_json())
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror}); make room there.") from error


def write_metrics(path: Path, rows: list[Mapping[str, Any]]) -> None:
    """Writes metrics.jsonl: a line an epoch, the whole file at once."""
    write_text(path / METRICS, "".join(json.dumps(without_nan(row)) + "\n" for row in rows))


def read_json(path: Path) -> dict[str, Any]:
    """Reads one of a run's JSON files.

    Raises:
      UserError: when it is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} is not a run directory: it has no {path.name}; name a directory that `train` wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); name another run directory.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold what `train` writes; name another run directory.")
    return value


def load_run(path: str | os.PathLike[str], weights: str | None = None) -> Run:
    """Reads a run back: its configuration, its head, and the backbone it needs, found by hash.

    Args:
      path: of the run directory.
      weights: a file or name to take the backbone from, where it is not found by itself.

    Raises:
      UserError: when it is no run, is damaged, or its backbone is not on this machine.
    """
    path = Path(path)
    fields, summary = read_json(path / CONFIG), read_json(path / SUMMARY)
    if summary.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} was written by another version of this program; train again.")
    try:
        config = TrainConfig.from_json(fields)
    except UserError as error:
        raise UserError(f"{path / CONFIG} is not as `train` wrote it ({error}); name another run directory.") from error
    try:
        class_names = tuple(map(str, summary["dataset"]["class_names"]))
        about = {name: str(summary["backbone"][name]) for name in ("sha256", "source")}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / SUMMARY} is not as `train` wrote it; name another run directory.") from error
    backbone = _find_backbone(path, config, about, weights)
    _check_run_as_before(path, backbone, summary["backbone"])
    # What the head was trained on, which need not be the size of the backbone's own training.
    backbone = backbone.replace(image_size=config.image_size or backbone.image_size)
    selected = summary.get("selected_epoch")
    like = {"head": jax.eval_shape(
        lambda: init_head(jax.random.key(0), backbone.config.features, config.hidden, len(class_names))
    )}  # fmt: skip
    head_params = load_checkpoint(path / CHECKPOINTS, like, selected)["head"]
    return Run(path, config, summary, backbone, head_params, class_names)


def _check_run_as_before(path: Path, backbone: Backbone, about: Mapping[str, Any]) -> None:
    """The hash is that of the weights; how they are run may be told by a file beside them, which may have gone."""
    for name, value in (("config", backbone.config), ("preprocessing", backbone.preprocessing)):
        if name in about and json.loads(json.dumps(asdict(value))) != about[name]:
            raise UserError(
                f"{backbone.source} has the weights of the run {path} and would be run with another {name} than there; "
                "put back the config.json that lay beside it."
            )


def _find_backbone(path: Path, config: TrainConfig, about: Mapping[str, Any], weights: str | None) -> Backbone:
    """Tries every place where the backbone may lie; only one with the same hash will do."""
    if weights and weights not in registry.entries() and not os.path.isfile(os.path.expanduser(weights)):
        raise UserError(f"--weights {weights} is neither a file nor a name that `info` lists; name the run's backbone.")
    named = [os.path.expanduser(weights)] if weights else [str(path / BACKBONE), about["source"], config.weights]
    # Of the known files only copies that are here: reading a run should not start a download.
    copies = (registry.find_local(entry, config.cache_dir)[0] for entry in registry.entries().values())
    other = ""
    for candidate in (*map(Path, named), *filter(None, copies)):
        if not os.path.isfile(candidate):
            continue
        digest = sha256_of_file(candidate)
        if digest == about["sha256"]:
            # A file of the project's own says itself how it is run, whatever the one it was made from was told.
            return load_backbone(candidate, None if is_ours(candidate) else config.variant)
        if str(candidate) in named:
            other = other or f" ({candidate} is another file)"
    raise UserError(
        f"The run {path} needs the backbone it was trained on, {about['source']} with SHA-256 {about['sha256']}, which "
        f"is not found{other}; name a copy of it with --weights."
    )
