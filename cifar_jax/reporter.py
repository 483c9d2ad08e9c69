"""Who is shown what a job does. The library prints nothing itself, and logs its sentences by `logging`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from cifar_jax.fit import EpochRow


class Progress(Protocol):
    """Makes bars; see `Reporter.progress`."""

    def __call__(
        self, description: str, total: int, compiles: bool = False
    ) -> AbstractContextManager[Callable[[int], None]]:
        """A bar."""
        ...


class Reporter(Protocol):
    """Who is told what the job does; `cifar_jax.console` shows it to a person, `Silent` to nobody."""

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

    def confirm(self, question: str) -> bool:
        """Asks for a yes; False where nobody can be asked."""


class Silent:
    """A reporter that tells nobody."""

    def header(self, rows: dict[str, str]) -> None:
        """Nothing."""

    def progress(
        self, description: str, total: int, compiles: bool = False
    ) -> AbstractContextManager[Callable[[int], None]]:
        """A bar that nobody sees."""
        return nullcontext(lambda done: None)

    def epoch(self, row: EpochRow, num_epochs: int) -> None:
        """Nothing."""

    def confirm(self, question: str) -> bool:
        """No."""
        return False
