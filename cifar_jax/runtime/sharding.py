"""Data parallelism: a mesh with one axis over the devices of a run, and the placement of arrays on it.

Compiled functions do not mention devices, as computation follows data: parameters and cached features are replicated,
the examples of a step are sharded, and XLA inserts the sums over the batch: those of gradients and metrics, and of the
batch statistics where BatchNorm uses them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from cifar_jax.errors import UserError

AXIS = "batch"


def make_mesh(devices: int | None = 1) -> Mesh:
    """Builds the one-axis mesh of a run.

    Args:
      devices: number of devices of each process. None means all, except on a CPU, where it means one, as CPU devices
        share the cores.

    Raises:
      UserError: if there are fewer devices.
    """
    local = jax.local_devices()
    platform = local[0].platform
    if devices is None:
        devices = 1 if platform == "cpu" else len(local)
    if devices > len(local):
        advice = "; set JAX_NUM_CPU_DEVICES to divide the CPU into more" if platform == "cpu" else ""
        raise UserError(
            f"--devices must be at most {len(local)}, the number of local {platform} devices, got {devices}{advice}."
        )
    by_process = [[d for d in jax.devices() if d.process_index == process] for process in range(jax.process_count())]
    return mesh_of([device for process_devices in by_process for device in process_devices[:devices]])


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    """Builds a mesh with one axis over the given devices."""
    return Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
    """Replicates arrays on every device. Arrays that are replicated already are not copied."""
    return _place(tree, replicated_sharding(mesh))


def shard(mesh: Mesh, tree: PyTree, axis: int = 0) -> PyTree:
    """Shards arrays over the devices along an axis, whose size must be a multiple of the number of devices."""
    return _place(tree, rows_sharding(mesh, axis))


def local_rows(mesh: Mesh, count: int) -> slice:
    """The rows of a batch of `count` that the devices of this process hold; a multiple of the number of devices."""
    each, own = count // mesh.size, len(mesh.local_devices)
    first = list(mesh.devices.flat).index(mesh.local_devices[0])
    return slice(first * each, (first + own) * each)


def shard_local(mesh: Mesh, own: Any) -> jax.Array:
    """Shards a batch of which each process has only its `local_rows`."""
    if jax.process_count() == 1:
        return jax.device_put(own, rows_sharding(mesh))
    return jax.make_array_from_process_local_data(rows_sharding(mesh), own)


def _place(tree: PyTree, sharding: NamedSharding) -> PyTree:
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    # Every process has the whole array and places its devices' part; device_put would compare the arrays of all.
    def place(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree)


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of `replicate`."""
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Returns the sharding of `shard`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def round_up(mesh: Mesh, count: int) -> int:
    """Rounds a number of examples up to a multiple of the number of devices."""
    return -(-count // mesh.size) * mesh.size
