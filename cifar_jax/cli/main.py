"""Entry point of the command line: dispatches to a command and turns its errors into a message and an exit code."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from cifar_jax.cli import commands
from cifar_jax.cli.console import ConsoleReporter
from cifar_jax.cli.escape import printable
from cifar_jax.cli.parsing import program
from cifar_jax.cli.stdio import CLOSED, OutputLost, guarded, is_closed_pipe, open_missing
from cifar_jax.errors import RunError, UserError, no_such
from cifar_jax.runtime.signals import Terminated, listening
from cifar_jax.version import __version__

USAGE = """usage: {program} COMMAND [options]

  train                  train a head on a frozen backbone, as train.py does
  evaluate RUN           score a run's head on its test images again
  predict RUN IMAGE...   print the most likely classes of image files
  features SRC...        write the features of a data set or of images to a file
  info [TOPIC]           show versions, devices, weights, data sets or the cache
  convert SRC DST        convert weights between our format, Keras and PyTorch
  verify-weights FILE    check a weights file, tensor by tensor

  help COMMAND           list the options of a command, as COMMAND --help does
  --version              print the version"""

COMMANDS = {
    "train": commands.train,
    "evaluate": commands.evaluate,
    "predict": commands.predict,
    "features": commands.features,
    "info": commands.info,
    "convert": commands.convert,
    "verify-weights": commands.verify_weights,
}
OUT_OF_MEMORY = "Out of memory. A smaller --image-size, --extract-batch-size, --batch-size or --hidden needs less"
DEVICE_FAILED = "Device lost. Continue with --resume --out DIR once it is back"
HELP = {"-h", "--help", "--version"}
# The exit codes that shells use for a command ended by Ctrl-C or SIGTERM.
INTERRUPTED = (130, 143)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
      The exit code: 0 for success, 1 for a failed run, 2 for a user error, 130 after Ctrl-C, 143 after SIGTERM, and 141
      if stdout is a closed pipe, which does not stop `train`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may not be encodable
    # A training run has a run directory to finish; the other commands only produce output.
    survives = arguments[:1] == ["train"] and not HELP & set(arguments)
    with guarded(survives) as out:
        outcome = _Outcome()
        with contextlib.suppress(OutputLost), _explained(arguments, outcome):  # `out.error` has the reason
            if arguments[-1:] == ["--version"]:  # after `train` too, which train.py puts in front
                print(f"cifar-jax {__version__}")
            elif name := _command_in(arguments):
                _debug_nans("--debug" in arguments)
                reporter = ConsoleReporter()
                with reporter.logged():
                    outcome.code = COMMANDS[name](arguments[1:], reporter)
            else:
                print(USAGE.format(program=program()), file=sys.stdout if arguments else sys.stderr)
                outcome.code = 0 if arguments else 2
        out.finish()
        return _with_output(outcome.code, out.error, survives)


def _debug_nans(debug: bool) -> None:
    """Sets whether JAX raises at the first NaN, without importing JAX only to leave that off."""
    if debug or "jax" in sys.modules:
        import jax

        jax.config.update("jax_debug_nans", debug)


class _Outcome:
    """Exit code of a command, set where it ends."""

    code = 0


def _command_in(arguments: list[str]) -> str | None:
    """Returns the requested command, or None for the overview. Rewrites `help COMMAND` to `COMMAND --help`.

    Raises:
      UserError: if there is no such command.
    """
    if arguments[:1] == ["help"]:
        arguments[:] = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        return None
    if arguments[0] not in COMMANDS:
        raise UserError(no_such("command", arguments[0], COMMANDS))
    return arguments[0]


@contextlib.contextmanager
def _explained(arguments: list[str], outcome: _Outcome) -> Iterator[None]:
    """Turns errors raised in the block into a message and an exit code; with --debug they propagate."""
    debug = "--debug" in arguments
    with listening():
        try:
            yield
        except KeyboardInterrupt as stop:
            if debug:
                raise
            print("Interrupted.", file=sys.stderr)
            outcome.code = 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
        except SystemExit as stop:  # raised by tyro, which has printed the help or the error
            outcome.code = _print_error(stop.code, 1) if isinstance(stop.code, str) else stop.code or 0
        except Exception as error:
            if debug or (explained := _explanation(error)) is None:
                raise
            outcome.code = _print_error(*explained, getattr(error, "__notes__", ()))


def _explanation(error: Exception) -> tuple[str, int] | None:
    """Returns the message and exit code for an expected error, or None for a bug in this program."""
    if isinstance(error, UserError | RunError):
        return str(error), 2 if isinstance(error, UserError) else 1
    import jax

    from cifar_jax.runtime.devices import is_gone, is_out_of_memory, missing_platform

    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError) and (is_out_of_memory(error) or is_gone(error)):
        reason = str(error).partition("\n")[0] or "no memory left on the host"
        return f"{OUT_OF_MEMORY if is_out_of_memory(error) else DEVICE_FAILED} ({reason}).", 1
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
        return None
    missing = missing_platform(error) if isinstance(error, RuntimeError | AssertionError) else None
    return None if missing is None else (missing, 2)


def _with_output(code: int, error: OSError | None, survives: bool) -> int:
    """Returns the exit code of a command, adjusted for an error in writing standard output."""
    if error is None:
        return code
    if is_closed_pipe(error):
        return code if survives or code in INTERRUPTED else CLOSED
    ending = "the run itself is complete" if survives and not code else "free disk space or redirect it elsewhere"
    return _print_error(f"Standard output could not be written ({error.strerror}); {ending}.", code or 1)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and ends the process with its exit code."""
    open_missing()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] != "help" and not HELP & set(arguments):  # help does not need JAX
        from cifar_jax.runtime.devices import keep_freed_memory, use_all_cores

        use_all_cores()
        keep_freed_memory()
    code = main(arguments)
    if code in INTERRUPTED:
        # XLA may still be computing, in which case a regular exit occasionally crashes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _print_error(text: str, code: int, notes: Sequence[str] = ()) -> int:
    # One line for the error and one for each note, even if a file name or a library's message contains line breaks.
    for line in (f"Error: {text}", *notes):
        print(printable(" ".join(line.splitlines())), file=sys.stderr)
    return code
