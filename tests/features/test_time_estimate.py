"""The forecast of how long a job takes: after the first batches, once, and in plain words."""

from contextlib import contextmanager

import pytest
from helpers import hearing

from cifar_jax.config import TrainConfig
from cifar_jax.data import Dataset
from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.features.extraction import dataset_features
from cifar_jax.features.time_estimate import Forecast, faster_ways, in_words
from cifar_jax.models.preprocess import CAFFE
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained import Backbone, load_backbone
from cifar_jax.runtime.progress import Silent


def said_of(num, per_batch, seconds, compiling=20.0):
    """What is said of a job of so many images, and how many batches after the first one."""
    said, clock, batches = [], [compiling], [-1]
    forecast = Forecast(num, started=0.0, faster="Faster: cake.", now=lambda: clock[0])
    with hearing(lambda text: said.append((text, batches[0]))):
        for _ in range(num // per_batch):
            batches[0] += 1
            forecast.note(per_batch)
            clock[0] += seconds
    return said


def test_the_forecast_is_said_once_and_leaves_compilation_out():
    # 60,000 images at 8 a quarter of a second are 1,875 s, after 20 s of compilation.
    assert said_of(60_000, 8, 0.25) == [("This job will take about 32 minutes in all. Faster: cake.", 8)]


def test_slow_batches_are_waited_for_and_short_jobs_pass_in_silence():
    assert said_of(640, 64, 30.0) == [("This job will take about 5 minutes in all.", 3)]
    assert said_of(1000, 8, 0.25, compiling=5.0) == []


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
    clock, bars = [0.0], Bars()
    forecast = Forecast(2000, started=0.0, now=lambda: clock[0])
    whole, half = forecast.watch(bars), forecast.watch(bars, weight=0.5)
    with hearing(lambda text: bars.shown.append(text)):
        for reporter, begins in ((whole, 200), (half, 0)):
            with reporter.progress("some", 400) as bar:
                for done in range(begins, begins + 101, 20):
                    bar(done)
                    clock[0] += 1.0
    # After the first 20 images, 20 a second: 1,920 are left after three batches more, in the 5th second.
    assert bars.shown[:5] == [200, 220, 240, 260, 280] and bars.shown[5] == "This job will take about 2 minutes in all."
    assert bars.shown[6:] == [300, 0, 20, 40, 60, 80, 100]


def test_extraction_shows_what_is_done_and_kept_features_cost_nothing(tmp_path, said):
    config = TrainConfig(cache_dir=str(tmp_path), extract_batch_size=8, weights="demo", image_size=32)
    backbone = load_backbone("demo")
    some, others = (Dataset(*draw_shapes(20, seed=seed)) for seed in (0, 1))

    def shown_of(**datasets):
        bars = Bars()
        found = dataset_features(config, backbone, 32, datasets, reporter=bars)
        return bars.shown, found.num_images

    assert shown_of(first=some, second=others) == ([0, 8, 16, 20] * 2, 40)
    assert shown_of(third=Dataset(*draw_shapes(20, seed=2)), first=some, second=others) == ([0, 8, 16, 20], 20)
