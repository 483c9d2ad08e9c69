"""Handling of Ctrl-C and of SIGTERM, which preempted machines receive.

The exception is deferred while related files are written and steps run, and otherwise raised at once. A second signal
ends the process.

Python runs signal handlers between its own instructions only, and so not during a compiled epoch. A thread learns of
signals at once, as the interpreter writes their numbers to a socket.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any, NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. A KeyboardInterrupt, so that code that saves its state on Ctrl-C does so here too."""


class Signals:
    """State of the signals received by this process; see `listening`.

    Attributes:
      requested: the first signal that asked the process to end, or None.
    """

    def __init__(self, alone: bool = True) -> None:
        """Starts without any signal received.

        Args:
          alone: whether this is the only process of a run; if not, JAX listens for SIGTERM and informs all processes.
        """
        self.requested: signal.Signals | None = None
        self._held, self._alone = 0, alone

    @property
    def exit_code(self) -> int:
        """The exit code that shells use for the signal; if none was seen here, for the one that JAX listens for."""
        return 128 + (self.requested or (signal.SIGINT if self._alone else signal.SIGTERM))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Defers the exception of a signal to the end of the block."""
        before = self.requested
        with self.noted():
            yield
        if self.requested and self.requested is not before and not self._held:
            raise self._interrupt()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Suppresses the exception of a signal, also at the end of the block, which checks `requested` itself."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    @property
    def is_held(self) -> bool:
        """Whether the running block finishes before a signal takes effect."""
        return self._held > 0

    def came(self, number: int, frame: FrameType | None = None) -> None:
        """Handles a signal. The process may end at any moment, as files are written atomically."""
        if self.requested:
            _quit(number)
        self.requested = signal.Signals(number)
        if not self._alone:
            signal.raise_signal(signal.SIGTERM)
        if not self._held:
            raise self._interrupt()

    def _interrupt(self) -> KeyboardInterrupt:
        return Terminated() if self.requested == signal.SIGTERM else KeyboardInterrupt()


def _quit(number: int) -> NoReturn:
    """Ends the process at once and restores the cursor that a progress bar may have hidden."""
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, b"\x1b[?25h\n")
    os._exit(128 + number)


@contextlib.contextmanager
def listening(
    alone: bool = True, on_request: Callable[[signal.Signals, bool], None] | None = None
) -> Iterator[Signals]:
    """Listens for Ctrl-C and SIGTERM until the block ends; only in the main thread, as Python allows it in no other.

    Args:
      alone: whether this is the only process of a run. If not, JAX listens for SIGTERM and informs the other processes,
        and Ctrl-C is forwarded to it.
      on_request: called at once, in a thread of its own, with the first signal and whether the running block finishes
        before it takes effect.
    """
    signals = Signals(alone)
    previous: dict[int, Any] = {}
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,):
                # Signals that the process was started to ignore, as by `nohup`, stay ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    previous[number] = signal.signal(number, signals.came)
            if on_request:
                stack.enter_context(_watched(previous, lambda number: on_request(number, signals.is_held)))
        try:
            yield signals
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


@contextlib.contextmanager
def _watched(numbers: Collection[int], on_request: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Runs a thread that reports the first of these signals and ends the process at the second."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def watch() -> None:
        requested = False
        while received := receiver.recv(1):
            if received[0] in numbers:
                if requested:
                    _quit(received[0])
                requested = True
                on_request(signal.Signals(received[0]))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        sender.close()
        thread.join()
        receiver.close()
