"""Whole commands: what a process takes from its start to its end."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Usage(NamedTuple):
    """What a process took."""

    seconds: float
    peak_gb: float  # of resident memory, 1e9 bytes


def run_command(arguments: list[str], environment: Mapping[str, str], log: Path) -> Usage:
    """Runs `python ARGUMENTS` in the checkout.

    Args:
      arguments: of Python.
      environment: what is added to this process's.
      log: a file for what it writes.

    Raises:
      RuntimeError: when it fails, with the end of what it wrote.
    """
    start = time.perf_counter()
    with open(log, "w", encoding="utf-8") as out:
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=out, stderr=out)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        written = log.read_text(encoding="utf-8")[-2000:]
        raise RuntimeError(f"python {' '.join(arguments)} failed with exit code {process.returncode}:\n{written}")
    # What the process was copied from counts as well, so the one that runs this should be small. Linux counts in KiB.
    scale = 1 if sys.platform == "darwin" else 1024
    return Usage(seconds, usage.ru_maxrss * scale / 1e9)
