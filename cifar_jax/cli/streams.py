"""Standard output and standard error of a command, which may be closed or full: `| head -1`, `> /dev/full`."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import IO, Any, cast

# What shells give to a command that SIGPIPE ended, which Python does not let happen.
CLOSED = 141


class OutputLost(Exception):
    """Nobody reads standard output any more, or it cannot be written; raised by a command that lives by it."""


class Output:
    """A stream that survives its end: from the first failed write on, what is written is lost.

    Attributes:
      error: what the first write that failed said, None while all is well.
    """

    def __init__(self, stream: IO[str], raises: bool = False) -> None:
        """Stands in for a stream.

        Args:
          stream: that is written to.
          raises: whether a failed write raises OutputLost.
        """
        self._stream, self._raises = stream, raises
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Writes, or does nothing once a write has failed."""
        if self.error is None:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flushes, or does nothing once a write has failed."""
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def finish(self) -> None:
        """Flushes and raises nothing: `error` says whether all was written."""
        self._raises = False
        self.flush()

    def _lose(self, error: OSError) -> None:
        self.error = error
        # What the stream still holds would be written at the interpreter's exit, which complains if that fails.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        if self._raises:
            raise OutputLost(str(error)) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def guarded(goes_on: bool) -> Iterator[Output]:
    """Puts an `Output` in the place of each standard stream until the block ends. Its value is that of stdout.

    Args:
      goes_on: whether a command has something else to do where nobody reads its output; else OutputLost ends it.
    """
    out, err = Output(sys.stdout or _nowhere(), raises=not goes_on), Output(sys.stderr or _nowhere())
    with contextlib.redirect_stdout(cast(IO[str], out)), contextlib.redirect_stderr(cast(IO[str], err)):
        try:
            yield out
        finally:
            out.finish()
            err.finish()


def open_missing() -> None:
    """Opens /dev/null for each standard stream that the process came without, so that no other file takes its number.

    Python has None in place of such a stream, and prints to standard output what is meant for a missing standard error.
    """
    for number in range(3):
        with contextlib.suppress(OSError):
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()


def is_closed_pipe(error: OSError) -> bool:
    """Whether the reader has gone, which is no fault of anybody."""
    return error.errno == errno.EPIPE


def _nowhere() -> IO[str]:
    return open(os.devnull, "w", encoding="utf-8")
