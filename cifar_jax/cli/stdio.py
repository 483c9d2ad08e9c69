"""Standard output and error that may be closed pipes or full disks, as with `| head -1` and `> /dev/full`."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

# The exit code that shells use for a command ended by SIGPIPE, a signal that Python ignores.
CLOSED = 141


class OutputLost(Exception):
    """Standard output is a closed pipe or cannot be written, which ends a command that only produces output."""


class Output:
    """Wrapper of a stream that discards everything written to it after the first failed write.

    Attributes:
      error: the error of the first failed write, or None.
    """

    def __init__(self, stream: IO[str], raises: bool = False) -> None:
        """Wraps a stream; with `raises`, a failed write raises OutputLost."""
        self._stream, self._raises = stream, raises
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Writes to the stream, or does nothing once a write has failed."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream, or does nothing once a write has failed."""
        self._try(self._stream.flush)

    def finish(self) -> None:
        """Flushes the stream without raising; `error` is None if everything was written."""
        self._raises = False
        self.flush()

    def _try(self, write: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            write()
        except OSError as error:
            self.error = error
            # The interpreter flushes the stream's buffer at exit and complains if that fails.
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
            if self._raises:
                raise OutputLost(str(error)) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def guarded(survives: bool) -> Iterator[Output]:
    """Wraps stdout and stderr in an `Output` until the block ends, and yields the one for stdout.

    Args:
      survives: whether the block continues after stdout is lost; if not, OutputLost ends it.
    """
    out, err = Output(sys.stdout or _devnull(), raises=not survives), Output(sys.stderr or _devnull())
    with contextlib.redirect_stdout(cast(IO[str], out)), contextlib.redirect_stderr(cast(IO[str], err)):
        try:
            yield out
        finally:
            out.finish()
            err.finish()


def read_stdin() -> bytes:
    """Reads standard input to its end."""
    if sys.stdin is None:  # closed
        return b""
    return sys.stdin.buffer.read()


def open_missing() -> None:
    """Opens /dev/null for each standard stream that is missing, so that no other file gets its descriptor.

    Python sets a missing stream to None, and prints to stdout what is meant for a missing stderr.
    """
    for number in range(3):
        with contextlib.suppress(OSError):
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
    sys.stdout = sys.stdout or _devnull()
    sys.stderr = sys.stderr or _devnull()


def _devnull() -> IO[str]:
    return open(os.devnull, "w", encoding="utf-8")
