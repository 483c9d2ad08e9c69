"""Tests of data parallelism. Those for eight devices, in eight_devices.py, run in a process that has eight."""

import os
import subprocess
import sys

import jax
import pytest
from helpers import ROOT, TINY, command, is_one_error

from cifar_jax.errors import UserError
from cifar_jax.runtime.machine_info import device_description, device_rows
from cifar_jax.runtime.sharding import make_mesh


@pytest.mark.slow
def test_eight_devices_match_one():
    flags = "--xla_force_host_platform_device_count=8"
    tests = [sys.executable, "-m", "pytest", "-q", "tests/e2e/eight_devices.py"]
    done = subprocess.run(
        tests, cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_too_many_devices_are_refused_before_any_work(tmp_path, capsys):
    too_many = str(jax.local_device_count() + 1)
    result = command(capsys, "train", *TINY, "--devices", too_many, "--out", tmp_path / "out")
    is_one_error(result, 2, "--devices must be at most ", f"got {too_many}", "JAX_NUM_CPU_DEVICES")
    is_one_error(command(capsys, "train", *TINY, "--devices", "0"), 2, "--devices must be at least 1, got 0.")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--devices must be at most"):
        make_mesh(int(too_many))


def test_training_uses_one_cpu_device_by_default():
    assert make_mesh(None).size == make_mesh().size == 1
    rows = device_rows()
    assert len(rows) == jax.device_count() and [row["training"] for row in rows].count("yes") == 1
    assert rows[0]["platform"] == "cpu" and device_description().startswith("cpu (")
