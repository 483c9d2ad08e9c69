"""Ctrl-C and SIGTERM: the first sets a flag and raises unless exceptions are held; the second ends the process.

Python runs signal handlers between bytecode instructions, so after a compiled epoch, not during it.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, which preempted machines receive; handled like Ctrl-C."""


class Signals:
    """The handler of Ctrl-C and SIGTERM; made by `listening`.

    Attributes:
      requested: the first signal that asked the process to end; None until then.
    """

    def __init__(self, alone: bool = True, on_request: Callable[[signal.Signals, bool], None] | None = None) -> None:
        """Initialises the handler; for the arguments see `listening`."""
        self.requested: signal.Signals | None = None
        self._held, self._alone, self._on_request = 0, alone, on_request

    @property
    def exit_code(self) -> int:
        """The exit code that shells report for the signal, or for SIGTERM if only another process received one."""
        return 128 + (self.requested or (signal.SIGINT if self._alone else signal.SIGTERM))

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Suppresses the exception in a block that checks `requested` itself."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Defers the exception to the end of a block, such as one that writes files that belong together."""
        before = self.requested
        with self.noted():
            yield
        if self.requested is not before and not self._held:
            raise self._interrupt()

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Sets the flag and lets the next signal end the process, which is safe as files are written atomically."""
        self.requested = signal.Signals(number)
        for other in (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,):
            if signal.getsignal(other) is not signal.SIG_IGN:
                signal.signal(other, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            if os.isatty(2):
                os.write(2, b"\x1b[?25h\n")  # shows the cursor, which a progress bar hides
        if self._on_request:
            self._on_request(self.requested, self._held > 0)
        if not self._alone:
            signal.raise_signal(signal.SIGTERM)  # JAX handles it and notifies the other processes
        if not self._held:
            raise self._interrupt()

    def _interrupt(self) -> KeyboardInterrupt:
        return Terminated() if self.requested == signal.SIGTERM else KeyboardInterrupt()


@contextlib.contextmanager
def listening(
    alone: bool = True, on_request: Callable[[signal.Signals, bool], None] | None = None
) -> Iterator[Signals]:
    """Handles Ctrl-C and SIGTERM until the block ends; does nothing outside the main thread.

    Args:
      alone: whether this is the only process of a run. If not, SIGTERM is left to JAX, which notifies the others.
      on_request: called with the first signal, and whether the current block finishes first.
    """
    signals = Signals(alone, on_request)
    usual: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                usual[number] = signal.signal(number, signals.handle)
    try:
        yield signals
    finally:
        for name, handler in usual.items():
            signal.signal(name, handler)
