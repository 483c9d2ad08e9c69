"""The command line: finds the command, and turns whatever goes wrong in it into an exit code and a plain message."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax

from cifar_jax import commands
from cifar_jax.console import ConsoleReporter
from cifar_jax.devices import is_gone, is_out_of_memory, keep_freed_memory, missing_platform, use_all_cores
from cifar_jax.errors import RunError, UserError
from cifar_jax.interruption import Terminated, listening
from cifar_jax.parsing import program
from cifar_jax.streams import CLOSED, OutputLost, guarded, is_closed_pipe, open_missing
from cifar_jax.suggest import no_such
from cifar_jax.text import printable
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
    goes_on = arguments[:1] == ["train"] and not {"-h", "--help", "--version"} & set(arguments)
    with guarded(goes_on) as out:
        code = 0
        with contextlib.suppress(OutputLost):  # `out` has the reason
            code = _outcome(arguments)
        out.finish()
        return _with_output(code, out.error, goes_on)


def _outcome(arguments: list[str]) -> int:
    if arguments[-1:] == ["--version"]:  # of `train` too, which train.py runs
        print(f"cifar-jax {__version__}")
        return 0
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(program=program()), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    with listening():
        try:
            return _command(arguments)
        except KeyboardInterrupt as stop:
            if "--debug" in arguments:
                raise
            print("Interrupted.", file=sys.stderr)
            return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def _command(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    try:
        if arguments[0] not in COMMANDS:
            raise UserError(no_such("command", arguments[0], COMMANDS))
        jax.config.update("jax_debug_nans", debug)
        reporter = ConsoleReporter()
        with reporter.logged():
            return COMMANDS[arguments[0]](arguments[1:], reporter)
    except SystemExit as stop:  # of tyro, which has shown the help or what it does not understand
        if isinstance(stop.code, str):
            return _say_error(stop.code, 1)
        return stop.code or 0
    except (UserError, RunError) as error:
        if debug:
            raise
        return _say_error(str(error), 2 if isinstance(error, UserError) else 1, getattr(error, "__notes__", ()))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if debug or not (is_out_of_memory(error) or is_gone(error)):
            raise
        reason = str(error).partition("\n")[0] or "no more to be had"
        what = OUT_OF_MEMORY if is_out_of_memory(error) else DEVICE_FAILED
        return _say_error(f"{what} ({reason}).", 1, getattr(error, "__notes__", ()))
    except (RuntimeError, AssertionError) as error:
        if debug or (missing := missing_platform(error)) is None:
            raise
        return _say_error(missing, 2)


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
    use_all_cores()
    keep_freed_memory()
    code = main(argv)
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
