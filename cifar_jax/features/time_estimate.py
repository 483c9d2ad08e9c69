"""A forecast of how long a job takes, logged once its first batches show how fast it goes."""

import logging
import time
from collections.abc import Callable

import jax

from cifar_jax.config import TrainConfig
from cifar_jax.models.backbone import AnyBackbone, Backbone
from cifar_jax.runtime.progress import Reporter, Watched

logger = logging.getLogger(__name__)

MIN_BATCHES, MIN_SECONDS = 3, 2.0  # that the speed is measured over
WORTH_SAYING = 60.0  # seconds: shorter jobs are over before anybody wonders
LONG = 600.0  # seconds: of longer ones people like to know a faster way


class Forecast:
    """Logs once how long the work takes whose progress it watches."""

    def __init__(
        self,
        work: float,
        started: float | None = None,
        faster: str = "",
        what: str = "This job",
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Nothing is known yet.

        Args:
          work: all that is to be done, in units such as images.
          started: when the job began, by `now`; now if None.
          faster: a sentence that follows where the job is long.
          what: the work that is meant.
          now: the clock, in seconds.
        """
        self._left, self._faster, self._what, self._now = work, faster, what, now
        self._started = now() if started is None else started
        self._first: tuple[float, float] | None = None
        self._batches, self._done = 0, False

    def watch(self, reporter: Reporter, weight: float = 1.0) -> Reporter:
        """The same reporter, whose bars count towards the work, each of their units as much as `weight`."""
        return Watched(reporter, lambda work: self.note(work * weight))

    def note(self, work: float) -> None:
        """A batch is done. The first one is the one that was compiled, so speed is measured from its end on."""
        self._left -= work
        if self._done:
            return
        now = self._now()
        if self._first is None:
            self._first = now, self._left
            return
        self._batches += 1
        seconds, done = now - self._first[0], self._first[1] - self._left
        if self._batches < MIN_BATCHES or seconds < MIN_SECONDS or done <= 0:
            return
        self._done = True
        total = now - self._started + self._left * seconds / done
        if total >= WORTH_SAYING:
            faster = f" {self._faster}" if self._faster and total > LONG else ""
            logger.info(f"{self._what} will take about {in_words(total)} in all.{faster}")


def faster_ways(config: TrainConfig, backbone: AnyBackbone, image_size: int) -> str:
    """Ways to shorten a long job on a CPU, beyond those that were taken already; empty if there are none."""
    if jax.default_backend() != "cpu" or not isinstance(backbone, Backbone):
        return ""
    ways = []
    if image_size > 128:
        ways.append(f"--image-size 128 (about {(128 / image_size) ** 2:.0%} of the work)")
    if config.backbone.weights != "demo" and backbone.config.width >= 64:
        ways.append("--weights demo (a much smaller network, to try things out)")
    return f"Faster on a CPU: {' or '.join(ways)}." if ways else ""


def in_words(seconds: float) -> str:
    """A duration with as many digits as a forecast deserves."""
    if seconds < 5400:
        minutes = max(1, round(seconds / 60))
        return f"{minutes} minute{'s' if minutes > 1 else ''}"
    hours = seconds / 3600
    return f"{hours:.1f} hours" if hours < 10 else f"{hours:.0f} hours" if hours < 48 else f"{hours / 24:.0f} days"
