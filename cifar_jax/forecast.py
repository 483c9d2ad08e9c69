"""How long a job takes in all, said once its first batches show how fast it goes."""

from collections.abc import Callable

import jax

from cifar_jax.clock import Clock
from cifar_jax.config import TrainConfig
from cifar_jax.pretrained.backbone import Backbone

MIN_BATCHES, MIN_SECONDS = 3, 2.0  # that the speed is measured over
WORTH_SAYING = 60.0  # seconds: shorter jobs are over before anybody wonders
LONG = 600.0  # seconds: of longer ones people like to know a faster way


class Forecast:
    """Says once how long the job takes."""

    def __init__(
        self, say: Callable[[str], None], now: Callable[[], float], faster: str = "", what: str = "This job"
    ) -> None:
        """Nothing is known yet.

        Args:
          say: is called with the sentence, if at all.
          now: seconds since the job began.
          faster: a sentence that follows where the job is long.
          what: the work that is meant.
        """
        self._say, self._now, self._faster, self._what = say, now, faster, what
        self._first: tuple[float, float] | None = None
        self._batches, self._done = 0, False

    def note(self, left: float) -> None:
        """A batch is done.

        Args:
          left: how much of the work is still to do, in whatever unit. The first batch is the one that was compiled, so
            speed is measured from its end on.
        """
        if self._done:
            return
        now = self._now()
        if self._first is None:
            self._first = now, left
            return
        self._batches += 1
        seconds, done = now - self._first[0], self._first[1] - left
        if self._batches < MIN_BATCHES or seconds < MIN_SECONDS or done <= 0:
            return
        self._done = True
        total = now + left * seconds / done
        if total >= WORTH_SAYING:
            faster = f" {self._faster}" if self._faster and total > LONG else ""
            self._say(f"{self._what} will take about {in_words(total)} in all.{faster}")


def forecast_of(
    config: TrainConfig, backbone: Backbone, image_size: int, clock: Clock, say: Callable[[str], None]
) -> Forecast:
    """A forecast of a job that began with the clock, and on a CPU names what makes it shorter."""
    faster = faster_ways(config, backbone, image_size) if jax.default_backend() == "cpu" else ""
    # On cached features an epoch takes seconds, which are not known yet.
    what = "Extracting the features" if config.optim.mode == "cached" else "This job"
    return Forecast(say, lambda: clock.total, faster, what)


def faster_ways(config: TrainConfig, backbone: Backbone, image_size: int) -> str:
    """What makes a long job on a CPU short, beyond what it has been told already; nothing if there is nothing."""
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
