"""What a run does once: a copy of the backbone, an upload of features, an evaluation of an epoch, a look at pixels."""

import hashlib
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cifar_jax import (
    FunctionBackbone,
    Split,
    cross_entropy,
    dense_head,
    evaluate,
    init_state,
    live_task,
    make_evaluate,
)
from cifar_jax.config import TrainConfig
from cifar_jax.experiment import train
from cifar_jax.runtime.progress import Silent
from cifar_jax.train.evaluate import EvalSums

WIDTH, NUM_TEST = 37, 50
KERNEL = np.random.default_rng(0).normal(size=(32 * 32 * 3, WIDTH)).astype(np.float32) / 50


def features(kernel, images):
    return jnp.tanh(images.reshape(len(images), -1).astype(jnp.float32) @ kernel / 255)


class Watching(Silent):
    """A reporter that looks at the devices after each epoch, and keeps the names of bars."""

    def __init__(self):
        self.bars, self.arrays = [], []

    def epoch(self, row, num_epochs):
        self.arrays.append([array.shape for array in jax.live_arrays()])

    @contextmanager
    def progress(self, description, total, compiles=False):
        self.bars.append(description)
        yield lambda done: None


@pytest.fixture
def run(tmp_path, narrow):
    def run(mode, **more):
        options = {"train_examples": 160, "test_examples": NUM_TEST, "epochs": 2, "hidden": (8,), "batch_size": 32}
        places = {"out": str(tmp_path / mode), "cache_dir": str(tmp_path / "cache")}
        watching = Watching()
        backbone = FunctionBackbone(features, KERNEL, "a projection")
        train(TrainConfig(dataset="shapes", mode=mode, **options, **places, **more), watching, backbone=backbone)
        return watching

    return run


def test_a_frozen_backbone_lies_on_the_devices_once(run):
    assert [shapes.count(KERNEL.shape) for shapes in run("live").arrays] == [1, 1]


def test_cached_features_lie_on_the_devices_once(run):
    for shapes in run("cached").arrays:
        assert shapes.count((NUM_TEST, WIDTH)) == 1 and shapes.count((160, WIDTH)) == 1
        assert KERNEL.shape not in shapes


@pytest.mark.parametrize(
    ("more", "evaluated"), [({}, ["test"] * 2), ({"val_fraction": 0.25}, ["held-out"] * 2 + ["test"])]
)
def test_each_epoch_is_evaluated_once(run, more, evaluated):
    bars = [bar for bar in run("live", **more).bars if bar.startswith("Evaluating")]
    assert bars == [f"Evaluating {split} images" for split in evaluated]


def test_a_backbone_of_numpy_arrays_is_put_on_the_devices_by_its_task():
    images, labels = np.zeros((20, 32, 32, 3), np.uint8), np.zeros(20, np.int32)
    split = Split(images, labels)
    head = dense_head(())
    task = live_task(head.init(jax.random.key(0), WIDTH, 2), head, KERNEL, features, {"train": split, "val": split})
    state, score = init_state(task.params, optax.sgd(0.1)), make_evaluate(task, cross_entropy)
    assert isinstance(task.frozen, jax.Array)
    score(state)  # compiles
    with jax.transfer_guard_host_to_device("disallow"):  # images are sent by explicit transfers, which it allows
        score(state)
    host = jax.device_get(state)
    with jax.transfer_guard_host_to_device("disallow"):
        score(host)  # as the state of a resumed run


def test_evaluation_keeps_the_devices_busy():
    """Batches are handed out before the first of them is waited for, and not all of them at once."""
    events = []

    def step(params, batch):
        events.append("step")
        size = len(batch.labels)
        return EvalSums(np.float32(0), np.diag([size, 0]), np.zeros((size, 2), np.float32))

    evaluate(step, {}, np.zeros((40, 3), np.float32), np.zeros(40, np.int32), 4, lambda _: events.append("done"))
    assert events.index("done") >= 2 and events.count("step") == events.count("done") == 10
    ahead = np.cumsum([1 if event == "step" else -1 for event in events])
    assert ahead.max() <= 4


def test_pixels_are_hashed_once(run, monkeypatch):
    sizes, usual = [], hashlib.sha256

    class Counting:
        def __init__(self, data=b""):
            self._digest = usual()
            self.update(data)

        def update(self, data):
            sizes.append(memoryview(data).nbytes)
            self._digest.update(data)

        def __getattr__(self, name):
            return getattr(self._digest, name)

    monkeypatch.setattr(hashlib, "sha256", Counting)
    run("cached")
    pixels = 32 * 32 * 3
    assert sizes.count(160 * pixels) == 1 and sizes.count(NUM_TEST * pixels) == 1
