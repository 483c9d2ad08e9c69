"""How long the phases of a run take."""

import contextlib
import time
from collections.abc import Iterator

from cifar_jax.runtime.reporter import Reporter, Watched


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.first_step: float | None = None

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the time that the block takes to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def note_first_step(self) -> None:
        """Something came through the network: the first time says how long compilation and all before it took."""
        if self.first_step is None:
            self.first_step = self.total

    def watch(self, reporter: Reporter) -> Reporter:
        """The same reporter, the first work of whose bars is noted."""
        return Watched(reporter, lambda _: self.note_first_step())

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started
