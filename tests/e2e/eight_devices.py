"""Run by test_parallel.py in a process with eight devices: the results of one, to rounding, and what is exchanged."""

import json
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from features.test_pipeline import count_compilations
from helpers import narrow_networks, without_pictures
from tasks import batch_of, fitted, on_all_layers, on_features, on_images, start_of, steps_of

from benchmarks.hlo import collectives
from cifar_jax.config import TrainConfig
from cifar_jax.data.augment import AUGMENTATIONS
from cifar_jax.errors import UserError
from cifar_jax.experiment import train
from cifar_jax.features.extractor import make_extractor
from cifar_jax.models.head import init_head
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained import random_backbone
from cifar_jax.runtime.sharding import make_mesh, replicate, shard
from cifar_jax.train.evaluate import eval_step, evaluate
from cifar_jax.train.from_config import image_augmentation
from cifar_jax.train.loop import EpochOrder
from cifar_jax.train.losses import cross_entropy
from cifar_jax.train.optimizer import make_optimizer
from cifar_jax.train.step import make_train_step, scan_steps

NETWORK = ResNetConfig(stage_sizes=(1,), width=4)
KEY = jax.random.key(7)
TX = optax.sgd(0.1, momentum=0.9)
ALL = image_augmentation(tuple(AUGMENTATIONS))
ONE, EIGHT = make_mesh(1), make_mesh(8)


def order(batch_size):
    return EpochOrder(jax.random.key(1), jax.random.key(2), batch_size)


@pytest.fixture(scope="module")
def images(shapes):
    """Batches of 20 leave 10 of them over, and neither can be divided by eight."""
    return shapes.take(np.arange(70))


@pytest.fixture(scope="module")
def backbone(shapes):
    return random_backbone(jax.random.key(0), shapes.images[:64], NETWORK, 32)


def head():
    return init_head(jax.random.key(3), NETWORK.features, (8,), 10)


def assert_same(on_one, on_eight, tolerance=1e-5):
    """State and rows of both agree, and the state lies on all devices."""
    (state, rows), (state_8, rows_8) = on_one, on_eight
    for a, b in zip(*map(jax.tree.leaves, (state, state_8)), strict=True):
        # A bias in front of a BatchNorm moves by nothing but rounding, so not everything can be relative.
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance * 0.01)
        assert b.sharding.is_fully_replicated and len(b.sharding.device_set) == 8
    for a, b in zip(rows, rows_8, strict=True):
        np.testing.assert_allclose(a[1:5], b[1:5], rtol=tolerance)


def test_features(backbone, images):
    """Each device takes rows of one piece at a time, however many pieces there are."""
    one, eight = (make_extractor(backbone, batch_size=8 * n, devices=jax.devices()[:n]) for n in (1, 8))
    np.testing.assert_allclose(eight(images.images), one(images.images), rtol=1e-5, atol=1e-6)
    pieces = [slice(0, 33), slice(33, 66), slice(66, 70)]
    features = {rows.start: values for rows, values in eight.stream(images.images, pieces)}
    assert list(features) == [0, 8, 16, 24, 32, 33, 41, 49, 57, 65, 66]
    for rows, values in eight.stream(images.images, pieces[1:]):
        np.testing.assert_array_equal(values, features[rows.start])


def test_ragged_pieces_take_one_compilation(backbone, images):
    extractor = make_extractor(backbone, batch_size=16)
    assert count_compilations(lambda: [extractor(images.images[:num]) for num in (70, 33, 5)]) == 1


def test_cached(backbone, images):
    features = make_extractor(backbone)(images.images)
    task = on_features(head(), (features, images.labels), (features[:47], images.labels[:47]))

    def run(mesh):
        return fitted(task, TX, order(20), 3, mesh=mesh, batch_size=30)

    assert_same(run(ONE), run(EIGHT))


def test_live(backbone, images):
    def run(mesh):
        task = on_images(head(), replicate(mesh, backbone), images, images.take(np.arange(33)), augment=ALL)
        return fitted(task, TX, order(20), 2, mesh=mesh, batch_size=20)

    assert_same(run(ONE), run(EIGHT))


def test_finetune(backbone, images):
    """BatchNorm over all devices, over the examples of a piece, and over none that is padding."""
    config = TrainConfig(mode="finetune", batch_size=20, micro_batch=16, momentum=0.9, learning_rate=0.02)
    tx = make_optimizer(config, 2)

    def run(mesh):
        parts = images.take(np.arange(30)), images.take(np.arange(33))
        task = on_all_layers(config, head(), backbone, *parts, mesh=mesh, has_padding=True)
        return fitted(task, tx, order(20), 3, mesh=mesh, micro_batch=16, batch_size=20)

    assert_same(run(ONE), run(EIGHT), tolerance=2e-4)


def test_padding_would_show(backbone, images):
    """The step that counts padding in its statistics differs by far more than the tolerance above."""
    config, padded = TrainConfig(mode="finetune"), batch_of(*images.take(np.arange(8)), 6)
    short = jax.tree.map(lambda leaf: leaf[:6], padded)

    def loss_of(has_padding, batch):
        task = on_all_layers(config, head(), backbone, images, has_padding=has_padding)
        _, metrics = jax.jit(make_train_step(task.forward, cross_entropy, TX))(start_of(task, TX), {}, batch, KEY)
        return float(metrics.loss_sum) / 6

    wrong, right, expected = loss_of(False, padded), loss_of(True, padded), loss_of(False, short)
    assert right == pytest.approx(expected, rel=1e-5)
    assert abs(wrong - expected) > 1e-3


@pytest.mark.parametrize("batch_size", [1, 8, 30, 200])
def test_every_example_is_counted_once(backbone, images, batch_size):
    features = make_extractor(backbone)(images.images)
    params = {"head": head()}
    one, eight = (evaluate(eval_step, params, features, images.labels, batch_size, mesh=mesh) for mesh in (ONE, EIGHT))
    np.testing.assert_array_equal(one.confusion, eight.confusion)
    assert eight.num == 70 and eight.loss == pytest.approx(one.loss, rel=1e-6)


def exchanged(step, *args):
    """What the compiled step exchanges: the kinds, and the elements of the sums, each sum once."""
    found = collectives(step.lower(*args).compile().as_text())
    return {one.name for one in found}, sum(one.elements for one in found if one.name == "all-reduce")


def size_of(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_frozen_steps_exchange_the_gradient_and_the_metrics(backbone, images):
    """Loss, correct and count; nothing of images, features or backbone."""
    size, features = size_of(head()), np.zeros((70, NETWORK.features), np.float32)
    cached = on_features(head(), (features, images.labels))
    state = replicate(EIGHT, start_of(cached, TX))
    indices, counts = order(16).batches(0, 70)
    placed = replicate(EIGHT, (features, images.labels)), shard(EIGHT, indices, axis=1)
    epoch = jax.jit(scan_steps(make_train_step(cached.forward, cross_entropy, TX)))
    assert exchanged(epoch, state, {}, *placed[0], placed[1], counts, KEY) == ({"all-reduce"}, size + 3)
    live, batch = on_images(head(), backbone, images), shard(EIGHT, batch_of(*images.take(np.arange(16))))
    step = jax.jit(make_train_step(live.forward, cross_entropy, TX, augment=ALL))
    assert exchanged(step, state, replicate(EIGHT, backbone), batch, KEY) == ({"all-reduce"}, size + 3)
    assert exchanged(eval_step, state.params, batch._replace(inputs=features[:16])) == ({"all-reduce"}, 101)


@pytest.mark.parametrize("bn_statistics", ["batch", "frozen"])
def test_finetune_exchanges_statistics_as_well(backbone, images, bn_statistics):
    """Of each BatchNorm mean and variance, and their gradients on the way back; else as above."""
    config = TrainConfig(mode="finetune", bn_statistics=bn_statistics)
    task = on_all_layers(config, head(), backbone, images, mesh=EIGHT)
    state = replicate(EIGHT, start_of(task, TX))
    step = jax.jit(make_train_step(task.forward, cross_entropy, TX))
    found = exchanged(step, state, {}, shard(EIGHT, batch_of(*images.take(np.arange(16)))), KEY)
    statistics = size_of(backbone.variables["batch_stats"]) if bn_statistics == "batch" else 0
    assert found == ({"all-reduce"}, size_of(state.params) + 3 + 2 * statistics)


def test_epoch_is_compiled_once(backbone, images):
    task = on_features(head(), (make_extractor(backbone)(images.images), images.labels))
    advance, state = steps_of(task, TX, order(20), mesh=EIGHT), start_of(task, TX)
    for epoch in range(3):
        state, _ = advance(state, {}, epoch, range(advance.steps_per_epoch))
    assert advance.run._cache_size() == 1


JOB = {
    "dataset": "shapes",
    "weights": "random-w16",
    "image_size": 32,
    "train_examples": 72,
    "test_examples": 20,
    "epochs": 2,
    "hidden": (8,),
    "batch_size": 20,
    "learning_rate": 0.05,
    "momentum": 0.9,
}


def test_job(tmp_path, monkeypatch):
    """The whole job, stopped after its first epoch and gone on with, against one device."""
    narrow_networks(monkeypatch)
    without_pictures(monkeypatch)
    config = TrainConfig(**JOB, cache_dir=str(tmp_path), devices=8, out=str(tmp_path / "eight"), resume=True)
    train(replace(config, epochs=1))
    eight = train(config)
    one = train(replace(config, devices=1, out=str(tmp_path / "one")))
    rows, rows_1 = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (eight, one)
    )
    for row, row_1 in zip(rows, rows_1, strict=True):
        assert row.pop("val_split") == row_1.pop("val_split")
        assert row | {"seconds": 0} == pytest.approx(row_1 | {"seconds": 0}, rel=1e-4)
    summary = json.loads((eight / "summary.json").read_text())
    assert summary["status"] == "complete" and summary["device"].endswith("8 of 8 devices")


def test_pieces_that_cannot_be_divided_are_refused(tmp_path):
    config = TrainConfig(**JOB, mode="finetune", devices=8, micro_batch=12, out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="--micro-batch 12 cannot be divided between 8 devices"):
        train(config)
    assert not (tmp_path / "run").exists()
