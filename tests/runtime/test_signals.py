"""Ctrl-C and SIGTERM: files are finished, progress is saved, the same bits after resuming; the second one kills."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import ROOT, TESTS, TINY

from cifar_jax import load_run
from cifar_jax.runs.directory import SUMMARY
from cifar_jax.runtime.signals import Signals, Terminated

# Long enough to be interrupted, short enough to finish soon.
LIVE = (*TINY, "--mode", "live", "--epochs", "3", "--batch-size", "16", "--train-examples", "400")
LIVE += ("--schedule", "constant")


def test_deferred_raises_at_the_end_of_the_block():
    done = []
    with Signals() as signals:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 (the interrupt comes in the middle of the block)
            with signals.deferred():
                signal.raise_signal(signal.SIGINT)
                done.append("the rest of the block")
            done.append("never")
        assert signals.requested == signal.SIGINT and signals.exit_code == 130
    assert done == ["the rest of the block"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_polled_raises_nothing_and_other_signals_raise_at_once():
    with Signals() as signals:
        with signals.polled():
            signal.raise_signal(signal.SIGTERM)
            with signals.deferred():
                pass
        assert signals.requested == signal.SIGTERM and signals.exit_code == 143
    with Signals(), pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_second_signal_has_its_default_effect():
    requests = []
    with Signals(on_request=lambda *request: requests.append(request)) as signals, signals.polled():
        signal.raise_signal(signal.SIGINT)
        assert requests == [(signal.SIGINT, True)] and signals.requested == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ignored_signals_stay_ignored():
    usual = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGTERM)
            assert signals.requested is None
    finally:
        signal.signal(signal.SIGTERM, usual)


# ---------------------------------------------------------------------------------------------------------------------
# Runs in separate processes


def start(out, cache, *more):
    """Starts a run with a narrow network in a separate process."""
    command = [sys.executable, TESTS / "narrow_train.py", *LIVE, "--cache-dir", cache, "--out", out, *more]
    usual = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=usual, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(happened, process, seconds=120):
    """Waits until a condition holds while the process runs."""
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


def results_of(run):
    rows = [json.loads(line) | {"seconds": 0} for line in (run / "metrics.jsonl").read_text().splitlines()]
    return rows, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(load_run(run).head_params)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(out, cache)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return results_of(out)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_run_resumes_to_identical_results(tmp_path, cache, undisturbed, number, code):
    out = tmp_path / "run"
    process = start(out, cache)
    wait_until((out / "metrics.jsonl").exists, process)  # after the first of three epochs
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == code, errors
    assert "Traceback" not in errors and f"--resume --out {out}." in errors
    summary = json.loads((out / SUMMARY).read_text())
    assert summary["status"] == "interrupted" and 1 <= summary["epochs"] < 3
    assert not [path for path in out.rglob(".*") if path.name.startswith(".")]
    again = start(out, cache, "--resume")
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert results_of(out) == undisturbed


@pytest.mark.slow
def test_second_signal_ends_the_process_and_the_run_still_resumes(tmp_path, cache, undisturbed):
    out = tmp_path / "run"
    process = start(out, cache)
    wait_until((out / "metrics.jsonl").exists, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGTERM, 130)  # 130 if the run had ended before the second one arrived
    again = start(out, cache, "--resume")
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert results_of(out) == undisturbed


@pytest.mark.slow
def test_early_sigterm_leaves_no_broken_run(tmp_path, cache):
    process = start(tmp_path / "run", cache)
    time.sleep(1.0)  # while it imports or loads
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode in (143, -signal.SIGTERM)
    assert not (tmp_path / "run").exists() or json.loads((tmp_path / "run" / SUMMARY).read_text())
