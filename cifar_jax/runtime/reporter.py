"""The progress of a job, for whoever watches it. Sentences go to the logger `cifar_jax`; the library prints nothing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol


class EpochRow(NamedTuple):
    """A line of metrics.jsonl. Training figures are running means over the epoch, as Keras reports them."""

    epoch: int  # counted from one
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float


class Progress(Protocol):
    """Makes bars; see `Reporter.progress`."""

    def __call__(
        self, description: str, total: int, compiles: bool = False
    ) -> AbstractContextManager[Callable[[int], None]]:
        """A bar."""
        ...


class Reporter(Protocol):
    """Shows the progress of a job: `cifar_jax.cli.console` to a person, `Silent` to nobody."""

    def header(self, rows: dict[str, str]) -> None:
        """What is about to be done, and with what."""

    def progress(
        self, description: str, total: int, compiles: bool = False
    ) -> AbstractContextManager[Callable[[int], None]]:
        """A bar; the context's value is called with how many of `total` are done.

        With `compiles` it is called with 0 when the work begins, and says until the next call that it is compiled.
        """

    def epoch(self, row: EpochRow, num_epochs: int) -> None:
        """An epoch has ended."""


class Silent:
    """A reporter that shows nothing."""

    def header(self, rows: dict[str, str]) -> None:
        """Nothing."""

    def progress(
        self, description: str, total: int, compiles: bool = False
    ) -> AbstractContextManager[Callable[[int], None]]:
        """A bar that nobody sees."""
        return nullcontext(lambda done: None)

    def epoch(self, row: EpochRow, num_epochs: int) -> None:
        """Nothing."""


class Watched:
    """A reporter that also tells of the work that its bars show."""

    def __init__(self, reporter: Reporter, on_work: Callable[[int], None]) -> None:
        """Passes everything on to `reporter`, and calls `on_work` with each step that a bar makes."""
        self._on_work = on_work
        self._progress, self.header, self.epoch = reporter.progress, reporter.header, reporter.epoch

    @contextmanager
    def progress(self, description: str, total: int, compiles: bool = False) -> Iterator[Callable[[int], None]]:
        """A bar. Where it begins is no work of now, so its first call tells nothing."""
        before: int | None = None
        with self._progress(description, total, compiles) as bar:

            def watched(done: int) -> None:
                nonlocal before
                bar(done)
                if before is not None:
                    self._on_work(done - before)
                before = done

            yield watched
