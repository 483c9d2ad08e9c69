"""Ctrl-C and SIGTERM: the first one sets a flag and, where nothing is held, raises; the second one ends the process.

Python runs the handler of a signal between two of its own instructions, so after a compiled epoch and not during it.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived, which preempted machines are sent; handled like Ctrl-C."""


class Signals:
    """The signals that this process received, from `listening`.

    Attributes:
      requested: the first signal that asked the process to end; None until then.
    """

    def __init__(self, alone: bool = True, on_request: Callable[[signal.Signals, bool], None] | None = None) -> None:
        """Takes the arguments of `listening`."""
        self.requested: signal.Signals | None = None
        self._held, self._alone, self._on_request = 0, alone, on_request

    @property
    def exit_code(self) -> int:
        """The exit code that shells report for the signal, or for what JAX heard from another process."""
        return 128 + (self.requested or (signal.SIGINT if self._alone else signal.SIGTERM))

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Raises nothing in a block that looks at `requested` itself."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Delays the exception to the end of a block, such as one that writes files that belong together."""
        before = self.requested
        with self.noted():
            yield
        if self.requested is not before and not self._held:
            raise self._interrupt()

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Sets the flag and has the next signal end the process: files appear whole or not at all, so it may."""
        self.requested = signal.Signals(number)
        for other in (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,):
            if signal.getsignal(other) is not signal.SIG_IGN:
                signal.signal(other, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            if os.isatty(2):
                os.write(2, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
        if self._on_request:
            self._on_request(self.requested, self._held > 0)
        if not self._alone:
            signal.raise_signal(signal.SIGTERM)  # JAX listens to it and tells the other processes
        if not self._held:
            raise self._interrupt()

    def _interrupt(self) -> KeyboardInterrupt:
        return Terminated() if self.requested == signal.SIGTERM else KeyboardInterrupt()


@contextlib.contextmanager
def listening(
    alone: bool = True, on_request: Callable[[signal.Signals, bool], None] | None = None
) -> Iterator[Signals]:
    """Handles Ctrl-C and SIGTERM until the block ends; in another thread than the main one it does nothing.

    Args:
      alone: whether this is the only process of a run. If not, SIGTERM is left to JAX, which tells the other processes.
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
