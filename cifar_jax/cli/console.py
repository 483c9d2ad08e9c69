"""Console output of the commands: bars and tables on a terminal, plain machine-readable lines elsewhere."""

import contextlib
import logging
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cifar_jax.cli.escape import printable
from cifar_jax.cli.parsing import program
from cifar_jax.cli.tables import pair_lines, sentence_lines, table_lines
from cifar_jax.runtime.progress import EpochRow

if TYPE_CHECKING:
    from cifar_jax.pretrained.verify import TensorRow, Verification


class _Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "", style="cyan")


class _TimeLeft(TimeRemainingColumn):
    """Estimated time left, or until the first item is done the reason for the wait."""

    max_refresh = 0.0  # seconds; rich would show the first reason for half a second

    def render(self, task: Task) -> Text:
        if task.completed:
            return super().render(task)
        return Text("compiling" if task.fields["compiling"] else "starting", style="cyan")


class ConsoleHandler(logging.Handler):
    """Prints log records for the user above the progress bars of the same console."""

    def __init__(self, console: Console) -> None:
        """Prints to `console`, the one that shows the bars."""
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record; warnings and errors are highlighted."""
        try:
            is_warning = record.levelno >= logging.WARNING
            lines = [printable("Warning: " * is_warning + record.getMessage())]
            if self._console.is_terminal:
                lines = sentence_lines(lines[0], self._console.width)
            self._console.print("\n".join(lines), style="bold yellow" if is_warning else None, markup=False)
        except Exception:  # the contract of logging handlers: a record that cannot be printed must not end a run
            self.handleError(record)


class ConsoleReporter:
    """Reporter that prints to the standard streams."""

    def __init__(self, out: Console | None = None, err: Console | None = None) -> None:
        """Prints results to `out`, warnings and bars to `err`, so that `train.py > log` gives a clean log.

        They default to whatever sys.stdout and sys.stderr are at the time of each call.
        """
        self.out = out or Console(highlight=False, soft_wrap=True, emoji=False)
        self.err = err or Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self.bars = self.err.is_terminal
        self._header_shown = False

    @contextlib.contextmanager
    def logged(self) -> Iterator[None]:
        """Prints the library's log records for the duration of the block."""
        library, handler = logging.getLogger("cifar_jax"), ConsoleHandler(self.err)
        level = library.level
        library.addHandler(handler)
        library.setLevel(min(library.getEffectiveLevel(), logging.INFO))
        try:
            yield
        finally:
            library.setLevel(level)
            library.removeHandler(handler)

    def mute(self) -> None:
        """Prints nothing from now on, as in all processes of a run but the first."""
        self.out.quiet = self.err.quiet = True

    def print(self, text: str) -> None:
        """Prints a line of the command's results."""
        self.out.print(printable(text), markup=False)

    def confirm(self, question: str) -> bool:
        """Asks a yes/no question. Returns False without asking where there is no terminal."""
        if not (sys.stdin.isatty() and self.err.is_terminal):
            return False
        self.err.print(f"{printable(question)} [y/N] ", end="", markup=False)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    @contextlib.contextmanager
    def progress(self, description: str, total: int, compiles: bool = False) -> Iterator[Callable[[int], None]]:
        """Shows a progress bar with rate and time left, and removes it when the block ends."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            _Rate(),
            _TimeLeft(),
        )
        with Progress(*columns, console=self.err, transient=True, disable=not self.bars, expand=True) as bars:
            task = bars.add_task(printable(description), total=total, compiling=False)
            yield lambda done: bars.update(task, completed=done, compiling=compiles and done == 0)

    def epoch(self, row: EpochRow, num_epochs: int) -> None:
        """Prints the metrics of an epoch: a row of a table on a terminal, where the first has a header, else a line."""
        if not self.out.is_terminal:
            self.print(
                f"epoch {row.epoch}/{num_epochs}  train_loss {row.train_loss:.4f}  "
                f"train_accuracy {row.train_accuracy:.4f}  val_loss {row.val_loss:.4f}  "
                f"val_accuracy {row.val_accuracy:.4f}  seconds {row.seconds:.1f}"
            )
            return
        counter = f"{row.epoch}/{num_epochs}"
        width = max(len("epoch"), 2 * len(str(num_epochs)) + 1)
        if not self._header_shown:
            self._header_shown = True
            self.out.print(Text(f"{'epoch':>{width}}  train loss  accuracy  val loss  accuracy  seconds", style="bold"))
        self.print(
            f"{counter:>{width}}  {row.train_loss:>10.4f}  {row.train_accuracy:>8.4f}  {row.val_loss:>8.4f}  "
            f"{row.val_accuracy:>8.4f}  {row.seconds:>7.1f}"
        )

    def closing(self, out: Path, summary: Mapping[str, Any]) -> None:
        """Prints the results of a finished run, how long it took, and the paths of its files."""
        rows = {}
        for split in ("val", "test"):
            if f"{split}_accuracy_interval_95" in summary:
                low, high = summary[f"{split}_accuracy_interval_95"]
                name = (summary["val_split"] if split == "val" else "test").replace("_", "-")
                count = summary["num_val" if split == "val" else "num_test"]
                accuracy = summary[f"{split}_accuracy"]
                rows[f"{split}_accuracy"] = (
                    f"{accuracy:.4f} on {count:,} {name} images, 95 % interval {low:.4f} to {high:.4f}"
                )
        rows["seconds"] = ", ".join(
            f"{phase} {value:.1f}" for phase, value in summary["seconds"].items() if value >= 0.05
        )
        if summary["seconds_to_first_step"] is not None:
            rows["first step"] = f"after {summary['seconds_to_first_step']:.1f} seconds"
        if summary["images_per_second"]:
            rate, seconds = summary["images_per_second"], summary["compile_seconds"]
            rows["backbone"] = f"{rate:,.0f} images per second, after {seconds:.1f} seconds of compilation"
        names = ("samples.png", "curves.png", "predictions.png", "confusion.png")
        of_test = ("test_predictions.png", "test_confusion.png") if "test_accuracy" in summary else ()
        if summary["val_split"] == "held_out":
            rows["epoch"] = f"{summary['selected_epoch']} of {summary['epochs']}, the best on the validation images"
        rows["figures"] = f"{out}/{', '.join((*names, *of_test))}"
        rows["files"] = f"{out}/summary.json, metrics.jsonl, config.json"
        rows["predict"] = f"{program()} predict {shlex.quote(str(out))} PICTURE..."
        self.header(rows)

    def verification(self, found: "Verification", against: str | None) -> None:
        """Prints the description of a weights file, a table of its tensors, and the verdict."""
        self.header(found.about)
        self.out.print()
        rows = [_tensor_cells(row) for row in found.tensors]
        if not any(row["problem"] for row in rows):
            rows = [{name: cell for name, cell in row.items() if name != "problem"} for row in rows]
        self.table(rows)
        self.out.print()
        if found.fingerprint:
            self.header({"fingerprint": ", ".join(f"{name} {_figures(v)}" for name, v in found.fingerprint.items())})
        if found.differences:
            difference = ", ".join(f"{name} {value:.2g}" for name, value in found.differences.items())
            self.header({f"against {against}": f"max|a-b| / max|b|: {difference}"})
        self.header({"verdict": "no problems" if not found.problems else f"{len(found.problems)} problems"})
        for problem in found.problems:
            self.print(f"  {problem}")

    def table(self, rows: list[dict[str, Any]]) -> None:
        """Prints rows of equal columns as a table, tab-separated where stdout is not a terminal."""
        if not self.out.is_terminal:
            for line in [list(rows[0]), *(list(row.values()) for row in rows)]:
                # rich would expand the tabs to spaces
                print(*(printable(str(cell)) for cell in line), sep="\t", file=self.out.file)
            return
        self._lines(table_lines(rows, self.out.width))

    def header(self, rows: Mapping[str, str]) -> None:
        """Prints `name  value` lines."""
        self._lines(pair_lines(rows, self.out.width if self.out.is_terminal else None))

    def _lines(self, lines: Iterable[Text]) -> None:
        for line in lines:
            self.out.print(line)


def _tensor_cells(row: "TensorRow") -> dict[str, str]:
    figures = {name: getattr(row, name) for name in ("mean", "std", "low", "high")}
    return {
        "tensor": row.name,
        "shape": "x".join(map(str, row.shape)),
        "is": row.fate,
        "as": row.role,
        **{name: "" if value is None else f"{value:.4g}" for name, value in figures.items()},
        "problem": row.problem,
    }


def _figures(value: Any) -> str:
    """Formats a number or a list of numbers to as many digits as machines agree on."""
    if isinstance(value, list):
        return " ".join(map(_figures, value))
    return f"{value:.5g}" if isinstance(value, float) else str(value)
