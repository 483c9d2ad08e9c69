"""Two processes on one machine: the run that one of them would make, written once."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from e2e.two_processes import JOB
from helpers import ROOT, TESTS, command, is_one_error, narrow_networks, without_pictures, write_pictures_folder

from cifar_jax import load_run
from cifar_jax.cli.main import main
from cifar_jax.runs.checkpoint import list_checkpoints
from cifar_jax.runs.directory import CHECKPOINTS, CONTENTS


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def start_two(*arguments):
    """Two processes that are told of each other."""
    address = f"localhost:{free_port()}"
    usual = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=usual
            | {"PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
            | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(own)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in (0, 1)
    ]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The directory in which two processes trained, and the output of each."""
    directory = tmp_path_factory.mktemp("together")
    processes = start_two(TESTS / "e2e" / "two_processes.py", directory)
    written = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [2, 2], written
    return directory, written


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same two epochs in one process."""
    directory = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        narrow_networks(patch)
        without_pictures(patch)
        arguments = ["train", *JOB, str(directory / "cache"), "--epochs", "2", "--out", str(directory / "run")]
        assert main(arguments) == 0
        return directory / "run", jax.tree.leaves(load_run(directory / "run").head_params)


def rows_of(run):
    rows = [json.loads(line) | {"seconds": 0} for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row.pop("val_split") for row in rows} == {"test"}
    return rows


def test_processes_agree(together):
    directory, _ = together
    for own in (0, 1):
        found = json.loads((directory / f"process{own}.json").read_text())
        assert found["count"] == 2 and found["value"] == {"process": 0} and found["error"] == "No."
        assert "differ in weights;" in found["differ"]
        assert found["share"] == (4, 3)[own] and found["gathered"] and found["arrays"] == [0, 0]
        assert found["codes"] == [0, 0]


def test_both_processes_have_the_parameters_of_a_single_one(together, alone):
    directory, _ = together
    first, second = (np.load(directory / f"process{own}.npz") for own in (0, 1))
    for name, expected in zip(first.files, alone[1], strict=True):
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], expected, rtol=1e-5, atol=1e-7)
    for ours, expected in zip(rows_of(directory / "run"), rows_of(alone[0]), strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)


def test_the_run_is_written_once(together):
    directory, written = together
    no_pictures = {"samples.png", "test_predictions.png", "test_confusion.png"}
    assert {path.name for path in (directory / "run").iterdir()} == set(CONTENTS) - no_pictures
    assert [path.name for path in list_checkpoints(directory / "run" / CHECKPOINTS)] == ["0001", "0002"]
    summary = json.loads((directory / "run" / "summary.json").read_text())
    assert summary["status"] == "complete" and summary["num_train"] == 127
    assert summary["device"].endswith("2 of 2 devices")
    (out, _), (other_out, other_err) = written
    assert "epoch 2/2" in out and "epoch" not in other_out
    lines = [line for line in other_err.splitlines() if "Gloo" not in line]
    assert len(lines) == 1 and "already holds a run" in lines[0], other_err


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGTERM, [143, 143]), (signal.SIGINT, [143, 130])])
def test_signal_to_one_process_ends_both_and_the_resumed_run_is_identical(tmp_path, number, codes):
    """The signal goes to the process that writes nothing."""
    train = [TESTS / "narrow_train.py", *JOB, tmp_path / "cache", "--mode", "live", "--epochs", "20"]
    for process in start_two(*train, "--out", tmp_path / "undisturbed"):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    run = tmp_path / "run"
    processes = start_two(*train, "--out", run)
    while not (run / "metrics.jsonl").exists():
        assert [process.poll() for process in processes] == [None, None], [p.communicate() for p in processes]
        time.sleep(0.01)
    processes[1].send_signal(number)
    written = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == codes, written
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "interrupted" and 1 <= summary["epochs"] < 20
    for process in start_two(*train, "--out", run, "--resume"):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert rows_of(run) == rows_of(tmp_path / "undisturbed")
    kept = [load_run(path).head_params for path in (run, tmp_path / "undisturbed")]
    for ours, expected in zip(*map(jax.tree.leaves, kept), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1"}, ["$JAX_NUM_PROCESSES", "set "]),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, ["$JAX_COORDINATOR_ADDRESS is not; set it too"]),
        (
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            ["cannot join the others", "two", "check $JAX_COORDINATOR_ADDRESS"],
        ),
    ],
)
def test_incomplete_or_invalid_variables_are_refused(monkeypatch, capsys, variables, parts):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    is_one_error(command(capsys, "train", *JOB, "unused"), 2, *parts)


@pytest.mark.parametrize("mode", ["cached", "finetune"])
def test_two_processes_train_on_a_folder_of_pictures_as_one_does(tmp_path, mode):
    """Each decodes its share. The last batch of an epoch is not full, and the processes' shares are not equal."""
    pets = write_pictures_folder(tmp_path / "pets", {"cats": 29, "dogs": 20})
    options = ["--dataset", pets, "--weights", "random-w16", "--image-size", "32", "--hidden", "8", "--epochs", "2"]
    augmented = ["--augment", "flip"] if mode != "cached" else []
    job = [TESTS / "narrow_train.py", *options, "--batch-size", "16", "--mode", mode, *augmented, "--cache-dir"]
    for process in start_two(*job, tmp_path / "caches", "--out", tmp_path / "together"):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    with pytest.MonkeyPatch.context() as patch:
        narrow_networks(patch)
        without_pictures(patch)
        own = ["--out", str(tmp_path / "alone")]
        assert main(["train", *map(str, job[1:]), str(tmp_path / "cache"), *own]) == 0
    for ours, expected in zip(rows_of(tmp_path / "together"), rows_of(tmp_path / "alone"), strict=True):
        assert ours == pytest.approx(expected, rel=1e-3)
    heads = [load_run(tmp_path / name).head_params for name in ("together", "alone")]
    for ours, expected in zip(*map(jax.tree.leaves, heads), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)
