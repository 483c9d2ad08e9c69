"""What the figures were measured on, and when."""

import datetime
import importlib.metadata
import os
import shutil
import subprocess
from typing import Any

from benchmarks.processes import ROOT

PEERS = ("keras", "tensorflow-cpu", "torch", "torchvision", "onnxruntime")


def describe() -> dict[str, Any]:
    """The machine and the versions of what runs; of a library that is not there nothing is said."""
    from cifar_jax.runtime.machine_info import device_description, package_versions

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": device_description(),
        "gpu": gpu_name(),
        "memory_gb": round(memory / 1e9),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "packages": package_versions() | {name: version for name in PEERS if (version := version_of(name))},
    }


def version_of(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, `-dirty` behind it where files differ, or None outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def gpu_name() -> str | None:
    """What the first NVIDIA GPU is called, or None where there is none."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def has_compiler() -> bool:
    """Whether there is the C++ compiler that `torch.compile` needs on a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
