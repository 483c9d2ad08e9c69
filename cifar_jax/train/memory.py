"""Advice after a training step ran out of memory: a smaller step that fits, by the compiler's own analysis."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from cifar_jax.runtime.devices import memory_limit
from cifar_jax.runtime.sharding import replicated_sharding, round_up, rows_sharding
from cifar_jax.train.loop import Advance
from cifar_jax.train.step import TrainState, TrainStep
from cifar_jax.train.task import Batch, Task

SHARE = 0.9  # of a device's memory that a step may take, as the rest is fragmented or in use


def step_bytes(train_step: TrainStep, state: TrainState, task: Task, advance: Advance, batch_size: int) -> int:
    """Bytes that a compiled training step takes on each device, all that it reads and returns included.

    Args:
      train_step: the step, not compiled.
      state: a state, of which only the shapes matter.
      task: the task that the step trains.
      advance: what runs the steps of the task, for the devices.
      batch_size: examples of the step.
    """
    mesh = advance.mesh

    def shapes(tree: PyTree) -> PyTree:
        where = replicated_sharding(mesh)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=where), tree)

    def rows(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((round_up(mesh, batch_size), *shape), dtype, sharding=rows_sharding(mesh))

    inputs: Any
    inputs, labels, resident = task.splits["train"]
    batch = Batch(rows(inputs.shape[1:], inputs.dtype), rows((), labels.dtype), rows((), jnp.float32))
    step = jax.jit(train_step, donate_argnums=0)
    compiled = step.lower(shapes(state), shapes(task.frozen), batch, advance.order.step_key).compile()
    used: Any = compiled.memory_analysis()
    kept = inputs.nbytes if resident else 0
    arguments = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    return int(kept + arguments + used.temp_size_in_bytes)


def device_bytes(device: jax.Device) -> int:
    """Memory of a device that JAX may use, in bytes; that of the host for a CPU."""
    return memory_limit(device) or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def largest_fitting(bytes_of: Callable[[int], int], size: int, limit: float, multiple: int = 1) -> int | None:
    """Returns the largest of size / 2, size / 4, ... that takes at most `limit` bytes; None if none does.

    Args:
      bytes_of: `size -> bytes`.
      size: the size that is too large.
      limit: bytes that there are.
      multiple: the sizes are multiples of it.
    """
    while (size := size // 2 // multiple * multiple) > 0:
        if bytes_of(size) <= limit:
            return size
    return None
