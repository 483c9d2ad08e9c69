"""Checkpoints by Orbax, with digests of their own: Orbax alone restores flipped bits without a word."""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from cifar_jax.errors import RunError, UserError
from cifar_jax.files import read_sealed, sha256_of_arrays, sha256_of_file, write_sealed

_DIGESTS, _ARRAYS, _FORMAT = "digests.json", "arrays", 3


class Position(NamedTuple):
    """How far a run has come: whole epochs, and steps of the next one."""

    epoch: int
    step: int = 0

    @property
    def name(self) -> str:
        """Of its checkpoint: `0003`, or `0003.000250` in the midst of an epoch."""
        return f"{self.epoch:04d}" + (f".{self.step:06d}" if self.step else "")


def position_of(checkpoint: Path) -> Position:
    """The position that a checkpoint's name says."""
    epoch, _, step = checkpoint.name.partition(".")
    return Position(int(epoch), int(step or 0))


def save_checkpoint(
    directory: Path,
    position: Position,
    tree: Mapping[str, PyTree],
    progress: Mapping[str, Any] | None = None,
    keep: Collection[Position] = (),
    keep_last: int = 1,
) -> Path:
    """Writes a checkpoint, whole or not at all, and removes older ones.

    Args:
      directory: of the run's checkpoints; it is made if need be, the run's own is not.
      position: that the checkpoint was made at.
      tree: the checkpoint's parts by name, each a tree of arrays, which can be read without the others.
      progress: JSON values kept beside them.
      keep: positions of other checkpoints that stay.
      keep_last: how many of the newest stay, this one among them.

    Raises:
      RunError: when it cannot be written.
    """
    target = directory / position.name
    try:
        directory.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=directory) as name:
            temporary = Path(name) / "checkpoint"
            temporary.mkdir()
            _require_room(temporary, sum(leaf.nbytes for leaf in jax.tree.leaves(dict(tree))))
            with _checkpointer() as checkpointer:
                for part, leaves in tree.items():
                    checkpointer.save((temporary / _ARRAYS / part).absolute(), leaves)
                    checkpointer.wait_until_finished()
            about = {
                "format": _FORMAT,
                "epoch": position.epoch,
                "step": position.step,
                "progress": dict(progress or {}),
                "shapes": {part: _shapes(leaves) for part, leaves in tree.items()},
                "files": _file_digests(temporary),
                "leaves": {part: digests(leaves) for part, leaves in tree.items()},
            }
            write_sealed(temporary / _DIGESTS, about)
            _remove(target)
            temporary.rename(target)
        prune(directory, position, keep, keep_last)
    except Exception as error:  # Orbax raises what its many layers happen to raise
        raise RunError(
            f"The checkpoint {target} could not be written ({_reason(error)}); make room or choose another --out."
        ) from error
    return target


def prune(directory: Path, newest: Position, keep: Collection[Position], keep_last: int) -> None:
    """Removes the checkpoints of a run that are none of its last few, and those that lie ahead of it.

    Args:
      directory: of the run's checkpoints.
      newest: how far the run has come; what it made later was damaged, or belongs to what is done once more.
      keep: positions of checkpoints that stay.
      keep_last: how many of the newest stay.
    """
    found = list_checkpoints(directory)
    ahead = [path for path in found if position_of(path) > newest]
    for path in ahead + [path for path in found if path not in ahead][:-keep_last]:
        if path in ahead or position_of(path) not in keep:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """Renamed first: a kill in the midst of it leaves no half of a checkpoint under its name."""
    if checkpoint.exists():
        going = checkpoint.with_name(f".{checkpoint.name}.removed")
        shutil.rmtree(going, ignore_errors=True)
        shutil.rmtree(checkpoint.rename(going))


def _require_room(directory: Path, num_bytes: int) -> None:
    """Fails where a disk is full before Orbax does, which leaves half-done writes and their complaints behind."""
    if hasattr(os, "posix_fallocate") and num_bytes:
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)


def list_checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((path.parent for path in directory.glob(f"[0-9]*/{_DIGESTS}")), key=position_of)


def newest_whole(directory: Path, say: Callable[[str], None]) -> tuple[Position, dict[str, Any]] | None:
    """The newest checkpoint that is not damaged, and what was kept beside its arrays; None where there is none at all.

    Args:
      directory: of the run's checkpoints.
      say: is told of each that is damaged.

    Raises:
      UserError: when all of them are damaged, or the newest is of another version of this program.
    """
    found = list_checkpoints(directory)
    for path in reversed(found):
        try:
            about = _checked(path)
        except _Damaged as error:
            say(f"{error}: the one before it is used.")
        else:
            return position_of(path), about["progress"]
    if found:
        raise UserError(f"No checkpoint in {directory} can be gone on from; start the run again with --overwrite.")
    return None


def load_checkpoint(directory: Path, like: Mapping[str, PyTree], at: Position | None = None) -> dict[str, PyTree]:
    """Reads a run's checkpoint, every file and every leaf checked against its digest.

    Args:
      directory: of the run's checkpoints.
      like: the parts to read, each a tree of the same structure, of arrays or shapes.
      at: the position that the checkpoint was made at; the newest one if None.

    Raises:
      UserError: when there is none, it lacks a part, or it is damaged.
    """
    checkpoints = [path for path in list_checkpoints(directory) if at in (None, position_of(path))]
    if not checkpoints:
        raise UserError(f"There is no checkpoint in {directory}; train first, or name another run directory.")
    chosen = checkpoints[-1]
    try:
        about = _checked(chosen)
        # First what can be told without Orbax, which leaves half-done reads behind when it fails.
        if missing := sorted(set(like) - set(about["shapes"])):
            raise UserError(f"The checkpoint {chosen} holds no {missing[0]}; train again.")
        if any(about["shapes"][part] != _shapes(like[part]) for part in like):
            raise UserError(f"The checkpoint {chosen} is of another network than its config.json says; train again.")
        with _checkpointer() as checkpointer:
            tree = {part: checkpointer.restore((chosen / _ARRAYS / part).absolute(), like[part]) for part in like}
        for part in like:
            _require_equal(about["leaves"][part], digests(tree[part]), chosen)
    except _Damaged as error:
        raise UserError(f"{error}; train again.") from error
    except UserError:
        raise
    except Exception as error:  # Orbax raises what its many layers happen to raise
        raise UserError(f"The checkpoint {chosen} cannot be read ({_reason(error)}); train again.") from error
    return tree


class _Damaged(Exception):
    """A checkpoint is not as it was written; the message is a sentence without its end."""


def _checked(checkpoint: Path) -> dict[str, Any]:
    """What stands beside a checkpoint's arrays, once all its files are seen to be as they were written."""
    try:
        about = read_sealed(checkpoint / _DIGESTS)
        files = _file_digests(checkpoint)
    except (OSError, ValueError) as error:
        raise _Damaged(f"The checkpoint {checkpoint} cannot be read ({_reason(error)})") from error
    if about.get("format") != _FORMAT:
        raise UserError(f"The checkpoint {checkpoint} was written by another version of this program; train again.")
    _require_equal(about["files"], files, checkpoint)
    return about


def _reason(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:80]} ... {line[-100:]}"  # the cause stands at the end


def _require_equal(expected: dict[str, str], actual: dict[str, str], checkpoint: Path) -> None:
    if wrong := sorted(name for name in expected | actual if expected.get(name) != actual.get(name)):
        raise _Damaged(f"The checkpoint {checkpoint} is damaged in {', '.join(wrong[:4])}")


def _shapes(tree: PyTree) -> dict[str, list[int]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): list(leaf.shape) for path, leaf in leaves}


def _file_digests(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != _DIGESTS)
    return {path.relative_to(directory).as_posix(): sha256_of_file(path) for path in files}


def digests(tree: PyTree) -> dict[str, str]:
    """SHA-256 of each leaf, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): sha256_of_arrays(np.asarray(leaf)) for path, leaf in leaves}


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    # Imported here: it takes longer to import than a head to load, and most of the library has no use for it.
    import orbax.checkpoint as ocp

    # One process alone writes and reads a run's files: Orbax need not wait for the others.
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(own, {own}, barrier_sync_key_prefix=str(own))
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what goes wrong is raised, and need not be logged by Orbax's threads as well
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
            yield checkpointer
    finally:
        logger.setLevel(level)
