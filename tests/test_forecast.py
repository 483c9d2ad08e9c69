"""The forecast of how long a job takes: after the first batches, once, and in plain words."""

import pytest
from helpers import hearing

from cifar_jax.config import TrainConfig
from cifar_jax.data import Dataset
from cifar_jax.data.shapes import draw_shapes
from cifar_jax.extraction import dataset_features
from cifar_jax.forecast import Forecast, faster_ways, in_words
from cifar_jax.preprocess import CAFFE
from cifar_jax.pretrained import Backbone, load_backbone
from cifar_jax.resnet import ResNetConfig


def said_of(num, per_batch, seconds, compiling=20.0):
    """What is said of a job of so many images, and how many batches after the first one."""
    said, clock, lefts = [], [compiling], range(num - per_batch, -1, -per_batch)
    forecast = Forecast(lambda: clock[0], "Faster: cake.")
    with hearing(lambda text: said.append((text, lefts.index(left)))):
        for left in lefts:
            forecast.note(left)
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


def test_extraction_counts_what_is_left_of_all_data_sets(tmp_path):
    config = TrainConfig(cache_dir=str(tmp_path), extract_batch_size=8, weights="demo", image_size=32)
    backbone = load_backbone("demo")
    some, others = (Dataset(*draw_shapes(20, seed=seed)) for seed in (0, 1))

    def left_of(**datasets):
        left = []
        dataset_features(config, backbone, 32, datasets, on_batch=left.append)
        return left

    assert left_of(first=some, second=others) == [32, 24, 20, 12, 4, 0]
    third = Dataset(*draw_shapes(20, seed=2))
    assert left_of(third=third, first=some, second=others) == [12, 4, 0]  # what is kept costs nothing
