"""Two processes of a run, of which one fails or is killed: both end soon, each with one line."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from e2e.test_distributed import start_two
from e2e.two_processes import JOB
from helpers import TESTS

SECONDS = 30  # within which both end


def ends(processes, since):
    """Waits for processes; returns exit codes, lines of stderr, and the seconds until the last one ended."""
    written = [process.communicate(timeout=120) for process in processes]
    seconds = time.monotonic() - since
    usual = ("Warning: ", "This job will take")
    lines = [[line for line in err.splitlines() if not line.startswith(usual)] for _, err in written]
    return [process.returncode for process in processes], lines, seconds


@pytest.mark.parametrize(
    ("phase", "failing"),
    [
        ("load", 0),
        ("load", 1),
        ("extraction", 0),
        ("extraction", 1),
        ("checkpoint", 0),
        ("evaluation", 1),
        ("figures", 0),
    ],
)
def test_an_error_in_one_process_ends_both_with_its_reason(tmp_path, phase, failing, record_property):
    started = time.monotonic()
    processes = start_two(
        TESTS / "e2e" / "failing_train.py", phase, failing, *JOB, tmp_path / "cache", "--out", tmp_path / "run"
    )
    codes, lines, seconds = ends(processes, started)
    record_property("seconds", seconds)
    assert codes == [1, 1], lines
    assert lines[failing] == ["Error: The disk is full."]
    assert lines[1 - failing] == [f"Error: Process {failing} failed: The disk is full."]
    assert seconds < SECONDS + 30  # the start of JAX included


def while_training(tmp_path):
    """Starts two processes that train for long, and waits until the first epoch is saved."""
    run = tmp_path / "run"
    processes = start_two(
        TESTS / "narrow_train.py", *JOB, tmp_path / "cache", "--mode", "live", "--epochs", "500", "--out", run
    )
    while not (run / "metrics.jsonl").exists():
        assert [process.poll() for process in processes] == [None, None], [p.communicate() for p in processes]
        time.sleep(0.05)
    return run, processes


def children(process):
    return map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())


@pytest.mark.parametrize("whole", [True, False], ids=["machine", "process"])
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_named_and_the_run_continues(tmp_path, killed, whole, record_property):
    run, processes = while_training(tmp_path)
    since = time.monotonic()
    if whole:  # as if the machine were gone
        processes[killed].kill()
    else:  # as where the system is out of memory
        for child in children(processes[killed]):
            os.kill(child, signal.SIGKILL)
    codes, lines, seconds = ends(processes, since)
    record_property("seconds", seconds)
    assert codes[1 - killed] == 1 and seconds < SECONDS, lines
    assert len(lines[1 - killed]) == 1, lines
    assert lines[1 - killed][0].startswith(f"Error: Process {killed} of this run was lost."), lines
    assert "--resume --out DIR" in lines[1 - killed][0]
    if not whole:
        assert codes[killed] == 1 and lines[killed][0].startswith(f"Error: Process {killed} was killed by SIGKILL")
        return
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = str(len(rows) + 2)
    again = start_two(
        TESTS / "narrow_train.py",
        *JOB,
        tmp_path / "cache",
        "--mode",
        "live",
        "--epochs",
        epochs,
        "--out",
        run,
        "--resume",
    )
    codes, lines, _ = ends(again, since)
    assert codes == [0, 0], lines


def test_a_corrupt_cache_in_one_process_is_mended(tmp_path):
    job = (TESTS / "narrow_train.py", *JOB, tmp_path / "cache", "--epochs", 1, "--out")
    assert ends(start_two(*job, tmp_path / "first"), 0)[0] == [0, 0]
    chunks = sorted(path for path in (tmp_path / "cache").rglob("c/*/0") if path.is_file())
    chunks[0].write_bytes(chunks[0].read_bytes()[:-1])
    codes, lines, _ = ends(start_two(*job, tmp_path / "second"), 0)
    assert codes == [0, 0], lines
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("first", "second"))
    assert first["val_loss"] == second["val_loss"]
