"""Interface for reporting the progress of a job. The library prints nothing; messages go to the logger `cifar_jax`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol


class EpochRow(NamedTuple):
    """A line of metrics.jsonl. Training metrics are running means over the epoch, as Keras reports them."""

    epoch: int  # from 1
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float


class Progress(Protocol):
    """Type of `Reporter.progress`."""

    def __call__(
        self, description: str, total: int, compiles: bool = False
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Shows a progress bar for a block; yields a function to call with the number of `total` items done.

        With `compiles`, the first call is with 0 when the work starts, and the bar shows `compiling` until the next.
        """
        ...


class Reporter(Protocol):
    """Receiver of a job's progress: `cifar_jax.cli.console` prints it, `Silent` discards it."""

    @property
    def progress(self) -> Progress:
        """Shows a progress bar."""
        ...

    def header(self, rows: dict[str, str]) -> None:
        """Shows the job's settings, before it starts."""

    def epoch(self, row: EpochRow, num_epochs: int) -> None:
        """Shows the metrics of a finished epoch."""


class Silent:
    """A reporter that discards everything."""

    def progress(
        self, description: str, total: int, compiles: bool = False
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Does nothing."""
        return nullcontext(lambda done: None)

    def header(self, rows: dict[str, str]) -> None:
        """Does nothing."""

    def epoch(self, row: EpochRow, num_epochs: int) -> None:
        """Does nothing."""


class Watched:
    """A reporter that also calls a function with the work done, as its progress bars show it."""

    def __init__(self, reporter: Reporter, on_work: Callable[[int], None]) -> None:
        """Forwards everything to `reporter` and calls `on_work` with each increment of a progress bar."""
        self._on_work = on_work
        self._progress, self.header, self.epoch = reporter.progress, reporter.header, reporter.epoch

    @contextmanager
    def progress(self, description: str, total: int, compiles: bool = False) -> Iterator[Callable[[int], None]]:
        """Shows a progress bar. Its first call sets the starting point and counts as no work."""
        before: int | None = None
        with self._progress(description, total, compiles) as bar:

            def update(done: int) -> None:
                nonlocal before
                bar(done)
                if before is not None:
                    self._on_work(done - before)
                before = done

            yield update
