"""An estimate of a job's total time, logged once the speed of its first batches is known."""

import logging

import jax

from cifar_jax.config import TrainConfig
from cifar_jax.models.backbone import AnyBackbone, Backbone
from cifar_jax.runtime.progress import Reporter, Watched
from cifar_jax.runtime.timing import Clock

logger = logging.getLogger(__name__)

MIN_BATCHES, MIN_SECONDS = 3, 2.0  # minimum over which the speed is measured
WORTH_SAYING = 60.0  # seconds; estimates below this are not logged
LONG = 600.0  # seconds; longer estimates include faster alternatives


class Forecast:
    """Watches the progress of a job, and logs an estimate of its total time once."""

    def __init__(self, work: float, clock: Clock, faster: str = "", what: str = "This job") -> None:
        """Starts an estimate.

        Args:
          work: total amount of work, in units such as images.
          clock: the clock of the job, started with it.
          faster: a sentence appended to the estimate of a long job.
          what: name of the job, the subject of the message.
        """
        self._left, self._clock, self._faster, self._what = work, clock, faster, what
        self._first: tuple[float, float] | None = None  # time and work left after the first batch
        self._batches, self._done = 0, False

    def watch(self, reporter: Reporter, weight: float = 1.0) -> Reporter:
        """Wraps a reporter so that progress of its bars, times `weight`, counts as work done."""
        return Watched(reporter, lambda work: self.note(work * weight))

    def note(self, work: float) -> None:
        """Records a completed batch. The speed is measured from the end of the first, which includes compilation."""
        self._left -= work
        if self._done:
            return
        now = self._clock.total
        if self._first is None:
            self._first = now, self._left
            return
        self._batches += 1
        seconds, done = now - self._first[0], self._first[1] - self._left
        if self._batches < MIN_BATCHES or seconds < MIN_SECONDS or done <= 0:
            return
        self._done = True
        total = now + self._left * seconds / done
        if total >= WORTH_SAYING:
            faster = f" {self._faster}" if self._faster and total > LONG else ""
            logger.info(f"{self._what} will take about {in_words(total)} in all.{faster}")


def faster_ways(config: TrainConfig, backbone: AnyBackbone, image_size: int) -> str:
    """A sentence on options not yet used that would shorten a long job on a CPU; empty if there are none."""
    if jax.default_backend() != "cpu" or not isinstance(backbone, Backbone):
        return ""
    ways = []
    if image_size > 128:
        ways.append(f"--image-size 128 (about {(128 / image_size) ** 2:.0%} of the work)")
    if config.backbone.weights != "demo" and backbone.config.width >= 64:
        ways.append("--weights demo (a much smaller network, to try things out)")
    return f"Faster on a CPU: {' or '.join(ways)}." if ways else ""


def in_words(seconds: float) -> str:
    """Formats a duration with the precision of an estimate."""
    if seconds < 5400:
        minutes = max(1, round(seconds / 60))
        return f"{minutes} minute{'s' if minutes > 1 else ''}"
    hours = seconds / 3600
    return f"{hours:.1f} hours" if hours < 10 else f"{hours:.0f} hours" if hours < 48 else f"{hours / 24:.0f} days"
