"""The parent of a process explains its end, passes signals on, and takes it along."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from cifar_jax.runtime.supervisor import explained_end

JOINED = "cifar_jax joined"
FATAL = "F1127 11:56:10 546 client.h:80] Terminating process because the JAX distributed service detected fatal errors."
UNHEALTHY = (
    "E1127 [service.cc] UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n2\n3\nThe tasks"
)


@pytest.mark.parametrize(
    ("code", "logs", "expected"),
    [
        (0, "", (0, "")),
        (2, "anything", (2, "")),
        (-signal.SIGABRT, FATAL, (1, "Process 1 waited for the others in vain.")),
        (-signal.SIGABRT, f"{JOINED}\n{FATAL}", (1, "Process 0 of this run was lost.")),
        (-signal.SIGABRT, f"{JOINED}\n{UNHEALTHY}\n{FATAL}", (1, "Process 2, 3 of this run was lost.")),
        (-signal.SIGABRT, f"{FATAL}\ncifar_jax ended with 2\n", (2, "")),
        (
            -signal.SIGABRT,
            "F1127 12:00:00 1 a.cc:3] Check failed: x > 0",
            (1, "Process 1 was ended by SIGABRT (Check failed: x > 0)."),
        ),
        (-signal.SIGTERM, "", (143, "")),
        (-signal.SIGSEGV, "Fatal: address", (1, "Process 1 was ended by SIGSEGV (Fatal: address).")),
        (-signal.SIGKILL, "", (1, "Process 1 was killed by SIGKILL, perhaps as memory ran out.")),
    ],
)
def test_the_parent_explains_an_end_by_a_signal(code, logs, expected):
    found, sentence = explained_end(code, logs, "1")
    assert found == expected[0] and expected[1] in (sentence or "") and bool(sentence) == bool(expected[1])


CHILD = """
import os, signal, sys, time
from cifar_jax.runtime.supervisor import supervise
supervise()
print(os.getpid(), flush=True)
print("shown", file=sys.stderr)
os.write(2, b"a log of C++\\n")
{then}
"""


def supervised(tmp_path, then):
    (tmp_path / "program.py").write_text(CHILD.format(then=then))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PROCESS_ID": "1"}
    return subprocess.Popen([sys.executable, tmp_path / "program.py"], env=environment, stdout=-1, stderr=-1, text=True)


@pytest.mark.parametrize(
    ("then", "code", "sentence"),
    [
        ("sys.exit(3)", 3, ""),
        ("os.abort()", 1, "Error: Process 1 was ended by SIGABRT (a log of C++)."),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "Error: Process 1 was killed by SIGKILL"),
    ],
)
def test_a_supervised_process_ends_with_a_code_and_a_sentence(tmp_path, then, code, sentence):
    process = supervised(tmp_path, then)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and err.startswith(f"shown\n{sentence}") and err.count("\n") == 1 + bool(sentence)


def test_a_signal_is_passed_on(tmp_path):
    with supervised(tmp_path, "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); time.sleep(30)") as process:
        process.stdout.readline()
        process.terminate()
        assert process.wait(10) == 143


def test_the_child_ends_with_its_parent(tmp_path):
    with supervised(tmp_path, "time.sleep(30)") as process:
        process.stdout.readline()
        began = time.monotonic()
        process.kill()
        assert process.stdout.read() == "" and time.monotonic() - began < 10  # the child has closed it
