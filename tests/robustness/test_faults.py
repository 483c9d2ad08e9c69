"""What goes wrong while a run goes on, provoked for real where that can be: directories, disks, clocks, devices."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    FIELDS,
    ROOT,
    SMALL_JOB,
    TINY,
    Disturbance,
    command,
    files_below,
    flip_bit,
    full_disk,
    is_one_error,
    rows_of,
    summary_of,
)

from cifar_jax import load_run
from cifar_jax.cli.console import ConsoleReporter
from cifar_jax.config import TrainConfig
from cifar_jax.data import Dataset, Splits
from cifar_jax.data.splits import make_data
from cifar_jax.errors import RunError, UserError
from cifar_jax.experiment import train
from cifar_jax.features import extraction, extractor as features
from cifar_jax.features.extractor import make_extractor
from cifar_jax.models.backbone import FunctionBackbone
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained import random_backbone
from cifar_jax.runs.directory import CHECKPOINTS, METRICS, claimed
from cifar_jax.train.load_inputs import warn_of_shared_images

pytestmark = pytest.mark.usefixtures("narrow")


def config(tmp_path, **more):
    usual = {
        **SMALL_JOB,
        "cache_dir": str(tmp_path / "cache"),
        "out": str(tmp_path / "run"),
    }
    return TrainConfig(**usual | more)


# ---------------------------------------------------------------------------------------------------------------------
# Directories and disks


def test_a_second_run_in_the_same_directory_is_refused_while_the_first_one_writes(tmp_path, capsys):
    out, ready = tmp_path / "run", tmp_path / "ready"
    code = f"""
import sys, time, pathlib
from cifar_jax.runs.directory import claimed
with claimed(pathlib.Path({str(out)!r})):
    pathlib.Path({str(ready)!r}).touch()
    sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE)
    try:
        while not ready.exists():
            assert other.poll() is None
            time.sleep(0.01)
        result = command(capsys, "train", *TINY, "--epochs", 1, "--out", out)
        is_one_error(result, 2, f"Another process is writing the run in {out}", "wait for it, or choose another --out")
        assert files_below(out) == []
    finally:
        other.kill()  # as kill -9 does, which leaves no lock behind
        other.communicate()
    assert command(capsys, "train", *TINY, "--epochs", 1, "--out", out).code == 0


def test_a_directory_that_is_removed_during_the_run_fails_it_and_is_not_made_again(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RunError, match=r"No such file or directory.*choose another --out"):
        train(config(tmp_path), Disturbance(lambda: shutil.rmtree(out), epoch=1), backbone=FIELDS)
    assert not out.exists()


def test_a_read_only_directory_is_refused_to_whom_it_is_read_only(tmp_path):
    """Nothing is read-only to root, so the command runs as nobody where the tests run as root."""
    (tmp_path / "closed").mkdir()
    tmp_path.chmod(0o755)
    (tmp_path / "closed").chmod(0o555)
    out = tmp_path / "closed" / "run"
    code = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}]
from cifar_jax.cli.main import main
import cifar_jax.experiment, tyro  # before the rights to read them go
if os.geteuid() == 0:
    os.setuid(65534)
sys.exit(main(["train", "--preset", "demo", "--out", {str(out)!r}]))
"""
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o111)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 2 and "read-only; choose another directory" in found.stderr, found
    assert "Traceback" not in found.stderr and files_below(tmp_path / "closed") == []


def test_a_disk_that_fills_up_in_the_midst_of_a_run_fails_it_and_more_room_continues_it(tmp_path):
    plain = config(tmp_path, resume=True)
    undisturbed = rows_of(train(replace(plain, out=str(tmp_path / "undisturbed")), backbone=FIELDS))
    run = tmp_path / "run"
    # Room for the lines of metrics.jsonl, but neither for a checkpoint nor for the summary.
    with contextlib.ExitStack() as fault, pytest.raises(RunError, match=r"0002 could not be written .*Free some space"):
        train(plain, Disturbance(lambda: fault.enter_context(full_disk(at=1000)), epoch=1), backbone=FIELDS)
    assert [path.name for path in (run / CHECKPOINTS).iterdir()] == ["0001"]
    with pytest.raises(UserError, match=r"has not ended: .* continue it with --resume"):
        load_run(run, backbone=FIELDS)
    assert rows_of(train(plain, backbone=FIELDS)) == undisturbed


def test_a_clock_that_jumps_back_changes_nothing(tmp_path, monkeypatch):
    """Seconds are counted by a clock that cannot; the times of files in the cache may lie ahead of it."""
    plain = config(tmp_path)
    first = rows_of(train(plain, backbone=FIELDS))
    ahead = time.time() + 10 * 365 * 86400
    for path in (tmp_path / "cache").rglob("*"):
        os.utime(path, (ahead, ahead))
    monkeypatch.setattr(time, "time", lambda: 1.0)
    run = train(replace(plain, out=str(tmp_path / "again"), cache_limit=0.0), backbone=FIELDS)
    assert rows_of(run) == first
    assert all(row["seconds"] >= 0 for row in map(json.loads, (run / METRICS).read_text().splitlines()))
    assert all(seconds >= 0 for seconds in summary_of(run)["seconds"].values())


def test_a_flipped_bit_in_a_chunk_of_features_is_reported_and_changes_nothing(tmp_path, log_messages):
    plain = config(tmp_path)
    first = rows_of(train(plain, backbone=FIELDS))
    chunks = [path for path in (tmp_path / "cache" / "features").glob("*/c/*/*") if path.is_file()]
    flip_bit(chunks[0])
    assert rows_of(train(replace(plain, out=str(tmp_path / "again")), backbone=FIELDS)) == first
    assert sum("The cache is corrupt" in text for text in log_messages) == 1


def test_the_lock_goes_with_the_block_and_so_does_a_directory_that_holds_nothing(tmp_path):
    with claimed(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    with claimed(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    with claimed(tmp_path / "run"):
        pass
    assert files_below(tmp_path) == ["run", "run/file"]


# ---------------------------------------------------------------------------------------------------------------------
# Devices: by injection, as a CPU neither runs out of device memory nor goes away


def failing(monkeypatch, happens):
    """Has the compiled extraction do what `happens(images)` does before it runs."""
    usual = features.features_of

    def jitted(function, *args, **more):
        compiled = jax.jit(function, *args, **more)
        if function is not usual:
            return compiled

        def run(prepared, images):
            happens(images)
            return compiled(prepared, images)

        return run

    class Jax:
        jit = staticmethod(jitted)

        def __getattr__(self, name):
            return getattr(jax, name)

    monkeypatch.setattr(features, "jax", Jax())


@pytest.fixture(scope="module")
def backbone(shapes):
    return random_backbone(jax.random.key(0), shapes.images[:64], ResNetConfig(stage_sizes=(1, 1), width=4), 32)


def test_extraction_goes_on_with_half_as_many_images_where_the_memory_is_too_small(
    monkeypatch, backbone, shapes, log_messages
):
    expected, sizes = make_extractor(backbone)(shapes.images), []

    def too_small(images):
        sizes.append(len(images))
        if len(images) > 20:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.")

    failing(monkeypatch, too_small)
    extractor, done = make_extractor(backbone, batch_size=64), []
    np.testing.assert_allclose(extractor(shapes.images, done.append), expected, rtol=1e-5, atol=1e-6)
    assert sizes[:3] == [64, 32, 16] and set(sizes[2:]) == {16} and done[-1] == len(shapes.images)
    assert log_messages[0] == (
        "Out of memory at batch size 64; retrying with 32, which may change the last bits of features. Pass "
        "--extract-batch-size 32 to start there."
    )
    assert len(log_messages) == 2
    extractor(shapes.images[:30])
    assert len(log_messages) == 2 and sizes[-1] == 16  # it is remembered


def test_features_that_were_made_before_the_memory_was_full_are_kept(monkeypatch, backbone, shapes, log_messages):
    calls, done = [], []

    def later(images):
        calls.append(len(images))
        if len(calls) == 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    failing(monkeypatch, later)
    extractor = make_extractor(backbone, batch_size=16)
    monkeypatch.undo()
    np.testing.assert_allclose(
        extractor(shapes.images, done.append), make_extractor(backbone)(shapes.images), rtol=1e-5
    )
    assert len(log_messages) == 1 and calls[:5] == [16, 16, 16, 16, 8] and done[:3] == [16, 24, 32]


@pytest.mark.parametrize(
    ("message", "part"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.",
            "Out of memory. Start again with --batch-size",
        ),
        (
            "INTERNAL: CUDA_ERROR_ECC_UNCORRECTABLE: the device is lost",
            "Device lost. Continue with --resume",
        ),
        ("UNAVAILABLE: The TPU worker was preempted", "Continue with --resume --out DIR"),
    ],
)
def test_a_device_that_fails_ends_the_run_in_one_sentence(tmp_path, capsys, monkeypatch, message, part):
    def fail(*_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(ConsoleReporter, "epoch", fail)
    out = tmp_path / "run"
    is_one_error(command(capsys, "train", *TINY, "--epochs", 1, "--out", out), 1, part, message)
    assert summary_of(out)["status"] == "failed"


def test_a_device_that_is_lost_during_extraction_is_not_taken_for_a_full_one(monkeypatch, backbone, shapes):
    def lost(images):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: device is gone")

    failing(monkeypatch, lost)
    with pytest.raises(jax.errors.JaxRuntimeError, match="device is gone"):
        make_extractor(backbone)(shapes.images)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_a_backbone_that_is_dead_is_noticed(tmp_path, shapes):
    dead = FunctionBackbone(lambda _, images: jnp.ones((len(images), 32)), {}, "a constant")
    with pytest.raises(RunError, match="constant gives the same features for all training images: the network is dead"):
        extraction.dataset_features(config(tmp_path), dead, 32, {"training images": shapes})


def test_images_that_are_all_the_same_have_the_same_features(tmp_path, backbone):
    same = Dataset(np.full((5, 32, 32, 3), 7, np.uint8), np.zeros(5, np.int32))
    found = extraction.dataset_features(config(tmp_path), backbone, 32, {"some images": same})
    assert found.features["some images"].shape == (5, backbone.config.features)


def test_validation_images_that_are_training_images_are_warned_of(shapes, caplog):
    train, test = shapes.take(np.arange(60)), shapes.take(np.arange(53, 73))
    data = make_data(train, test, Splits(train, test, (), "some", "1.0.0"))
    warn_of_shared_images(data)
    assert caplog.messages == ["7 of 20 test images are identical to training images, so accuracy on them says little."]


def test_debug_stops_at_the_first_nan(tmp_path, capsys):
    arguments = ["train", *TINY, "--mode", "live", "--learning-rate", "1e30", "--out", str(tmp_path / "run")]
    try:
        with pytest.raises((FloatingPointError, RunError)):
            command(capsys, *arguments, "--debug")
    finally:
        jax.config.update("jax_debug_nans", False)
