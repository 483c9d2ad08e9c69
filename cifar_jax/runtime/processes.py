"""More than one process: how they find each other, what the first one decides for all, and what each does its share of.

Every process runs the same command. The first one alone says and writes things; all of them load the data, extract
features of their share of the images, and take their part of every training step.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float32, PyTree

from cifar_jax.errors import UserError

# JAX itself reads the first of them only.
NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
DETECT = "CIFAR_JAX_DISTRIBUTED"


def join() -> None:
    """Joins the other processes of a run. To be called before JAX looks for devices.

    $JAX_COORDINATOR_ADDRESS (host:port of the first process), $JAX_NUM_PROCESSES and $JAX_PROCESS_ID say who they are;
    with $CIFAR_JAX_DISTRIBUTED=1 JAX finds out itself what is left open, on TPU pods, under SLURM, Open MPI or
    Kubernetes. Without any of them the process is alone.

    Raises:
      UserError: when they do not say enough, or the others cannot be reached.
    """
    asked = [name for name in NAMES if os.environ.get(name)]
    detects = os.environ.get(DETECT, "0") not in ("", "0")
    if not (asked or detects) or jax.distributed.is_initialized():
        return
    if len(asked) < 3 and not detects:
        missing = next(name for name in NAMES if name not in asked)
        raise UserError(f"${asked[0]} asks for more than one process; set ${missing} too, or ${DETECT}=1 to detect it.")
    try:
        count, own = (int(os.environ[name]) if name in asked else None for name in NAMES[1:])
        jax.distributed.initialize(num_processes=count, process_id=own)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"This process cannot join the others ({reason}); check ${', $'.join(NAMES)}.") from error


def is_first() -> bool:
    """Whether this is the process that says and writes things, or the only one."""
    return jax.process_index() == 0


def from_first(make: Callable[[], Any]) -> Any:
    """A JSON value that the first process makes, in all of them. So is the UserError that making it raises."""
    if jax.process_count() == 1:
        return make()
    said: dict[str, Any] = {}
    if is_first():
        try:
            said = {"value": make()}
        except UserError as error:
            said = {"error": str(error)}
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    said = json.loads(text.tobytes())
    if "error" in said:
        raise UserError(said["error"])
    return said["value"]


def arrays_from_first(tree: PyTree) -> PyTree:
    """The arrays that the first process has, in all of them; the others give arrays of the same shapes."""
    return multihost_utils.broadcast_one_to_all(jax.device_get(tree)) if jax.process_count() > 1 else tree


def require_same(about: Mapping[str, str]) -> None:
    """Sees to it that all processes were given the same.

    Raises:
      UserError: in all of them, naming what differs.
    """
    digests = [hashlib.sha256(value.encode()).digest() for value in about.values()]
    mine = np.stack([np.frombuffer(digest, np.uint8) for digest in digests])
    everyones = np.asarray(multihost_utils.process_allgather(mine)).reshape(jax.process_count(), *mine.shape)
    differing = (everyones != everyones[:1]).any(axis=(0, 2))
    if differing.any():
        names = ", ".join(name for name, differs in zip(about, differing, strict=True) if differs)
        raise UserError(f"The processes of this run differ in {names}; give all of them the same command and files.")


def agreed(requested: Callable[[], bool]) -> Callable[[], bool]:
    """Whether to stop, the same in all processes, which must ask equally often; once it is True it stays so.

    Args:
      requested: whether this process is to, where it is alone. Where there are several, JAX listens for SIGTERM, which
        may come to any of them.
    """
    if jax.process_count() == 1:
        return requested
    numbers, stopped = itertools.count(), False

    def stopping() -> bool:
        nonlocal stopped
        stopped = stopped or multihost_utils.reached_preemption_sync_point(next(numbers))
        return stopped

    return stopping


def own_rows(count: int) -> slice:
    """Those of `count` rows that this process does: as many as every other, but for the last ones."""
    each = -(-count // jax.process_count())
    first = min(count, jax.process_index() * each)
    return slice(first, min(count, first + each))


def gather(own: Float32[np.ndarray, "rows features"], count: int) -> Float32[np.ndarray, "count features"]:
    """The rows of all processes, in all of them."""
    if jax.process_count() == 1:
        return own
    padded = np.zeros((-(-count // jax.process_count()), *own.shape[1:]), own.dtype)
    padded[: len(own)] = own
    return np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, *own.shape[1:])[:count]
