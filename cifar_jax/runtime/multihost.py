"""Distributed runs: joining the processes, broadcasting decisions of the first one, and sharing out the work.

Every process runs the same command. Only the first one prints and writes files; all of them load the data, extract the
features of their share of the images, and compute their part of every training step.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jaxtyping import Float32, PyTree

from cifar_jax.errors import UserError
from cifar_jax.runtime.peers import HEARTBEAT, Peers, joining
from cifar_jax.runtime.supervisor import DETECT, NAMES, detects, is_distributed


def join() -> Peers | None:
    """Joins the other processes of a run. Must be called before JAX looks for devices.

    Returns:
      The processes; None if this is the only one.

    $JAX_COORDINATOR_ADDRESS (host:port of the first process), $JAX_NUM_PROCESSES and $JAX_PROCESS_ID identify the
    processes; with $CIFAR_JAX_DISTRIBUTED=1 JAX detects whichever are not set, on TPU pods and under SLURM, Open MPI or
    Kubernetes. With none of these variables set, this process is the only one.

    Raises:
      UserError: if only some of the variables are set, or the other processes cannot be reached.
    """
    if not (is_distributed() or jax.distributed.is_initialized()):
        return None
    asked = [name for name in NAMES if os.environ.get(name)]
    if len(asked) < 3 and not detects():
        missing = next(name for name in NAMES if name not in asked)
        raise UserError(f"${asked[0]} is set, but ${missing} is not; set it too, or ${DETECT}=1 to detect it.")
    try:
        count, own = (int(os.environ[name]) if name in asked else None for name in NAMES[1:])
        if not jax.distributed.is_initialized():
            with joining(os.environ.get(NAMES[0], "the address that JAX has found")):
                jax.distributed.initialize(num_processes=count, process_id=own, heartbeat_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"This process cannot join the others ({reason}); check ${', $'.join(NAMES)}.") from error
    # The key-value store has no public name; jax.experimental.multihost_utils uses it in the same way.
    state: Any = distributed.global_state
    return Peers(state.client, state.process_id, state.num_processes)


def is_first() -> bool:
    """Whether this is the first or only process, the one that prints and writes files."""
    return jax.process_index() == 0


def from_first(make: Callable[[], Any]) -> Any:
    """Computes a JSON value in the first process and returns it, or raises its UserError, in all processes."""
    if jax.process_count() == 1:
        return make()
    outcome: dict[str, Any] = {}
    if is_first():
        try:
            outcome = {"value": make()}
        except UserError as error:
            outcome = {"error": str(error)}
    text = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    outcome = json.loads(text.tobytes())
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]


def arrays_from_first(tree: PyTree) -> PyTree:
    """Returns the arrays of the first process in all of them; the others pass arrays of the same shapes."""
    return multihost_utils.broadcast_one_to_all(jax.device_get(tree)) if jax.process_count() > 1 else tree


def require_same(about: Mapping[str, str]) -> None:
    """Checks that all processes have the same values.

    Raises:
      UserError: in all processes, naming the values that differ.
    """
    digests = [hashlib.sha256(value.encode()).digest() for value in about.values()]
    own = np.stack([np.frombuffer(digest, np.uint8) for digest in digests])
    gathered = np.asarray(multihost_utils.process_allgather(own)).reshape(jax.process_count(), *own.shape)
    differing = (gathered != gathered[:1]).any(axis=(0, 2))
    if differing.any():
        names = ", ".join(name for name, differs in zip(about, differing, strict=True) if differs)
        raise UserError(f"The processes of this run differ in {names}; give all of them the same command and files.")


def agreed(requested: Callable[[], bool]) -> Callable[[], bool]:
    """Returns a function that says whether to stop, with the same answer in all processes.

    All processes must call it equally often. Once it has returned True it keeps returning True.

    Args:
      requested: whether to stop if this is the only process. With several, JAX listens for SIGTERM, which any of them
        may receive.
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
    """Returns this process's share of `count` rows. All shares are equal, except that the last ones may be smaller."""
    each = -(-count // jax.process_count())
    first = min(count, jax.process_index() * each)
    return slice(first, min(count, first + each))


def gather(own: Float32[np.ndarray, "rows features"], count: int) -> Float32[np.ndarray, "count features"]:
    """Returns the rows of all processes, concatenated, in all of them."""
    if jax.process_count() == 1:
        return own
    padded = np.zeros((-(-count // jax.process_count()), *own.shape[1:]), own.dtype)
    padded[: len(own)] = own
    return np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, *own.shape[1:])[:count]
