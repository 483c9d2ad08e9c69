"""Settings that commands make before JAX starts (CPU devices, malloc, GPU determinism), and errors of devices."""

import contextlib
import ctypes
import os
import re
import shutil
import sys
from pathlib import Path

import jax

from cifar_jax.errors import did_you_mean

MAX_CPU_DEVICES = 8  # each holds a copy of the network
# Names for JAX_PLATFORMS: the device for messages, and the extra that installs its JAX plugin.
PLATFORMS = {"cuda": ("CUDA device", "cuda"), "gpu": ("CUDA device", "cuda"), "tpu": ("TPU", "tpu")}


def use_all_cores() -> None:
    """Makes each CPU core a JAX device: dividing the images between devices is faster than threads within one.

    Commands call this before JAX starts; importing the library does not. Environment variables take precedence.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Raised if JAX has already started, as in a program that calls the command; the devices then stay as they are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", min(MAX_CPU_DEVICES, cores))


def use_deterministic_algorithms() -> None:
    """Makes XLA use only deterministic algorithms on a GPU. Must be called before JAX starts.

    The flag also turns off autotuning, whose choices may differ from run to run.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a device or of Python means out of memory."""
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def out_of_memory(error: BaseException, advice: str) -> str:
    """Returns the message for an error that means out of memory, with advice in a sentence without its full stop."""
    reason = str(error).partition("\n")[0] or "no memory left on the host"
    return f"Out of memory. {advice} ({reason})."


def memory_limit(device: jax.Device) -> int | None:
    """Returns the bytes that JAX may use on a device, if it says."""
    limit: int | None = (device.memory_stats() or {}).get("bytes_limit")
    return limit


def is_device_lost(error: BaseException) -> bool:
    """Whether an error of XLA or of the CUDA or TPU driver means that a device failed or is unreachable."""
    return bool(re.match(r"(UNAVAILABLE|DATA_LOSS|ABORTED)|.*\b(CUDA_ERROR_\w+|device (is )?(lost|gone))", str(error)))


def missing_platform(error: RuntimeError | AssertionError) -> str | None:
    """Returns a message for JAX's error that it has no device for JAX_PLATFORMS; None for any other error."""
    failed = re.match(r"Unable to initialize backend '(\w+)': (.*?)( \(set JAX_PLATFORMS|$)", str(error))
    if failed is None and not _is_of_jax(error):
        return None
    asked = [name for name in os.environ.get("JAX_PLATFORMS", "").split(",") if name not in ("", "cpu")]
    name = failed[1] if failed and failed[1] in asked else (asked or ["cpu"])[0]
    # JAX's reason is left out where it only means that the plugin is not installed, as the advice covers that.
    not_installed = failed is None or re.search(r"known backends|libtpu\.so", failed[2])
    reason = "" if failed is None or not_installed else f" ({failed[2]})"
    if name in PLATFORMS:
        device, extra = PLATFORMS[name]
        install = f"pip install '.[{extra}]'"
        return f"JAX found no {device}{reason}. Run {install} in the checkout, or unset JAX_PLATFORMS."
    if not asked:
        return f"JAX cannot use the devices of this machine{reason}. Set JAX_PLATFORMS=cpu to run on the CPU."
    meant = did_you_mean(name, ["cpu", *PLATFORMS])
    return f"JAX has no platform {name!r}{reason}.{meant} Set JAX_PLATFORMS to cpu, cuda or tpu, or unset it."


def _is_of_jax(error: RuntimeError | AssertionError) -> bool:
    """Whether an assertion error is JAX failing to start, as it does for CUDA without its plugin."""
    if isinstance(error, RuntimeError):
        return False
    try:
        jax.devices()
    except AssertionError:
        return True
    return False


def accelerator() -> tuple[str, str] | None:
    """Returns the accelerator of this machine, even if JAX cannot use it, and the extra that installs its plugin."""
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        return "an NVIDIA GPU", "cuda"
    if Path("/dev/accel0").exists() or os.environ.get("TPU_NAME") or os.environ.get("TPU_ACCELERATOR_TYPE"):
        return "a TPU", "tpu"
    return None


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks for reuse.

    XLA:CPU allocates the memory of a call's intermediate values at its start and frees it at its end. By default glibc
    returns blocks of that size to the system, which clears them page by page when they are allocated again: 9 % of the
    time of extracting an image's features (four pairs of runs, ResNet50 at 224 pixels on two cores).

    Does nothing where JAX may use an accelerator: it benefits XLA:CPU only, and with a single arena the many threads
    that compile for a GPU would wait for each other.
    """
    uses_accelerator = os.environ.get("JAX_PLATFORMS", "") != "cpu" and accelerator()
    if not sys.platform.startswith("linux") or uses_accelerator:
        return
    # `M_MMAP_THRESHOLD`, `M_TRIM_THRESHOLD` and `M_ARENA_MAX` of malloc.h; other C libraries have no mallopt.
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-3, 2**30), (-1, 2**31 - 1), (-8, 1)):
            mallopt(option, value)
