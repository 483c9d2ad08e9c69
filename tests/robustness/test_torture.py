"""A few kills of the many that `python -m tests.robustness.torture --kills 100` makes."""

import re
import subprocess
import sys

from helpers import ROOT


def test_runs_that_are_killed_come_to_the_same_bits_and_leave_nothing():
    # In a process of its own, which forks others before JAX begins in it.
    few = ("--kills", "5", "--ways", "cached", "finetune", "--seed", "1")
    command = [sys.executable, "-m", "tests.robustness.torture", *few]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found
    assert re.search(r"^5 kills of \d runs in \d+ s; 0 of them failed\.$", found.stdout, re.MULTILINE), found
