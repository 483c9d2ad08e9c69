"""What commands set before JAX begins: how many devices the CPU is divided into, and what becomes of freed memory."""

import contextlib
import ctypes
import os
import sys

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


def keep_freed_memory() -> None:
    """Has the C library keep large blocks that are freed, where it is glibc, for the next one to ask.

    XLA:CPU asks for the memory of a call's intermediate values at its start and frees it at its end. By default glibc gives
    blocks of that size back to the system, which clears them page by page when they are asked for again: a tenth of the
    time that the features of an image take.
    """
    if not sys.platform.startswith("linux"):
        return
    # `M_MMAP_THRESHOLD`, `M_TRIM_THRESHOLD` and `M_ARENA_MAX` of malloc.h; another C library has no such function.
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-3, 2**30), (-1, 2**31 - 1), (-8, 1)):
            mallopt(option, value)
