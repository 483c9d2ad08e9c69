"""The command line: what USAGE lists. The only module that parses arguments or exits."""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import jax
import tyro

from cifar_jax.config import PRESETS, TrainConfig, preset
from cifar_jax.console import ConsoleReporter
from cifar_jax.errors import RunError, UserError
from cifar_jax.files import without_nan

USAGE = """usage: python -m cifar_jax COMMAND [options]

  train                  train a head on a frozen backbone (the same as python train.py)
  evaluate RUN           score a run's head on its test images again
  predict RUN IMAGE...   say what is in image files
  info                   versions, devices, known weights and data sets on this machine
  convert SRC DST        weights of any form to our own (.safetensors), or back to Keras's (.h5) and others'

python -m cifar_jax COMMAND --help lists the options of a command."""

INTERRUPTED = 130  # the exit code that shells give to a command that Ctrl-C ended
OUT_OF_MEMORY = "The memory is full: a smaller --image-size, --extract-batch-size, --batch-size or --hidden needs less"


@dataclass(frozen=True)
class EvaluateOptions:
    """Score a run's head on its test images again, all of them."""

    run: tyro.conf.Positional[str]
    """the run directory"""
    data_dir: str | None = None
    """where TFDS keeps its data sets, if it has moved since"""
    weights: str | None = None
    """a copy of the run's backbone, if it has moved since"""
    json: bool = False
    """print JSON"""
    debug: bool = False
    """show tracebacks"""


@dataclass(frozen=True)
class PredictOptions:
    """Say what is in image files: the three likeliest classes with their probabilities."""

    run: tyro.conf.Positional[str]
    """the run directory"""
    images: tyro.conf.Positional[tuple[str, ...]]
    """PNG, JPEG or other image files of any size"""
    direct: bool = False
    """resize straight to the network's size, not through 32x32 as the training images"""
    weights: str | None = None
    """a copy of the run's backbone, if it has moved since"""
    json: bool = False
    """print JSON"""
    debug: bool = False
    """show tracebacks"""


@dataclass(frozen=True)
class InfoOptions:
    """Versions, devices, and which known weights and data sets are on this machine."""

    data_dir: str | None = None
    """where TFDS keeps its data sets; else $TFDS_DATA_DIR, else ~/tensorflow_datasets"""
    cache_dir: str | None = None
    """where downloads and features are kept; else $CIFAR_JAX_CACHE, else ~/.cache/cifar_jax"""
    json: bool = False
    """print JSON"""
    debug: bool = False
    """show tracebacks"""


@dataclass(frozen=True)
class ConvertOptions:
    """Write weights in another form: DST .safetensors is our own, .h5 that of Keras; --to names others."""

    src: tyro.conf.Positional[str]
    """a weights file, a directory of timm or transformers, or a name that `info` lists"""
    dst: tyro.conf.Positional[str]
    """the file to write"""
    to: Literal["ours", "keras", "torchvision", "huggingface"] | None = None
    """the form, where the ending of DST leaves it open"""
    variant: str | None = None
    """how SRC is run, where it leaves that open"""
    overwrite: bool = False
    """replace DST if it is there"""
    cache_dir: str | None = None
    """where downloads are kept; else $CIFAR_JAX_CACHE, else ~/.cache/cifar_jax"""
    json: bool = False
    """print JSON"""
    debug: bool = False
    """show tracebacks"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
      The exit code: 0, 1 for a failed run, 2 for the user's mistake, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold what its encoding does not
    commands = {"train": _train, "evaluate": _evaluate, "predict": _predict, "info": _info, "convert": _convert}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    debug = "--debug" in arguments
    try:
        if arguments[0] not in commands:
            raise UserError(f"There is no command {arguments[0]!r}; choose one of {', '.join(commands)}.")
        jax.config.update("jax_debug_nans", debug)
        return commands[arguments[0]](arguments[1:])
    except (UserError, RunError) as error:
        if debug:
            raise
        return _say_error(str(error), 2 if isinstance(error, UserError) else 1)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if debug or not (isinstance(error, MemoryError) or "out of memory" in str(error).lower()):
            raise
        return _say_error(f"{OUT_OF_MEMORY} ({str(error).partition(chr(10))[0] or 'no more to be had'}).", 1)
    except KeyboardInterrupt:
        if debug:
            raise
        print("Interrupted; nothing was written.", file=sys.stderr)
        return INTERRUPTED


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and ends the process with its exit code."""
    code = main(argv)
    if code == INTERRUPTED:
        # XLA may be in the midst of a computation, on which a regular exit crashes now and then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _say_error(text: str, code: int) -> int:
    # One line, whatever a file's name or another library's message holds.
    print("Error: " + " ".join(text.splitlines()), file=sys.stderr)
    return code


def _train(arguments: list[str]) -> int:
    from cifar_jax.environment import unused_accelerator
    from cifar_jax.job import Interrupted, train
    from cifar_jax.run_dir import SUMMARY, read_json

    config = _parse(TrainConfig, arguments, "train", default=preset(_preset_name(arguments)))
    reporter = ConsoleReporter(config.progress)
    if warning := unused_accelerator():
        reporter.warn(warning)
    try:
        out = train(config, reporter)
    except Interrupted as stop:
        done = f"{stop.epochs_done} of {config.epochs} epochs were done"
        reporter.say(f"Interrupted: {done}; what there is lies in {stop.path}.")
        return INTERRUPTED
    reporter.closing(out, read_json(out / SUMMARY))
    return 0


def _evaluate(arguments: list[str]) -> int:
    from cifar_jax.predict import evaluate_run

    options = _parse(EvaluateOptions, arguments, "evaluate")
    reporter = ConsoleReporter()
    scores = evaluate_run(options.run, options.data_dir, options.weights, reporter)
    if options.json:
        print(json.dumps(without_nan(scores)))
        return 0
    classes = {f"  {name}": f"{accuracy:.4f}" for name, accuracy in scores.pop("class_accuracy").items()}
    reporter.header({name: str(value) for name, value in scores.items()} | {"class_accuracy": ""} | classes)
    return 0


def _predict(arguments: list[str]) -> int:
    from cifar_jax.predict import predict_files
    from cifar_jax.run_dir import load_run

    options = _parse(PredictOptions, arguments, "predict")
    if not options.images:
        raise UserError("predict needs images; give the paths of PNG or JPEG files behind the run directory.")
    run = load_run(options.run, options.weights)
    predictions = predict_files(run, options.images, options.direct)
    for prediction in predictions:
        if options.json:
            print(json.dumps({"path": prediction.path, "top": dict(prediction.top)}))
        else:
            print(f"{prediction.path}  " + "  ".join(f"{name} {prob:.3f}" for name, prob in prediction.top))
    return 0


def _info(arguments: list[str]) -> int:
    from cifar_jax.environment import unused_accelerator
    from cifar_jax.info import collect

    options = _parse(InfoOptions, arguments, "info")
    about = collect(options.data_dir, options.cache_dir)
    if options.json:
        print(json.dumps(about))
        return 0
    reporter = ConsoleReporter()
    if warning := unused_accelerator():
        reporter.warn(warning)
    reporter.header(about["environment"])
    reporter.out.print()
    reporter.table(about["weights"])
    reporter.out.print()
    reporter.header(about["data"])
    return 0


def _convert(arguments: list[str]) -> int:
    from cifar_jax.pretrained.convert import convert

    options = _parse(ConvertOptions, arguments, "convert")
    reporter = ConsoleReporter()
    more = {"overwrite": options.overwrite, "cache_dir": options.cache_dir, "progress": reporter.progress}
    about = convert(options.src, options.dst, options.to, options.variant, say=reporter.say, **more)
    if options.json:
        print(json.dumps(about))
    else:
        reporter.header(about)
    return 0


def _preset_name(arguments: list[str]) -> str:
    """The preset must be known before the rest can be parsed, as it sets their defaults."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == "--preset" and following:
            return following
        if argument.startswith("--preset="):
            return argument.removeprefix("--preset=")
    return next(iter(PRESETS))


def _parse(options: Any, arguments: list[str], command: str, **how: Any) -> Any:
    """Parses by tyro; what it would show in a box of several lines becomes one sentence."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(options, args=arguments, prog=f"python -m cifar_jax {command}", **how)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_sentence(shown.getvalue(), command)) from None


def _one_sentence(box: str, command: str) -> str:
    lines = [line.strip("│ \n") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]]
    text = []
    for line in lines:
        if re.fullmatch(r"[─╰╯\s]*", line):
            break
        text.append(line)
    sentence = " ".join(text).rstrip(".").removeprefix("Error parsing ")
    return f"{sentence}; `python -m cifar_jax {command} --help` lists the options."
