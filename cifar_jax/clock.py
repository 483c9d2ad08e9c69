"""How long the phases of a run take."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()
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

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start
