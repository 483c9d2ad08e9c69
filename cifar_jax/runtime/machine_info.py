"""The environment of a run: versions, devices, settings, and a warning about an unused accelerator."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from cifar_jax.runtime.devices import accelerator, memory_limit
from cifar_jax.runtime.sharding import make_mesh
from cifar_jax.version import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "safetensors", "tensorflow-datasets", "numpy")

FAULTY_JAXLIB = "0.10.2"


def package_versions() -> dict[str, str]:
    """Returns the versions of this project, Python, and the packages that the results depend on."""
    versions = {"cifar-jax": __version__, "python": platform.python_version()}
    return versions | {name: _version(name) for name in PACKAGES}


def known_fault() -> str:
    """Returns a warning about the installed jaxlib, if it is known to compute wrongly on this machine; else ''."""
    version = _version("jaxlib")
    if version != FAULTY_JAXLIB or jax.default_backend() != "cpu":
        return ""
    return (
        f"jaxlib {version} computes some sums over more than 32,768 rows wrongly on a CPU (jax-ml/jax#39103). No "
        "result of this program was found to be affected; XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= avoids it."
    )


def device_description(used: int | None = None) -> str:
    """Describes the devices and how many of them are used: `tpu (TPU v5 lite), 8 of 8 devices`."""
    devices = jax.devices()
    kind = f"{_processor()}, {os.cpu_count()} cores" if devices[0].platform == "cpu" else devices[0].device_kind
    share = f", {used} of" if used else ","
    return f"{devices[0].platform} ({kind})" + (f"{share} {len(devices)} devices" if len(devices) > 1 else "")


def device_rows() -> list[dict[str, str]]:
    """Returns a row for every device, with whether training uses it by default."""
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
    limit = memory_limit(device)
    return f"{limit / 2**30:.1f} GiB" if limit else ""


def settings() -> dict[str, Any]:
    """Returns what else affects results to the last bit: JAX's environment variables and this checkout's commit."""
    names = ("XLA_", "JAX_", "LIBTPU_", "NVIDIA_TF32")
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(names)}
    return {"variables": variables, "commit": _commit(Path(__file__).parents[2])}


def _commit(checkout: Path) -> str | None:
    """Returns the commit of a checkout, with `-dirty` if files were changed; None if it is not a Git checkout."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def unused_accelerator() -> str | None:
    """Returns a warning if this machine has an accelerator that JAX does not use, else None."""
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return None
    if (found := accelerator()) is None:
        return None
    kind, extra = found
    return (
        f"This machine has {kind}, but JAX runs on the CPU. Run `pip install '.[{extra}]'` in the checkout to use it, "
        "or set JAX_PLATFORMS=cpu to silence this warning."
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
