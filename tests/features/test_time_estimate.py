"""Tests of the estimate of a job's time: logged once, after the first batches, in plain words."""

from contextlib import contextmanager

import pytest
from features.test_extractor import MEANS
from helpers import forwarding_logs

from cifar_jax.config import TrainConfig
from cifar_jax.data import Dataset
from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.features.extraction import dataset_features
from cifar_jax.features.time_estimate import Forecast, faster_ways, in_words
from cifar_jax.models.preprocess import CAFFE
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained import Backbone
from cifar_jax.runtime.progress import Silent
from cifar_jax.runtime.timing import Clock


class Time:
    """A clock that is moved by hand."""

    def __init__(self):
        self.seconds = 0.0
        self.clock = Clock(lambda: self.seconds)


def messages_of(num, per_batch, seconds, compiling=20.0):
    """The messages of a job of so many images, each with the number of batches after the first one."""
    time, messages, batches = Time(), [], [-1]
    forecast = Forecast(num, time.clock, faster="Faster: cake.")
    time.seconds = compiling
    with forwarding_logs(lambda text: messages.append((text, batches[0]))):
        for _ in range(num // per_batch):
            batches[0] += 1
            forecast.note(per_batch)
            time.seconds += seconds
    return messages


def test_forecast_is_logged_once_and_leaves_compilation_out():
    # 60,000 images at 8 a quarter of a second are 1,875 s, after 20 s of compilation.
    assert messages_of(60_000, 8, 0.25) == [("This job will take about 32 minutes in all. Faster: cake.", 8)]


def test_slow_batches_are_waited_for_and_short_jobs_log_nothing():
    assert messages_of(640, 64, 30.0) == [("This job will take about 5 minutes in all.", 3)]
    assert messages_of(1000, 8, 0.25, compiling=5.0) == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(61, "1 minute"), (1895, "32 minutes"), (5399, "90 minutes"), (5400, "1.5 hours"), (10**5, "28 hours"),
     (10**6, "12 days")],
)  # fmt: skip
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words


def test_faster_ways_are_those_that_are_left():
    def ways(width=64, image_size=224, **options):
        network = Backbone(ResNetConfig(width=width), CAFFE, 224, {})
        return faster_ways(TrainConfig(**options), network, image_size)

    assert "--image-size 128 (about 33% of the work)" in ways() and "--weights demo" in ways()
    assert "--image-size" not in ways(image_size=128) and "--weights demo" in ways(image_size=128)
    assert ways(width=16, image_size=64, weights="demo") == ""


class Bars(Silent):
    """A reporter that keeps what its bars show."""

    def __init__(self):
        self.shown = []

    @contextmanager
    def progress(self, description, total, compiles=False):
        yield self.shown.append


def test_a_forecast_counts_the_steps_of_bars_and_not_where_they_begin():
    time, bars = Time(), Bars()
    forecast = Forecast(2000, time.clock)
    whole, half = forecast.watch(bars), forecast.watch(bars, weight=0.5)
    with forwarding_logs(lambda text: bars.shown.append(text)):
        for reporter, begins in ((whole, 200), (half, 0)):
            with reporter.progress("some", 400) as bar:
                for done in range(begins, begins + 101, 20):
                    bar(done)
                    time.seconds += 1.0
    # After the first 20 images, 20 a second: 1,920 are left after three batches more, in the 5th second.
    assert bars.shown[:5] == [200, 220, 240, 260, 280] and bars.shown[5] == "This job will take about 2 minutes in all."
    assert bars.shown[6:] == [300, 0, 20, 40, 60, 80, 100]


def test_extraction_shows_progress_of_uncached_images_only(tmp_path):
    config = TrainConfig(cache_dir=str(tmp_path), extract_batch_size=8)

    def shown(**numbers):
        bars, datasets = Bars(), {name: Dataset(*draw_shapes(20, seed)) for name, seed in numbers.items()}
        found = dataset_features(config, MEANS, 32, datasets, reporter=bars)
        return bars.shown, found.num_images

    assert shown(first=0, second=1) == ([0, 8, 16, 20] * 2, 40)
    assert shown(third=2, first=0, second=1) == ([0, 8, 16, 20], 20)
