"""Entry point of the command line: dispatches to a command and turns its errors into a message and an exit code."""

import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from cifar_jax.cli import commands, trained
from cifar_jax.cli.console import ConsoleReporter
from cifar_jax.cli.errors import explanation, print_error
from cifar_jax.cli.parsing import program
from cifar_jax.cli.stdio import CLOSED, OutputLost, guarded, open_missing
from cifar_jax.errors import UserError, no_such
from cifar_jax.runtime.signals import Signals, Terminated
from cifar_jax.runtime.supervisor import is_distributed, supervise
from cifar_jax.version import __version__

USAGE = """usage: {program} COMMAND [options]

  train                  train a head on a frozen backbone, as train.py does
  evaluate RUN           score a run on its test images again, or on others
  predict RUN PICTURE... classify pictures: files, folders, a list
  export RUN             take the model away: ONNX, Keras, PyTorch, a web page
  features SRC...        write the features of a data set or of pictures
  info [TOPIC|DATASET]   show versions, devices, weights, or a data set
  convert SRC DST        convert weights between our format, Keras and PyTorch
  verify-weights FILE    check a weights file, tensor by tensor

  help COMMAND           list the options of a command, as COMMAND --help does
  --version              print the version"""

COMMANDS = {
    "train": commands.train,
    "evaluate": trained.evaluate,
    "predict": trained.predict,
    "export": trained.export,
    "features": commands.features,
    "info": commands.info,
    "convert": commands.convert,
    "verify-weights": commands.verify_weights,
}
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
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may not be encodable
    # A training run has a run directory to finish; the other commands only produce output.
    survives = arguments[:1] == ["train"] and not HELP & set(arguments)
    code, debug = 0, "--debug" in arguments
    with guarded(survives) as out, Signals():
        try:
            if arguments[-1:] == ["--version"]:  # after `train` too, which train.py puts in front
                print(f"cifar-jax {__version__}")
            elif not arguments or arguments[0] in HELP:
                print(USAGE.format(program=program()), file=sys.stdout if arguments else sys.stderr)
                code = 0 if arguments else 2
            elif arguments[0] not in COMMANDS:
                raise UserError(no_such("command", arguments[0], COMMANDS))
            else:
                _debug_nans(debug)
                reporter = ConsoleReporter()
                with reporter.logged():
                    code = COMMANDS[arguments[0]](arguments[1:], reporter)
        except OutputLost:
            pass  # `out.error` has the reason
        except KeyboardInterrupt as stop:
            if debug:
                raise
            print("Interrupted.", file=sys.stderr)
            code = 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
        except SystemExit as stop:  # raised by tyro, which has printed the help or the error
            code = print_error(stop.code, 1) if isinstance(stop.code, str) else stop.code or 0
        except Exception as error:
            if debug or (explained := explanation(error)) is None:
                raise
            code = print_error(*explained, getattr(error, "__notes__", ()))
        out.finish()
        return _with_output(code, out.error, survives)


def _debug_nans(debug: bool) -> None:
    """Sets whether JAX raises at the first NaN, without importing JAX only to leave that off."""
    if debug or "jax" in sys.modules:
        import jax

        jax.config.update("jax_debug_nans", debug)


def _with_output(code: int, error: OSError | None, survives: bool) -> int:
    """Returns the exit code of a command, adjusted for an error in writing standard output."""
    if error is None:
        return code
    if error.errno == errno.EPIPE:  # the reader has closed the pipe, which is not an error
        return code if survives or code in INTERRUPTED else CLOSED
    ending = "the run itself is complete" if survives and not code else "free disk space or redirect it elsewhere"
    return print_error(f"Standard output could not be written ({error.strerror}); {ending}.", code or 1)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and ends the process with its exit code."""
    open_missing()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] != "help" and not HELP & set(arguments):  # help does not need JAX
        from cifar_jax.runtime.devices import keep_freed_memory, use_all_cores

        if arguments[0] == "train" and is_distributed():
            supervise("--debug" in arguments)
        use_all_cores()
        keep_freed_memory()
    code = main(arguments)
    if code in INTERRUPTED:
        # XLA may still be computing, in which case a regular exit occasionally crashes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
