"""A function in a process of its own: libraries whose threads would fight in one process take turns in several."""

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Any

# Threads of OpenMP and its like go on spinning for a while after their last work.
SETTLE_SECONDS = 0.25

_made: Callable[..., Any]  # in the worker's process: what its `make` returned


class Worker:
    """What `make(*arguments)` returns, a function, made and called in another process that lives until `close`.

    Exceptions come back to the caller. Everything that goes there and back is pickled, outside of what is timed.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]], *arguments: Any, environment: Mapping[str, str]):
        """Starts the process; `environment` is set in it before any library is imported."""
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, (dict(environment),))
        try:
            self._pool.submit(_make, make, arguments).result()
        except BaseException:
            self.close()
            raise

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        return self._pool.submit(_call, arguments).result()

    def seconds(self, *arguments: Any) -> float:
        """How long the function takes, measured where it runs; its result stays there."""
        return float(self._pool.submit(_time, arguments).result())

    def close(self) -> None:
        """Ends the process."""
        self._pool.shutdown()

    def __enter__(self) -> "Worker":
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ends the process."""
        self.close()


def interleaved(timed: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each gives in each round: one after the other, A B C A B C, so that a slow minute slows them all."""
    values: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, measure in timed.items():
            time.sleep(SETTLE_SECONDS)
            values[name].append(measure())
    return values


def _start(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def _make(make: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    global _made
    _made = make(*arguments)


def _call(arguments: tuple[Any, ...]) -> Any:
    return _made(*arguments)


def _time(arguments: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    _made(*arguments)
    return time.perf_counter() - start
