"""Errors as the command line shows them: a message and an exit code."""

import signal
import sys
import traceback
from collections.abc import Sequence

from cifar_jax.cli.escape import printable
from cifar_jax.errors import RunError, UserError
from cifar_jax.runtime.signals import Terminated


def explanation(error: Exception) -> tuple[str, int] | None:
    """Returns the message and exit code for an expected error, or None for a bug in this program."""
    if isinstance(error, UserError | RunError):
        return str(error), 2 if isinstance(error, UserError) else 1
    import jax

    from cifar_jax.runtime.devices import is_device_lost, is_out_of_memory, missing_platform, out_of_memory

    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
        if is_out_of_memory(error):
            advice = "A smaller --image-size, --extract-batch-size, --batch-size or --hidden needs less"
            return out_of_memory(error, advice), 1
        if is_device_lost(error):
            reason = str(error).partition("\n")[0]
            return f"Device lost. Continue with --resume --out DIR once it is back ({reason}).", 1
    if isinstance(error, RuntimeError | AssertionError) and (missing := missing_platform(error)):
        return missing, 2
    return None


def reason_for_peers(error: BaseException, debug: bool) -> tuple[str, int]:
    """Returns the message and exit code that end all processes of a run for the error of one; a bug has a traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted.", 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
    explained = explanation(error) if isinstance(error, Exception) else None
    if debug or explained is None:
        traceback.print_exception(error)
    reason, code = explained or (f"{type(error).__name__}: {error}", 1)
    return " ".join((reason, *getattr(error, "__notes__", ()))), code


def print_error(text: str, code: int = 1, notes: Sequence[str] = ()) -> int:
    """Prints a line for an error and for each note, even if a library's message has line breaks. Returns the code."""
    for line in (f"Error: {text}", *notes):
        print(printable(" ".join(line.splitlines())), file=sys.stderr)
    return code
