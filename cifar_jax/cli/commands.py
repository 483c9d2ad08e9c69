"""Commands: each one parses its options, calls the library and shows the result through a reporter.

Modules that only one command needs are imported inside it, so that `--help` does not wait for all of them.
"""

import contextlib
import json
import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_jax.cli.compiled import use_compile_cache
from cifar_jax.cli.console import ConsoleReporter
from cifar_jax.cli.errors import print_error, reason_for_peers
from cifar_jax.cli.options import (
    INFO_TOPICS,
    ConvertOptions,
    FeaturesOptions,
    InfoOptions,
    VerifyOptions,
    parse,
    parse_train,
)
from cifar_jax.cli.stdio import read_stdin
from cifar_jax.errors import UserError

if TYPE_CHECKING:  # these import JAX
    from cifar_jax.config import TrainConfig
    from cifar_jax.runs.ending import Interrupted
    from cifar_jax.runtime.peers import Peers

logger = logging.getLogger(__name__)


def train(arguments: list[str], reporter: ConsoleReporter) -> int:
    """Trains a head. Returns 0, or after Ctrl-C or SIGTERM the exit code that shells use for that signal."""
    config = parse_train(arguments)
    from cifar_jax.experiment import train as run_job
    from cifar_jax.runs.directory import SUMMARY, read_json
    from cifar_jax.runs.ending import Interrupted
    from cifar_jax.runs.resume import is_unfinished
    from cifar_jax.runtime.devices import use_deterministic_algorithms
    from cifar_jax.runtime.machine_info import unused_accelerator
    from cifar_jax.runtime.multihost import from_first, is_first, join

    if config.optim.deterministic:
        use_deterministic_algorithms()
    peers = join()
    with _ending_together(peers, "--debug" in arguments):
        if not is_first():
            reporter.mute()
        reporter.bars &= config.run.progress
        use_compile_cache(config.run.cache_dir)
        if warning := unused_accelerator():
            logger.warning(warning)
        try:
            question = f"{config.run.out} holds this run, unfinished. Resume it?"
            may_ask = not (config.run.resume or config.run.overwrite)
            if may_ask and from_first(lambda: is_unfinished(config) and reporter.confirm(question)):
                config = replace(config, run=replace(config.run, resume=True))
            out = run_job(config, reporter)
            from_first(lambda: None)  # waits for the first process to have written the run
        except Interrupted as stop:
            _log_interruption(config, stop)
            if peers:
                peers.leave_together(stop.exit_code)
            return stop.exit_code
        if is_first():
            reporter.closing(out, read_json(out / SUMMARY))
    return 0


def _ending_together(peers: "Peers | None", debug: bool) -> contextlib.AbstractContextManager[None]:
    """Ends all processes of a run, each with a message, if one of them fails in the block."""
    return (
        peers.failing_together(lambda error: reason_for_peers(error, debug), print_error)
        if peers
        else contextlib.nullcontext()
    )


def _log_interruption(config: "TrainConfig", stop: "Interrupted") -> None:
    (epoch, step), where = stop.saved, "before the first step"
    if step:
        where = f"in epoch {epoch + 1} of {config.optim.epochs}, after step {step}; progress is saved"
    elif epoch:
        where = f"after epoch {epoch} of {config.optim.epochs}; progress is saved"
    instead = "in place of --overwrite " * config.run.overwrite
    out = shlex.quote(str(stop.path))
    logger.info(f"Interrupted {where}. Continue with the same command and --resume {instead}--out {out}.")
    for note in getattr(stop, "__notes__", ()):
        logger.info(note)


def info(arguments: list[str], reporter: ConsoleReporter) -> int:
    """Shows the versions, devices, weights and data sets of this machine, the contents of the cache, or a data set."""
    options = parse(InfoOptions, arguments, "info")
    from cifar_jax.cli.info import collect
    from cifar_jax.runtime.machine_info import unused_accelerator

    if options.clear:
        return _clear_cache(options, reporter)
    if options.topic not in INFO_TOPICS:
        return _info_data(options, reporter)
    of_data = {"sheet": options.sheet, "seed": options.seed, "label-key": options.label_key}
    if given := [name for name, value in (of_data | {"skip-unreadable": options.skip_unreadable}).items() if value]:
        raise UserError(f"--{given[0]} goes with a data set; name one, as `info cifar10`, or leave it out.")
    about = collect(options.topic, options.data_dir, options.cache_dir)
    if options.json:
        print(json.dumps(about))
        return 0
    if warning := unused_accelerator():
        logger.warning(warning)
    for number, part in enumerate(about.values()):
        if number:
            reporter.out.print()
        if isinstance(part, list):
            reporter.table(part)
        else:
            reporter.header(part)
    return 0


def _info_data(options: InfoOptions, reporter: ConsoleReporter) -> int:
    from cifar_jax.cli.info_data import SHEET_CLASSES, describe, load, write_contact_sheet
    from cifar_jax.config import TrainConfig

    TrainConfig(seed=options.seed)  # checks it
    names = ("data_dir", "cache_dir", "seed", "label_key", "skip_unreadable")
    splits = load(options.topic, INFO_TOPICS, **{name: getattr(options, name) for name in names})
    about = describe(splits)
    for warning in about.warnings:
        logger.warning(warning)
    sheet = options.sheet or ("" if options.json else f"{splits.name.replace('/', '-')}-contact-sheet.png")
    if sheet:
        try:
            write_contact_sheet(splits, Path(sheet), options.seed)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{sheet} cannot be written ({reason}); name another file with --sheet.") from error
    if options.json:
        print(json.dumps(about.to_json()))
        return 0
    shown, classes = min(SHEET_CLASSES, len(splits.class_names)), len(splits.class_names)
    of_classes = f" of {shown} of the {classes:,} classes" if shown < classes else ""
    reporter.header(about.lines() | {"contact sheet": f"{sheet}, training images{of_classes}"})
    reporter.out.print()
    reporter.table(about.table())
    return 0


def _clear_cache(options: InfoOptions, reporter: ConsoleReporter) -> int:
    from cifar_jax.files import cache_root
    from cifar_jax.runtime.caches import clear

    if options.topic != "cache":
        raise UserError("--clear goes with `info cache`; say so, or leave it out.")
    root = cache_root(options.cache_dir)
    freed = clear(root)
    if options.json:
        print(json.dumps({"cache": str(root), "freed_bytes": freed}))
    else:
        reporter.print(f"{freed / 1e6:,.1f} MB have left {root}; downloaded weights stay.")
    return 0


def features(arguments: list[str], reporter: ConsoleReporter) -> int:
    """Writes the features of a data set or of image files to a file."""
    options = parse(FeaturesOptions, arguments, "features")
    from cifar_jax.data.sources.paths import picture_paths
    from cifar_jax.export.features import is_data_set, write_features
    from cifar_jax.runtime.profiling import profiled

    if not options.src:
        raise UserError(
            "features needs a data set or images; give a data set's name, a folder, or paths of PNG or JPEG files."
        )
    config = options.config()
    images = () if is_data_set(options.src) else picture_paths(options.src, read_stdin)
    use_compile_cache(options.cache_dir)
    with profiled(options.profile):
        about = write_features(config, options.out, images, overwrite=options.overwrite, reporter=reporter)
    return _print_about(about, options.json, reporter)


def convert(arguments: list[str], reporter: ConsoleReporter) -> int:
    """Converts weights to another format."""
    options = parse(ConvertOptions, arguments, "convert")
    from cifar_jax.pretrained.convert import convert as convert_weights

    shared = {"overwrite": options.overwrite, "cache_dir": options.cache_dir, "progress": reporter.progress}
    about = convert_weights(options.src, options.dst, options.to, options.variant, **shared)
    return _print_about(about, options.json, reporter)


def verify_weights(arguments: list[str], reporter: ConsoleReporter) -> int:
    """Describes a weights file and everything that is wrong with it. Returns 0 if nothing is, else 1."""
    options = parse(VerifyOptions, arguments, "verify-weights")
    from cifar_jax.pretrained.verify import verify

    shared = {"cache_dir": options.cache_dir, "progress": reporter.progress}
    found = verify(options.file, options.variant, options.against, **shared)
    if options.json:
        print(json.dumps(found.to_json()))
    else:
        reporter.verification(found, options.against)
    return 1 if found.problems else 0


def _print_about(about: dict[str, str], as_json: bool, reporter: ConsoleReporter) -> int:
    """Prints what a command wrote, for a person or as JSON. Returns 0."""
    if as_json:
        print(json.dumps(about))
    else:
        reporter.header(about)
    return 0
