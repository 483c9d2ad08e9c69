"""Timing of the phases of a run."""

import contextlib
import time
from collections.abc import Callable, Iterator

from cifar_jax.runtime.progress import Reporter, Watched


class Clock:
    """Stopwatch that adds up seconds by phase."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """Starts the clock, which reads seconds from `now`."""
        self._now, self._started = now, now()
        self.seconds: dict[str, float] = {}
        self.first_step: float | None = None

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the duration of the block to a phase."""
        start = self._now()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self._now() - start

    def note_first_step(self) -> None:
        """Notes that the network produced its first result, after loading and compilation. Later calls do nothing."""
        if self.first_step is None:
            self.first_step = self.total

    def watch(self, reporter: Reporter) -> Reporter:
        """Wraps a reporter to note the first step when one of its progress bars first advances."""
        return Watched(reporter, lambda _: self.note_first_step())

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return self._now() - self._started
