"""The command line: finds the command, and turns whatever goes wrong in it into an exit code and a plain message."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from cifar_jax.cli import commands
from cifar_jax.cli.console import ConsoleReporter
from cifar_jax.cli.parsing import program
from cifar_jax.cli.streams import CLOSED, OutputLost, guarded, is_closed_pipe, open_missing
from cifar_jax.cli.text import printable
from cifar_jax.errors import RunError, UserError, no_such
from cifar_jax.runtime.signals import Terminated, listening
from cifar_jax.version import __version__

USAGE = """usage: {program} COMMAND [options]

  train                  train a head on a frozen backbone, as train.py does
  evaluate RUN           score a run's head on its test images again
  predict RUN IMAGE...   name the likeliest classes of image files
  features SRC...        write the features of a data set or of images to a file
  info [TOPIC]           versions, devices, weights and data sets; info cache
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
# What shells give to a command that Ctrl-C or SIGTERM ended.
INTERRUPTED = (130, 143)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
      The exit code: 0, 1 for a failed run, 2 for the user's mistake, 130 after Ctrl-C, 143 after SIGTERM, and 141 where
      nobody reads the output, which does not stop `train`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold what its encoding does not
    # A training run has its directory to finish; the other commands live by what they print.
    goes_on = arguments[:1] == ["train"] and not HELP & set(arguments)
    with guarded(goes_on) as out:
        outcome = _Outcome()
        with contextlib.suppress(OutputLost), _explained(arguments, outcome):  # `out` has the reason
            if arguments[-1:] == ["--version"]:  # of `train` too, which train.py runs
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
        return _with_output(outcome.code, out.error, goes_on)


def _debug_nans(debug: bool) -> None:
    """Has JAX raise where a NaN comes up, or not."""
    if debug or "jax" in sys.modules:
        import jax

        jax.config.update("jax_debug_nans", debug)


class _Outcome:
    """The exit code of a command."""

    code = 0


def _command_in(arguments: list[str]) -> str | None:
    """The command that is asked for, None for the overview; `help COMMAND` becomes `COMMAND --help`.

    Raises:
      UserError: when there is no such command.
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
    """Turns whatever goes wrong in a command into an exit code and a plain message. With --debug errors pass."""
    debug = "--debug" in arguments
    with listening():
        try:
            yield
        except KeyboardInterrupt as stop:
            if debug:
                raise
            print("Interrupted.", file=sys.stderr)
            outcome.code = 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
        except SystemExit as stop:  # of tyro, which has shown the help or what it does not understand
            outcome.code = _say_error(stop.code, 1) if isinstance(stop.code, str) else stop.code or 0
        except Exception as error:
            if debug or (explained := _explanation(error)) is None:
                raise
            outcome.code = _say_error(*explained, getattr(error, "__notes__", ()))


def _explanation(error: Exception) -> tuple[str, int] | None:
    """A message and an exit code for an error that is no fault of this program; None for any other."""
    if isinstance(error, UserError | RunError):
        return str(error), 2 if isinstance(error, UserError) else 1
    import jax

    from cifar_jax.runtime.devices import is_gone, is_out_of_memory, missing_platform

    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError) and (is_out_of_memory(error) or is_gone(error)):
        reason = str(error).partition("\n")[0] or "no more to be had"
        return f"{OUT_OF_MEMORY if is_out_of_memory(error) else DEVICE_FAILED} ({reason}).", 1
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
        return None
    missing = missing_platform(error) if isinstance(error, RuntimeError | AssertionError) else None
    return None if missing is None else (missing, 2)


def _with_output(code: int, error: OSError | None, goes_on: bool) -> int:
    """The exit code, given also what became of standard output."""
    if error is None:
        return code
    if is_closed_pipe(error):
        return code if goes_on or code in INTERRUPTED else CLOSED
    ending = "the run is complete nevertheless" if goes_on and not code else "make room, or send it elsewhere"
    return _say_error(f"Standard output could not be written ({error.strerror}); {ending}.", code or 1)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and ends the process with its exit code."""
    open_missing()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] != "help" and not HELP & set(arguments):  # which need no JAX and answer at once
        from cifar_jax.runtime.devices import keep_freed_memory, use_all_cores

        use_all_cores()
        keep_freed_memory()
    code = main(arguments)
    if code in INTERRUPTED:
        # XLA may be in the midst of a computation, on which a regular exit crashes now and then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _say_error(text: str, code: int, notes: Sequence[str] = ()) -> int:
    # One line, whatever a file's name or another library's message holds; a note, of what failed next, is another.
    for line in (f"Error: {text}", *notes):
        print(printable(" ".join(line.splitlines())), file=sys.stderr)
    return code
