"""Ctrl-C and SIGTERM: the first sets a flag and raises unless the block defers that; the second ends the process.

Python runs signal handlers between bytecode instructions, so after a compiled epoch, not during it.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, which preempted machines receive; handled like Ctrl-C."""


class Signals:
    """Handles Ctrl-C and SIGTERM while used as a context manager; does nothing outside the main thread.

    Attributes:
      requested: the first signal that asked the process to end; None until then.
    """

    def __init__(self, alone: bool = True, on_request: Callable[[signal.Signals, bool], None] | None = None) -> None:
        """Prepares the handler.

        Args:
          alone: whether this is the only process of a run. If not, SIGTERM is left to JAX, which notifies the others.
          on_request: called with the first signal, and whether the current block finishes first.
        """
        self.requested: signal.Signals | None = None
        self._alone, self._on_request = alone, on_request
        self._depth = 0  # of blocks that defer the exception
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self._usual[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """The exit code that shells report for the signal, or for SIGTERM if only another process received one."""
        return 128 + (self.requested or (signal.SIGINT if self._alone else signal.SIGTERM))

    @contextlib.contextmanager
    def polled(self) -> Iterator[None]:
        """Raises nothing in a block that checks `requested` itself."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Defers the exception to the end of a block, such as one that writes files that belong together."""
        before = self.requested
        with self.polled():
            yield
        if self.requested is not before:
            self._raise()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        # The second signal may end the process at any point, as files are written atomically.
        for other in self._usual:
            signal.signal(other, signal.SIG_DFL)
        with contextlib.suppress(OSError, ValueError):
            if os.isatty(terminal := sys.stderr.fileno()):
                os.write(terminal, b"\x1b[?25h\n")  # shows the cursor, which a progress bar hides
        if self._on_request:
            self._on_request(self.requested, self._depth > 0)
        if not self._alone:
            signal.raise_signal(signal.SIGTERM)  # JAX handles it and notifies the others; all stop after the same step
            return
        self._raise()

    def _raise(self) -> None:
        if not self._depth:
            raise Terminated if self.requested == signal.SIGTERM else KeyboardInterrupt
