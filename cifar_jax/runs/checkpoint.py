"""Checkpoints: a safetensors file of named arrays, and a JSON file with the digest of each.

    checkpoints/0003/arrays.safetensors   params/head/..., params/backbone/..., batch_stats/..., opt_state/..., step
    checkpoints/0003/checkpoint.json      format, epoch, step, progress of the run, dtype, shape and SHA-256 by name

A checkpoint is written to a temporary directory, read back and compared with the arrays in memory, and only then
renamed: if its directory exists, it is complete. Any subset of its arrays can be read without the others.
"""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cifar_jax.errors import RunError, UserError
from cifar_jax.files import read_sealed, sha256_of_arrays, write_sealed

logger = logging.getLogger(__name__)

FORMAT = 4
ABOUT, ARRAYS = "checkpoint.json", "arrays.safetensors"
_NAME = re.compile(r"\d{4,}(\.\d{6,})?")


class Corrupt(UserError):
    """Raised if a checkpoint differs from what was written; `what` is a sentence without its full stop."""

    def __init__(self, what: str) -> None:
        """Adds the next step to the message."""
        self.what = what
        super().__init__(f"{what}. Train again.")


class Position(NamedTuple):
    """Progress of a run: completed epochs, and steps of the next one."""

    epoch: int
    step: int = 0

    @property
    def name(self) -> str:
        """Directory name of its checkpoint: `0003`, or `0003.000250` within an epoch."""
        return f"{self.epoch:04d}" + (f".{self.step:06d}" if self.step else "")

    @property
    def words(self) -> str:
        """Human-readable position: `1 epoch`, or `3 epochs and 250 steps`."""
        epochs = f"{self.epoch} epoch{'s' * (self.epoch != 1)}"
        return epochs + (f" and {self.step} step{'s' * (self.step != 1)}" if self.step else "")


def position_of(checkpoint: Path) -> Position:
    """Parses the position from a checkpoint's directory name."""
    epoch, _, step = checkpoint.name.partition(".")
    return Position(int(epoch), int(step or 0))


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path, `params/head/0/kernel`, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def save_checkpoint(
    directory: Path,
    position: Position,
    tree: Mapping[str, PyTree],
    progress: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint atomically, in place of one of the same position, and returns its directory.

    Args:
      directory: the run's checkpoint directory; created if necessary, but its parent is not.
      position: position of the run.
      tree: arrays on the host; `named_leaves` defines their names.
      progress: JSON values to store with the arrays.

    Raises:
      RunError: if it cannot be written, or reads back differently.
    """
    target = directory / position.name
    # np.asarray, unlike np.ascontiguousarray, keeps scalars zero-dimensional.
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in named_leaves(dict(tree)).items()}
    described = {name: _describe(array) for name, array in arrays.items()}
    about = {"format": FORMAT, **position._asdict(), "progress": dict(progress or {}), "arrays": described}
    try:
        directory.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=directory) as name:
            temporary = Path(name) / "checkpoint"
            temporary.mkdir()
            save_file(arrays, temporary / ARRAYS)
            with open(temporary / ARRAYS, "rb") as file:
                os.fsync(file.fileno())
            write_sealed(temporary / ABOUT, about)
            _read(temporary, described)
            _remove(target)
            temporary.rename(target)
    except (OSError, SafetensorError, Corrupt) as error:
        raise RunError(
            f"Checkpoint {target} could not be written ({_reason(error)}). Free some space or choose another --out."
        ) from error
    return target


def prune(directory: Path, keep: Collection[Position]) -> None:
    """Removes all checkpoints of a run but those at the positions to keep."""
    for path in list_checkpoints(directory):
        if position_of(path) not in keep:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint, renaming it first so that a kill leaves no partial checkpoint under its name."""
    if checkpoint.exists():
        going = checkpoint.with_name(f".{checkpoint.name}.removed")
        shutil.rmtree(going, ignore_errors=True)
        shutil.rmtree(checkpoint.rename(going))


def list_checkpoints(directory: Path) -> list[Path]:
    """Directories of a run's checkpoints, oldest first."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in found if _NAME.fullmatch(path.name) and path.is_dir()), key=position_of)


def newest_whole(
    directory: Path,
    needed: Callable[[dict[str, Any]], Iterable[Position]] = lambda _: (),
) -> tuple[Position, dict[str, Any]] | None:
    """The newest checkpoint that is not corrupt, and the progress stored in it; None if there are no checkpoints.

    `needed` maps a checkpoint's progress to the positions of other checkpoints that it depends on.

    Raises:
      UserError: if all of them are corrupt, or the newest has another format.
    """
    found = list_checkpoints(directory)
    for path in reversed(found):
        try:
            progress = _checked(path)
            for position in needed(progress):
                _checked(directory / position.name)
        except Corrupt as error:
            logger.info(f"{error.what}{'; using the one before it' if path != found[0] else ''}.")
        else:
            return position_of(path), progress
    if found:
        raise UserError(f"No checkpoint in {directory} can be used. Start the run again with --overwrite.")
    return None


def load_checkpoint(directory: Path, like: PyTree, at: Position | None = None, whole: bool = False) -> Any:
    """Reads arrays of a run's checkpoint and verifies their digests.

    Args:
      directory: the run's checkpoint directory.
      like: the part of the checkpoint's tree to read, with arrays or shapes as leaves.
      at: position of the checkpoint; the newest one if None.
      whole: whether `like` must be the checkpoint's whole tree.

    Returns:
      A tree of NumPy arrays with the structure of `like`.

    Raises:
      UserError: if there is no such checkpoint, an array is missing or has another shape, or it is corrupt; with
        `whole` also if it has other arrays.
    """
    arrays = _read(*find_checkpoint(directory, like, at, whole))
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in named_leaves(like)])


def find_checkpoint(
    directory: Path, like: PyTree, at: Position | None = None, whole: bool = False
) -> tuple[Path, dict[str, Mapping[str, Any]]]:
    """Finds a checkpoint that fits a tree, without reading its arrays; for arguments and errors see `load_checkpoint`.

    Returns:
      The checkpoint's directory, and the descriptions of the tree's arrays by name.
    """
    checkpoints = [path for path in list_checkpoints(directory) if at in (None, position_of(path))]
    if not checkpoints:
        which = f"no checkpoint {at.name}" if at and list_checkpoints(directory) else "no checkpoint"
        raise UserError(f"There is {which} in {directory}. Train first, or give another run directory.")
    chosen, wanted = checkpoints[-1], named_leaves(like)
    described = _read_about(chosen)["arrays"]
    # A caller that reads a part only, e.g. to predict, must not be told to overwrite the run.
    hint = f"Give what the run was trained with{', or start again with --overwrite' if whole else ''}."
    missing, more = sorted(set(wanted) - set(described)), sorted(set(described) - set(wanted)) if whole else []
    if missing or more:
        which = f"no {missing[0]}" if missing else f"an unexpected {more[0]}"
        raise UserError(
            f"Checkpoint {chosen} has {which}: it was written with another head, backbone, optimiser or version. {hint}"
        )
    for name, leaf in wanted.items():
        if described[name]["shape"] != list(leaf.shape):
            raise UserError(
                f"In checkpoint {chosen}, {name} has shape {described[name]['shape']}, expected {list(leaf.shape)}: it "
                f"was written with another head, backbone or optimiser. {hint}"
            )
    return chosen, {name: described[name] for name in wanted}


def _checked(checkpoint: Path) -> dict[str, Any]:
    """Verifies all arrays of a checkpoint, and returns the progress stored in it."""
    about = _read_about(checkpoint)
    _read(checkpoint, about["arrays"])
    progress: dict[str, Any] = about["progress"]
    return progress


def _read_about(checkpoint: Path) -> dict[str, Any]:
    """Reads the contents of checkpoint.json."""
    try:
        about = read_sealed(checkpoint / ABOUT)
    except (OSError, ValueError) as error:
        raise Corrupt(f"Checkpoint {checkpoint} cannot be read ({_reason(error)})") from error
    if about.get("format") != FORMAT:
        raise UserError(f"Checkpoint {checkpoint} was written by another version of this program. Train again.")
    return about


def _read(checkpoint: Path, described: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Reads arrays by name, and checks that they match their descriptions."""
    try:
        with safe_open(checkpoint / ARRAYS, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in described}
    except Exception as error:  # the parser and NumPy raise various types for a corrupt header
        raise Corrupt(f"Checkpoint {checkpoint} cannot be read ({_reason(error)})") from error
    if wrong := [name for name, array in arrays.items() if _describe(array) != described[name]]:
        raise Corrupt(f"Checkpoint {checkpoint} is corrupt: checksum mismatch in {', '.join(wrong[:4])}")
    return arrays


def _describe(array: np.ndarray) -> dict[str, Any]:
    return {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": sha256_of_arrays(array)}


def _reason(error: Exception) -> str:
    if isinstance(error, Corrupt):
        return error.what
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().partition("\n")[0]
