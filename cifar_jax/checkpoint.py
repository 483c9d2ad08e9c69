"""Checkpoints by Orbax, with digests of their own: Orbax alone restores flipped bits without a word."""

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from cifar_jax.errors import RunError, UserError
from cifar_jax.files import sha256_of_arrays, sha256_of_file, write_json

_DIGESTS, _ARRAYS, _FORMAT = "digests.json", "arrays", 2


def save_checkpoint(directory: Path, epoch: int, tree: Mapping[str, PyTree], keep: Collection[int] = ()) -> Path:
    """Writes a checkpoint, whole or not at all, and removes the others.

    Args:
      directory: of the run's checkpoints; made if need be.
      epoch: that the checkpoint was made after, 0 for none.
      tree: the checkpoint's parts by name, each a tree of arrays, which can be read without the others.
      keep: epochs of other checkpoints that stay.

    Raises:
      RunError: when it cannot be written.
    """
    target = directory / f"{epoch:04d}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=directory) as name:
            temporary = Path(name) / "checkpoint"
            temporary.mkdir()
            with _checkpointer() as checkpointer:
                for part, leaves in tree.items():
                    checkpointer.save((temporary / _ARRAYS / part).absolute(), leaves)
                    checkpointer.wait_until_finished()
            about = {
                "format": _FORMAT,
                "epoch": epoch,
                "shapes": {part: _shapes(leaves) for part, leaves in tree.items()},
                "files": _file_digests(temporary),
                "leaves": {part: digests(leaves) for part, leaves in tree.items()},
            }
            write_json(temporary / _DIGESTS, about)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        for other in list_checkpoints(directory):
            if other != target and int(other.name) not in keep:
                shutil.rmtree(other)
    except Exception as error:  # Orbax raises what its many layers happen to raise
        raise RunError(
            f"The checkpoint {target} could not be written ({_reason(error)}); make room or choose another --out."
        ) from error
    return target


def list_checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path.parent for path in directory.glob(f"[0-9]*/{_DIGESTS}"))


def load_checkpoint(directory: Path, like: Mapping[str, PyTree], epoch: int | None = None) -> dict[str, PyTree]:
    """Reads a run's checkpoint, every file and every leaf checked against its digest.

    Args:
      directory: of the run's checkpoints.
      like: the parts to read, each a tree of the same structure, of arrays or shapes.
      epoch: that the checkpoint was made after; the newest one if None.

    Raises:
      UserError: when there is none, it lacks a part, or it is damaged.
    """
    checkpoints = [path for path in list_checkpoints(directory) if epoch in (None, int(path.name))]
    if not checkpoints:
        raise UserError(f"There is no checkpoint in {directory}; train first, or name another run directory.")
    chosen = checkpoints[-1]
    try:
        about = json.loads((chosen / _DIGESTS).read_text(encoding="utf-8"))
        # First what can be told without Orbax, which leaves half-done reads behind when it fails.
        if missing := sorted(set(like) - set(about["shapes"])):
            raise UserError(f"The checkpoint {chosen} holds no {missing[0]}; train again.")
        if any(about["shapes"][part] != _shapes(like[part]) for part in like):
            raise UserError(f"The checkpoint {chosen} is of another network than its config.json says; train again.")
        _require_equal(about["files"], _file_digests(chosen), chosen)
        with _checkpointer() as checkpointer:
            tree = {part: checkpointer.restore((chosen / _ARRAYS / part).absolute(), like[part]) for part in like}
    except UserError:
        raise
    except Exception as error:  # Orbax raises what its many layers happen to raise
        raise UserError(f"The checkpoint {chosen} cannot be read ({_reason(error)}); train again.") from error
    for part in like:
        _require_equal(about["leaves"][part], digests(tree[part]), chosen)
    return tree


def _reason(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:80]} ... {line[-100:]}"  # the cause stands at the end


def _require_equal(expected: dict[str, str], actual: dict[str, str], checkpoint: Path) -> None:
    if wrong := sorted(name for name in expected | actual if expected.get(name) != actual.get(name)):
        raise UserError(f"The checkpoint {checkpoint} is damaged in {', '.join(wrong[:4])}; train again.")


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
