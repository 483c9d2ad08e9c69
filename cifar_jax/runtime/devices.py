"""What commands set before JAX begins: devices of a CPU, freed memory, algorithms of a GPU; and what devices say."""

import contextlib
import ctypes
import os
import re
import shutil
import sys
from pathlib import Path

import jax

from cifar_jax.errors import did_you_mean

MOST = 8  # each holds a copy of the network
# Platforms that JAX_PLATFORMS may name: what they are called, and the extra that brings the JAX for them.
PLATFORMS = {"cuda": ("CUDA device", "cuda"), "gpu": ("CUDA device", "cuda"), "tpu": ("TPU", "tpu")}


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


def use_deterministic_algorithms() -> None:
    """Has XLA take only algorithms on a GPU that give the same bits every time; to be called before JAX begins.

    The flag also turns off its search for the fastest ones, whose choice may be another one each time.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what a device, or Python, says."""
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def is_gone(error: BaseException) -> bool:
    """Whether a device failed or cannot be reached any more, as XLA and the drivers of CUDA and TPU say it."""
    return bool(re.match(r"(UNAVAILABLE|DATA_LOSS|ABORTED)|.*\b(CUDA_ERROR_\w+|device (is )?(lost|gone))", str(error)))


def missing_platform(error: RuntimeError | AssertionError) -> str | None:
    """A sentence on why JAX finds no device of what JAX_PLATFORMS names; None for any other error."""
    failed = re.match(r"Unable to initialize backend '(\w+)': (.*?)( \(set JAX_PLATFORMS|$)", str(error))
    if failed is None and not _is_of_jax(error):
        return None
    asked = [name for name in os.environ.get("JAX_PLATFORMS", "").split(",") if name not in ("", "cpu")]
    name = failed[1] if failed and failed[1] in asked else (asked or ["cpu"])[0]
    # That the JAX for a platform is not installed, the advice says in plain words.
    told = failed is None or re.search(r"known backends|libtpu\.so", failed[2])
    reason = "" if failed is None or told else f" ({failed[2]})"
    if name in PLATFORMS:
        device, extra = PLATFORMS[name]
        install = f"pip install '.[{extra}]'"
        return f"JAX finds no {device} here{reason}. Run {install} in the checkout, or unset JAX_PLATFORMS."
    if not asked:
        return f"JAX cannot use the devices of this machine{reason}. Set JAX_PLATFORMS=cpu to do without them."
    meant = did_you_mean(name, ["cpu", *PLATFORMS])
    return f"JAX knows no platform {name!r} here{reason}.{meant} Set JAX_PLATFORMS to cpu, cuda or tpu, or unset it."


def _is_of_jax(error: RuntimeError | AssertionError) -> bool:
    """Whether JAX fails to begin, which for CUDA without its plugin is a bare assertion."""
    if isinstance(error, RuntimeError):
        return False
    try:
        jax.devices()
    except AssertionError:
        return True
    return False


def accelerator() -> tuple[str, str] | None:
    """An accelerator of this machine, whether JAX can use it or not, and the extra that brings the JAX for it."""
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        return "an NVIDIA GPU", "cuda"
    if Path("/dev/accel0").exists() or os.environ.get("TPU_NAME") or os.environ.get("TPU_ACCELERATOR_TYPE"):
        return "a TPU", "tpu"
    return None


def keep_freed_memory() -> None:
    """Has the C library keep large blocks that are freed, where it is glibc, for the next one to ask.

    XLA:CPU asks for the memory of a call's intermediate values at its start and frees it at its end. By default glibc
    gives blocks of that size back to the system, which clears them page by page when they are asked for again: 9 % of
    the time that the features of an image take (four pairs of runs, ResNet50 at 224 pixels on two cores).

    Does nothing where JAX may use an accelerator: what it does serves XLA:CPU alone, and with the one arena that it
    leaves the many threads that compile for a GPU would wait for each other.
    """
    uses_accelerator = os.environ.get("JAX_PLATFORMS", "") != "cpu" and accelerator()
    if not sys.platform.startswith("linux") or uses_accelerator:
        return
    # `M_MMAP_THRESHOLD`, `M_TRIM_THRESHOLD` and `M_ARENA_MAX` of malloc.h; another C library has no such function.
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-3, 2**30), (-1, 2**31 - 1), (-8, 1)):
            mallopt(option, value)
