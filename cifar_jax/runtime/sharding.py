"""Data parallelism: the devices of a run as a mesh of one axis, and how arrays lie on them.

No compiled function here knows of devices, as computation follows its data: parameters and cached features lie whole on
every device, the examples of a step are divided between them, and XLA puts in the sums over the batch: those of the
gradients and metrics, and where BatchNorm normalises by the batch those of its statistics.
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
    """The devices of a run in one row.

    Args:
      devices: how many of each process; all if None, but on a CPU, whose devices share its cores, one.

    Raises:
      UserError: when there are fewer.
    """
    here = jax.local_devices()
    platform = here[0].platform
    if devices is None:
        devices = 1 if platform == "cpu" else len(here)
    if devices > len(here):
        how = "; set JAX_NUM_CPU_DEVICES to divide the CPU into more" if platform == "cpu" else ""
        raise UserError(
            f"--devices must be at most {len(here)}, the {platform} devices of JAX here, got {devices}{how}."
        )
    of_process = [[d for d in jax.devices() if d.process_index == process] for process in range(jax.process_count())]
    return mesh_of([device for theirs in of_process for device in theirs[:devices]])


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    """Devices in one row."""
    return Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
    """The arrays, whole on every device. Those that lie so already stay where they are."""
    return _place(tree, replicated_sharding(mesh))


def shard(mesh: Mesh, tree: PyTree, axis: int = 0) -> PyTree:
    """The arrays, divided between the devices along an axis, whose size must be a multiple of their number."""
    return _place(tree, rows_sharding(mesh, axis))


def _place(tree: PyTree, sharding: NamedSharding) -> PyTree:
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    # Every process has the whole array, and places what its devices need of it; device_put would compare them all.
    def place(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree)


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """How `replicate` places arrays."""
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """How `shard` divides arrays."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def round_up(mesh: Mesh, count: int) -> int:
    """The number of examples that `count` are filled up to, so that they can be divided between the devices."""
    return -(-count // mesh.size) * mesh.size


def device_rows() -> list[dict[str, str]]:
    """Every device, for people, and whether training uses it unless --devices says otherwise."""
    used = set(make_mesh(None).devices.flat)
    return [
        {
            "device": str(device.id),
            "platform": device.platform,
            "kind": device.device_kind,
            "process": str(device.process_index),
            "memory": _memory(device),
            "training": "yes" if device in used else "no",
        }
        for device in jax.devices()
    ]


def _memory(device: jax.Device) -> str:
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.process_index == jax.process_index() else None
    return f"{limit / 2**30:.1f} GiB" if limit else ""
