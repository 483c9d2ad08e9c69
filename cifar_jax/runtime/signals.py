"""Ctrl-C and SIGTERM, which preempted machines are sent.

They are held back while files that belong together are written and steps run, and else raised at once. The second one
ends the process.

Python runs a signal's handler between two of its own instructions, so not during a compiled epoch. A thread hears of
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
    """SIGTERM came: the same as Ctrl-C for whoever has something to save."""


class Signals:
    """What came to this process, from `listening`.

    Attributes:
      requested: the first signal that asked the process to end, None until then.
    """

    def __init__(self, alone: bool = True) -> None:
        """Nothing came yet.

        Args:
          alone: whether this is the only process; where there are others, JAX listens to SIGTERM and tells all of them.
        """
        self.requested: signal.Signals | None = None
        self._held, self._alone = 0, alone

    @property
    def exit_code(self) -> int:
        """What shells give to a command that the signal ended; where none was seen, what JAX was told of it."""
        return 128 + (self.requested or (signal.SIGINT if self._alone else signal.SIGTERM))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds back the exception for what comes until the block ends, whose end raises it."""
        before = self.requested
        with self.noted():
            yield
        if self.requested and self.requested is not before and not self._held:
            raise self._interrupt()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """For a block that looks at `requested` itself: what comes raises nothing, at its end neither."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    @property
    def is_held(self) -> bool:
        """Whether what runs goes to its end before a signal has any effect."""
        return self._held > 0

    def came(self, number: int, frame: FrameType | None = None) -> None:
        """The handler. Files appear whole or not at all, so the process may end at any moment."""
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
    """Ends the process at once, with the cursor that a progress bar may have hidden."""
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, b"\x1b[?25h\n")
    os._exit(128 + number)


@contextlib.contextmanager
def listening(
    alone: bool = True, on_request: Callable[[signal.Signals, bool], None] | None = None
) -> Iterator[Signals]:
    """Listens to Ctrl-C and SIGTERM until the block ends; outside of the main thread, which alone can, to nothing.

    Args:
      alone: whether this is the only process of a run. If not, JAX listens to SIGTERM and tells the others; Ctrl-C is
        handed on to it.
      on_request: called with the first signal, and whether what runs goes to its end first; at once and in a thread of
        its own.
    """
    signals = Signals(alone)
    usual: dict[int, Any] = {}
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,):
                # What the process was told to ignore, as `nohup` does, stays ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    usual[number] = signal.signal(number, signals.came)
            if on_request:
                stack.enter_context(_watched(usual, lambda number: on_request(number, signals.is_held)))
        try:
            yield signals
        finally:
            for name, handler in usual.items():
                signal.signal(name, handler)


@contextlib.contextmanager
def _watched(numbers: Collection[int], on_request: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Has a thread report the first of these signals, and end the process at the second, until the block ends."""
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
