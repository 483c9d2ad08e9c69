"""Rows of `predict`: for a person, as JSON lines or as CSV, each written as soon as it is known."""

import contextlib
import csv
import json
import os
import stat
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Literal

from cifar_jax.cli.console import ConsoleReporter
from cifar_jax.cli.escape import printable
from cifar_jax.runtime.progress import Reporter, Silent

if TYPE_CHECKING:  # imports JAX
    from cifar_jax.runs.predict import Prediction

Format = Literal["plain", "json", "csv"]
COLUMNS = ("path", "label", "probability", "error")  # of CSV, before one for each class


def print_predictions(
    predict: Callable[[Reporter], Generator["Prediction", None, None]],
    class_names: Sequence[str],
    layout: Format,
    reporter: ConsoleReporter,
) -> int:
    """Prints a row for each prediction on standard output. Returns the number of rows with an error.

    A progress bar on standard error does not touch the rows. It ends with the first row where they appear on a terminal
    as well, as those of a pipe do when another command passes them on.

    Args:
      predict: makes the predictions, given a reporter of their progress.
      class_names: class names by label.
      layout: of the rows.
      reporter: prints them.
    """
    # Not sys.stdout, which rich sends to standard error while a bar is shown.
    out, failed = reporter.out.file, 0
    table = csv.writer(out, lineterminator="\n")
    if layout == "csv":
        # A class may have the name of a column.
        table.writerow([*COLUMNS, *(f"class {name}" if name in COLUMNS else name for name in class_names)])
    shown = _UntilFirst(reporter) if reporter.out.is_terminal or _is_pipe(out) else reporter
    with contextlib.closing(predict(shown)) as predictions:
        for prediction in predictions:
            failed += bool(prediction.error)
            if layout == "csv":
                table.writerow(_cells(prediction, len(class_names)))
            else:
                print(_json(prediction, class_names) if layout == "json" else _plain(prediction), file=out)
            if reporter.out.is_terminal:
                out.flush()
    return failed


def _is_pipe(out: IO[str]) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(out.fileno()).st_mode)
    except (OSError, ValueError):  # not a file of the operating system
        return False


class _UntilFirst(Silent):
    """A reporter whose progress bar ends when the first of the work is done."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    @contextlib.contextmanager
    def progress(self, description: str, total: int, compiles: bool = False) -> Iterator[Callable[[int], None]]:
        with contextlib.ExitStack() as shown:
            bar = shown.enter_context(self._reporter.progress(description, total, compiles))
            yield lambda done: shown.close() if done else bar(done)


def _plain(prediction: "Prediction") -> str:
    probs = "  ".join(f"{name} {prob:.3f}" for name, prob in prediction.top)
    return printable(f"{prediction.path}  {probs or f'error: {prediction.error}'}")


def _json(prediction: "Prediction", class_names: Sequence[str]) -> str:
    row = {"path": prediction.path, "label": None, "probability": None, "error": prediction.error or None}
    if prediction.error:
        return json.dumps(row | {"probabilities": None})
    probabilities = dict(zip(class_names, map(float, _digits(prediction)), strict=True))
    label, _ = prediction.top[0]
    return json.dumps(row | {"label": label, "probability": probabilities[label], "probabilities": probabilities})


def _cells(prediction: "Prediction", num_classes: int) -> list[str]:
    if prediction.error:
        return [prediction.path, "", "", prediction.error, *[""] * num_classes]
    digits = _digits(prediction)
    return [prediction.path, prediction.top[0][0], digits[prediction.probabilities.argmax()], "", *digits]


def _digits(prediction: "Prediction") -> list[str]:
    """The probabilities with the fewest digits that give the same float32 again."""
    return [str(prob) for prob in prediction.probabilities]
