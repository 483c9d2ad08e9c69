"""Devices before JAX has any: how many the CPU is divided into."""

import contextlib
import os

import jax

MOST = 8  # each holds a copy of the network


def use_all_cores() -> None:
    """Makes a device of each core of a CPU, so that images can be divided between them, which is faster than sharing.

    For commands, before JAX begins; importing the library does not. What the environment says goes first.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Refused where JAX has begun, as where another program calls the command, which goes on with what there is.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", min(MOST, cores))
