"""Commands on a trained model, a run or what was exported from one: evaluate, predict, export."""

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_jax.cli.compiled import use_compile_cache
from cifar_jax.cli.console import ConsoleReporter
from cifar_jax.cli.options import EvaluateOptions, ExportOptions, PredictOptions, parse
from cifar_jax.cli.parsing import program
from cifar_jax.cli.stdio import read_stdin
from cifar_jax.errors import RunError, UserError
from cifar_jax.files import without_nan

if TYPE_CHECKING:  # imports JAX
    from cifar_jax.export.exported import ExportedModel

MOST_BATCH = 1024  # images


def evaluate(arguments: list[str], reporter: ConsoleReporter) -> int:
    """Scores a run or an exported model again, on its test images or on other labelled pictures."""
    options = parse(EvaluateOptions, arguments, "evaluate")
    from cifar_jax.cli.scores import print_scores
    from cifar_jax.runs.scores import evaluate_model, evaluate_run

    if options.dataset is None and (options.label_key is not None or options.skip_unreadable):
        given = "--skip-unreadable" if options.label_key is None else f"--label-key {options.label_key}"
        raise UserError(f"{given} goes with --dataset; a run's own test images are read as they were for the run.")
    if options.dataset is not None and not options.dataset.strip():
        raise UserError(f"--dataset must be a name or a path, got {options.dataset!r}.")
    _check_batch_size(options.batch_size)
    use_compile_cache()
    shared: dict[str, Any] = {
        "dataset": options.dataset,
        "label_key": options.label_key,
        "skip_unreadable": options.skip_unreadable,
        "batch_size": options.batch_size,
        "reporter": reporter,
    }
    if exported := _exported(options, options.data_dir):
        scores = evaluate_model(exported, **shared)
    else:
        of_run = {"weights": options.weights, "allow_incomplete": options.allow_incomplete}
        scores = evaluate_run(options.run, options.data_dir, **of_run, **shared)
    if options.json:
        print(json.dumps(without_nan(scores)))
    else:
        print_scores(scores, reporter)
    return 0


def predict(arguments: list[str], reporter: ConsoleReporter) -> int:
    """Classifies pictures and prints a row for each.

    Raises:
      RunError: if any of them cannot be read; the rows of the others are printed all the same.
    """
    options = parse(PredictOptions, arguments, "predict")
    from cifar_jax.cli.predictions import print_predictions
    from cifar_jax.data.sources.paths import picture_paths
    from cifar_jax.runs.predict import input_resize, predict_files
    from cifar_jax.runs.reader import load_run

    if not options.sources:
        raise UserError(
            "predict needs images; give image files, folders or patterns after the run directory, or - for a list on "
            "standard input."
        )
    if options.csv and options.json:
        raise UserError("--csv and --json ask for two formats; leave one of them out.")
    if options.top < 1:
        raise UserError(f"--top must be at least 1, got {options.top}.")
    _check_batch_size(options.batch_size)
    _check_order(options)
    paths = picture_paths(options.sources, read_stdin)
    use_compile_cache()
    model = _exported(options) or load_run(options.run, options.weights, allow_incomplete=options.allow_incomplete)
    input_resize(model, options.direct)  # checks it, before the header of a table is printed
    failed = print_predictions(
        lambda shown: predict_files(model, paths, options.direct, options.top, shown, options.batch_size),
        model.class_names,
        "csv" if options.csv else "json" if options.json else "plain",
        reporter,
    )
    if failed:
        raise RunError(f"{failed:,} of {len(paths):,} images could not be read; see their rows for the reasons.")
    return 0


def _check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None and not 1 <= batch_size <= MOST_BATCH:
        raise UserError(f"--batch-size must be 1 to {MOST_BATCH:,}, got {batch_size}.")


def _exported(options: EvaluateOptions | PredictOptions, data_dir: str | None = None) -> "ExportedModel | None":
    """Loads the model if it is an exported one.

    Raises:
      UserError: for options of runs.
    """
    from cifar_jax.export.exported import is_exported, load_exported

    if not is_exported(options.run):
        return None
    if options.weights is not None or options.allow_incomplete:
        given = "--allow-incomplete" if options.weights is None else f"--weights {options.weights}"
        raise UserError(f"{given} goes with a run directory, but {options.run} is an exported model; leave it out.")
    return load_exported(options.run, data_dir)


def _check_order(options: PredictOptions) -> None:
    """Raises UserError if the run directory is given after the images."""
    from cifar_jax.runs.directory import is_run

    runs = [path for path in options.sources if os.path.isdir(path) and is_run(Path(path))]
    if runs and not is_run(Path(options.run)):
        images = [options.run, *(path for path in options.sources if path != runs[0])]
        few = [*images[:3], "..."] if len(images) > 3 else images
        raise UserError(
            "The run directory comes before the images: "
            f"`{program()} predict {' '.join(map(shlex.quote, [runs[0], *few]))}`."
        )


def export(arguments: list[str], reporter: ConsoleReporter) -> int:
    """Exports a run to a format that other runtimes read."""
    options = parse(ExportOptions, arguments, "export")
    from cifar_jax.export.exported import is_exported
    from cifar_jax.export.target import check_out
    from cifar_jax.export.write import FORMATS, export_run, out_path
    from cifar_jax.runs.reader import load_run

    if is_exported(options.run):
        raise UserError(f"{options.run} is not a run directory. Models are exported from the run that `train` wrote.")
    # Before the run is loaded.
    check_out(out_path(options.out), options.format, FORMATS[options.format].suffix, options.overwrite)
    use_compile_cache()
    run = load_run(options.run, options.weights, allow_incomplete=options.allow_incomplete)
    about = export_run(run, options.format, options.out, overwrite=options.overwrite, ort_web=options.ort_web)
    if options.json:
        print(json.dumps(about))
        return 0
    if options.format in ("onnx", "stablehlo"):
        about["try"] = f"{program()} predict {shlex.quote(options.out)} PICTURE..."
    reporter.header(about)
    return 0
