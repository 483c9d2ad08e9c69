"""Kills runs, goes on with them, and compares what comes out: `python -m tests.robustness.torture --kills 100`.

Each run works in a directory and a cache of its own. It is killed, by SIGKILL, once it has come to a phase drawn at
random and after a share of the time, drawn at random, that this phase takes; then the same command goes on with it, and
is killed again, until it comes to its end. Parameters and metrics must then be those of a run that nothing disturbed,
to the bit, and no file may be left that such a run does not have.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
import safetensors.numpy
import tensorstore

from cifar_jax.cli.main import main as command_line
from cifar_jax.files import sha256_of_file
from cifar_jax.report import plots
from cifar_jax.runs.checkpoint import list_checkpoints, newest_whole
from cifar_jax.runs.directory import BACKBONE, CHECKPOINTS, METRICS, SUMMARY
from cifar_jax.runs.writer import RunWriter
from cifar_jax.runtime.timing import Clock
from tests.helpers import forwarding_logs, narrow_networks

# Imported for the processes that are forked from this one, none of which then takes seconds to begin. JAX itself is not
# begun in this one: its threads would not be there in the others.
IMPORTED = (jax, safetensors.numpy, tensorstore, plots)

JOB = (
    *("--dataset", "shapes", "--weights", "random-w16", "--image-size", "32", "--hidden", "8", "--batch-size", "32"),
    *("--train-examples", "4000", "--test-examples", "100", "--epochs", "3", "--momentum", "0.9", "--no-progress"),
    *("--learning-rate", "0.05", "--val-fraction", "0.1", "--checkpoint-every", "20"),
)
WAYS = {
    "cached": (),
    "live": ("--mode", "live", "--augment", "flip", "crop"),
    "finetune": ("--mode", "finetune", "--augment", "flip", "crop", "--schedule", "cosine", "--freeze-stages", "1"),
}
# Data and weights are read before the run directory is made; all else is where a kill could do harm.
PHASES = ("weights", "data", "start", "features", "training", "checkpoint", "evaluation", "pictures", "summary")
NONE, FEATURES = -1, PHASES.index("features")
MOST_KILLS = 4  # of one run, before it is left alone
POLL = 0.0005


class Aim(NamedTuple):
    """When a process is killed: in a phase, when it is entered for the nth time, after so many seconds."""

    phase: int
    entry: int
    seconds: float


class Ended(NamedTuple):
    """How a process ended, and what was seen of it."""

    killed: bool
    phase: int  # in which it was
    entries: list[int]  # of each phase
    seconds: list[float]  # in each phase


class Watch:
    """Memory that a process shares with those forked from it: in which phase they are."""

    def __init__(self) -> None:
        """Nothing was entered yet."""
        self._now, self._entries = RawArray("i", 1), RawArray("i", len(PHASES))
        self.reset()

    def reset(self) -> None:
        """For the next process."""
        self._now[0], self._entries[:] = NONE, [0] * len(PHASES)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """The block is that phase, within the one that it interrupts."""
        number, before = PHASES.index(phase), self._now[0]
        self._entries[number] += 1
        self._now[0] = number
        try:
            yield
        finally:
            self._now[0] = before

    @property
    def now(self) -> int:
        """The phase."""
        return self._now[0]

    @property
    def entries(self) -> list[int]:
        """How often each was entered."""
        return list(self._entries)


def watched(patch: pytest.MonkeyPatch, watch: Watch) -> None:
    """Has the job say in which phase it is."""
    clock = Clock.__call__

    @contextlib.contextmanager
    def phases(self: Clock, phase: str) -> Iterator[None]:
        with watch(phase) if phase in PHASES else contextlib.nullcontext(), clock(self, phase):
            yield

    patch.setattr(Clock, "__call__", phases)
    for method, phase in (("start", "start"), ("checkpoint", "checkpoint"), ("finish", "summary")):
        usual = getattr(RunWriter, method)

        def within(*args: Any, usual: Any = usual, phase: str = phase, **more: Any) -> Any:
            with watch(phase):
                return usual(*args, **more)

        patch.setattr(RunWriter, method, functools.wraps(usual)(within))


def start(options: list[str], watch: Watch, log: Path) -> int:
    """Forks a process that runs `train`. Returns its id."""
    watch.reset()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        with open(log, "ab") as file, pytest.MonkeyPatch.context() as patch:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            narrow_networks(patch)
            watched(patch, watch)
            code = command_line(["train", *options])
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(code)


def follow(process: int, watch: Watch, aim: Aim | None) -> Ended:
    """Waits for the end of a process, which is brought about when it comes to where is aimed at.

    Raises:
      RuntimeError: when it failed.
    """
    seconds, last, reached = [0.0] * len(PHASES), time.perf_counter(), None
    while True:
        time.sleep(POLL)
        phase, now = watch.now, time.perf_counter()
        if phase != NONE:
            seconds[phase] += now - last
        last = now
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return Ended(True, phase, watch.entries, seconds)
        if ended:
            if status:
                raise RuntimeError(f"The process ended with {os.waitstatus_to_exitcode(status)}.")
            return Ended(False, phase, watch.entries, seconds)
        if aim and reached is None and watch.entries[aim.phase] >= aim.entry:
            reached = now
        if aim and reached is not None and now - reached >= aim.seconds:
            os.kill(process, signal.SIGKILL)
            aim = None


def outcome(run: Path, cache: Path) -> dict[str, Any]:
    """All that must be equal between two runs: metrics, parameters, scores, features, and the names of their files.

    Raises:
      UserError: when a checkpoint is not whole.
    """
    rows = [json.loads(line) | {"seconds": 0} for line in (run / METRICS).read_text().splitlines()]
    summary = json.loads((run / SUMMARY).read_text())
    kept = list_checkpoints(run / CHECKPOINTS)
    damaged: list[str] = []
    with forwarding_logs(damaged.append):
        newest_whole(run / CHECKPOINTS)
    leaves = {path.name: json.loads((path / "checkpoint.json").read_text())["arrays"] for path in kept}
    scores = {name: value for name, value in summary.items() if name.startswith(("val_", "test_", "class_", "conf"))}
    chunks = sorted(path for path in (cache / "features").glob("*/c/*/*") if path.is_file())
    return {
        "metrics": rows,
        "parameters": leaves,
        "scores": scores | {"status": summary["status"], "selected_epoch": summary["selected_epoch"]},
        "backbone": sha256_of_file(run / BACKBONE),
        "damaged checkpoints": damaged,
        "features": {str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest() for path in chunks},
        "files": sorted(path.name for place in (run, run / CHECKPOINTS) for path in place.iterdir()),
        "left behind": [str(path) for root in (run, cache) for path in root.rglob("*") if is_leftover(path)],
    }


def is_leftover(path: Path) -> bool:
    """Whether only a process that was killed leaves such a file."""
    return path.name.startswith(".") or path.name.endswith(".__lock")


def options_of(way: str, directory: Path) -> list[str]:
    """What `train` is told."""
    places = ("--resume", "--out", str(directory / "run"), "--cache-dir", str(directory / "cache"))
    return [*JOB, *WAYS[way], *places]


def undisturbed(way: str, directory: Path, watch: Watch) -> tuple[dict[str, Any], Ended]:
    """A run that nothing disturbs: what comes out, and how long its phases take."""
    directory.mkdir()
    ended = follow(start(options_of(way, directory), watch, directory / "log"), watch, None)
    return outcome(directory / "run", directory / "cache"), ended


def tortured(
    way: str, directory: Path, watch: Watch, usual: Ended, most: int, draw: random.Random
) -> tuple[dict[str, Any], Counter[str]]:
    """A run that is killed up to `most` times: what comes out, and in which phases it was."""
    directory.mkdir()
    killed: Counter[str] = Counter()
    while True:
        aim = None
        if killed.total() < most:
            phases = [number for number, entries in enumerate(usual.entries) if entries]
            # Features are extracted by the first process that comes so far; later ones find them in the cache.
            phase = FEATURES if FEATURES in phases and not killed else draw.choice(phases)
            entry = draw.randint(1, usual.entries[phase])
            aim = Aim(phase, entry, draw.uniform(0, usual.seconds[phase] / usual.entries[phase]))
        ended = follow(start(options_of(way, directory), watch, directory / "log"), watch, aim)
        if not ended.killed:
            return outcome(directory / "run", directory / "cache"), killed
        killed[PHASES[ended.phase] if ended.phase != NONE else "between phases"] += 1


def torture(kills: int, ways: list[str], seed: int, root: Path) -> dict[str, Any]:
    """Kills runs until it has done so `kills` times. Returns figures; `failures` holds what went wrong."""
    draw, watch = random.Random(seed), Watch()
    expected = {way: undisturbed(way, root / way, watch) for way in ways}
    counts = {way: Counter[str]() for way in ways}
    runs, failures = Counter[str](), []
    while (done := sum(count.total() for count in counts.values())) < kills:
        way = min(ways, key=lambda name: counts[name].total())
        directory = root / f"{way}{runs[way]}"
        most = min(MOST_KILLS, kills - done)
        try:
            found, killed = tortured(way, directory, watch, expected[way][1], most, draw)
        except Exception as error:
            failures.append(f"{directory.name}: {type(error).__name__}: {error}\n{(directory / 'log').read_text()}")
            break
        runs[way] += 1
        counts[way] += killed
        wrong = [name for name, value in expected[way][0].items() if found[name] != value]
        if wrong:
            failures.append(f"{directory.name} differs in {', '.join(wrong)} (left behind: {found['left behind']})")
        else:
            shutil.rmtree(directory)
        print(f"{way}: {killed.total()} kills {dict(killed)}; {'differs' if wrong else 'the same bits'}", flush=True)
    return {"kills": {way: dict(count) for way, count in counts.items()}, "runs": dict(runs), "failures": failures}


def main(arguments: list[str] | None = None) -> int:
    """Runs it and prints figures; 1 where something went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.robustness.torture", description="Kills runs and goes on with them."
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments that are drawn")
    options = parser.parse_args(arguments)
    root = Path(tempfile.mkdtemp(prefix="torture."))
    start_time = time.perf_counter()
    found = torture(options.kills, options.ways, options.seed, root)
    print(f"\n| phase | {' | '.join(found['kills'])} |\n|---|{'---|' * len(found['kills'])}")
    for phase in (*PHASES, "between phases"):
        print(f"| {phase} | {' | '.join(str(count.get(phase, 0)) for count in found['kills'].values())} |")
    total = sum(sum(count.values()) for count in found["kills"].values())
    num_runs, failed = sum(found["runs"].values()), len(found["failures"])
    print(f"\n{total} kills of {num_runs} runs in {time.perf_counter() - start_time:.0f} s; {failed} of them failed.")
    for failure in found["failures"]:
        print(failure)
    if failed:
        print(f"What they left lies in {root}.")
    else:
        shutil.rmtree(root)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
