"""The step and the epoch: exact arithmetic, partial batches, the guard, cached against live, frozen to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_difference

from cifar_jax.features import make_extractor
from cifar_jax.fit import Diverged, fit
from cifar_jax.head import head_logits, init_head
from cifar_jax.pretrained import random_backbone
from cifar_jax.resnet import ResNetConfig
from cifar_jax.runners import EpochOrder, cached_evaluator, cached_runner, live_evaluator, live_runner
from cifar_jax.training import (
    Batch,
    batch_loss,
    halting,
    head_loss,
    init_state,
    make_cached_epoch,
    make_live_step,
    make_train_step,
)

TX = optax.sgd(0.05)
KEY = jax.random.key(7)
ORDER = EpochOrder(jax.random.key(1), jax.random.key(2), batch_size=16)


def problem(num=70, width=12, classes=4):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, num).astype(np.int32)
    features = rng.normal(size=(num, width)).astype(np.float32) + 2 * np.eye(classes, width, dtype=np.float32)[labels]
    return features, labels, init_head(jax.random.key(3), width, (8,), classes)


def test_step_is_gradient_descent_on_the_mean_loss():
    features, labels, params = problem(8)
    batch = Batch(jnp.asarray(features), jnp.asarray(labels), jnp.ones(8))
    state, metrics = make_train_step(head_loss, TX)(init_state(params, TX), batch, KEY)

    def mean_loss(params):
        log_probs = jax.nn.log_softmax(head_logits(params, features))
        return -log_probs[np.arange(8), labels].mean()

    expected = jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(mean_loss)(params))
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert int(state.step) == 1 and int(metrics.num) == 8
    assert float(metrics.loss_sum) / 8 == pytest.approx(float(mean_loss(params)), rel=1e-6)


def test_examples_that_fill_up_a_batch_do_not_count():
    features, labels, params = problem(16)
    real = Batch(jnp.asarray(features[:5]), jnp.asarray(labels[:5]), jnp.ones(5))
    weights = jnp.asarray([1.0] * 5 + [0.0] * 11)
    filled = Batch(jnp.asarray(features), jnp.asarray(labels), weights)
    step = make_train_step(head_loss, TX)
    (a, metrics_a), (b, metrics_b) = (step(init_state(params, TX), batch, KEY) for batch in (real, filled))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    assert int(metrics_a.num) == int(metrics_b.num) == 5
    assert int(metrics_a.correct) == int(metrics_b.correct)
    np.testing.assert_allclose(metrics_a.loss_sum, metrics_b.loss_sum, rtol=1e-6)


def test_loss_of_logits_is_that_of_probabilities():
    logits = jax.random.normal(KEY, (6, 4))
    labels = jnp.arange(6, dtype=jnp.int32) % 4
    loss, _ = batch_loss(logits, Batch(logits, labels, jnp.ones(6)))
    probs = np.asarray(jax.nn.softmax(logits), np.float64)
    assert float(loss) == pytest.approx(-np.log(probs[np.arange(6), np.asarray(labels)]).mean(), rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_step_that_is_not_finite_leaves_the_state_as_it_was(bad):
    features, labels, params = problem(8)
    features[3, 2] = bad
    batch = Batch(jnp.asarray(features), jnp.asarray(labels), jnp.ones(8))
    before = init_state(params, optax.sgd(0.05, momentum=0.9))
    after, metrics = make_train_step(head_loss, optax.sgd(0.05, momentum=0.9))(before, batch, KEY)
    assert not metrics.finite
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(x, y)


def test_epoch_is_its_steps_one_after_the_other():
    features, labels, params = problem(70)
    indices, counts = ORDER.batches(0, 70)
    assert counts.tolist() == [16, 16, 16, 16, 6]
    state, metrics = make_cached_epoch(TX)(init_state(params, TX), features, labels, indices, counts, KEY)
    step, expected = make_train_step(head_loss, TX), init_state(params, TX)
    losses = []
    for index, count in zip(indices, counts, strict=True):
        rows = index[:count]
        batch = Batch(jnp.asarray(features[rows]), jnp.asarray(labels[rows]), jnp.ones(int(count)))
        expected, step_metrics = step(expected, batch, KEY)
        losses.append(step_metrics.loss_sum)
    assert int(state.step) == 5 and metrics.num.tolist() == counts.tolist()
    np.testing.assert_allclose(metrics.loss_sum, losses, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_epoch_stops_at_the_first_bad_step_and_keeps_the_state_before_it():
    features, labels, params = problem(64)
    order = ORDER._replace(shuffle=False)
    indices, counts = order.batches(0, 64)
    broken = features.copy()
    broken[37] = np.nan  # in the third step of four
    epoch = make_cached_epoch(TX)
    state, metrics = epoch(init_state(params, TX), broken, labels, indices, counts, KEY)
    assert metrics.finite.tolist() == [True, True, False, False]
    two_steps, _ = epoch(init_state(params, TX), features, labels, indices[:2], counts[:2], KEY)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(two_steps), strict=True):
        np.testing.assert_array_equal(x, y)

    run = cached_runner(broken, labels, TX, order)
    with pytest.raises(Diverged, match=r"epoch 1, step 3 \(first the inputs\)") as raised:
        fit(init_state(params, TX), run, cached_evaluator(features, labels), 2)
    assert int(raised.value.state.step) == 2


@pytest.mark.parametrize(
    ("broken", "factor"),
    [
        pytest.param(np.nan, 1.0, id="gradient"),  # of NaN the relu makes 0, so that no loss shows it
        pytest.param(3e38, 1.0, id="loss"),
        pytest.param(1.0, np.inf, id="update"),
    ],
)
def test_epoch_is_its_guarded_steps_whatever_is_not_finite(broken, factor):
    once = optax.scale_by_schedule(lambda count: jnp.where(count == 2, factor, 1.0))
    tx = optax.chain(optax.sgd(0.05, momentum=0.9), once)
    features, labels, params = problem(64)
    indices, counts = ORDER._replace(shuffle=False).batches(0, 64)
    features[37] = broken  # in the third step of four
    state, metrics = make_cached_epoch(tx)(init_state(params, tx), features, labels, indices, counts, KEY)

    carry, step = (init_state(params, tx), jnp.array(True)), jax.jit(halting(make_train_step(head_loss, tx)))
    for index in indices:
        batch = Batch(jnp.asarray(features[index]), jnp.asarray(labels[index]), jnp.ones(16))
        carry, _ = step(carry, batch, KEY)
    assert metrics.finite.tolist() == [True, True, False, False] and int(state.step) == 2
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(carry[0]), strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_epoch_is_compiled_once_for_all_epochs():
    features, labels, params = problem(70)
    epoch = make_cached_epoch(TX)
    state = init_state(params, TX)
    for number in range(3):
        state, _ = epoch(state, features, labels, *ORDER.batches(number, 70), KEY)
    assert epoch._cache_size() == 1


def test_training_learns():
    features, labels, params = problem(200)
    run, evaluate = cached_runner(features, labels, TX, ORDER), cached_evaluator(features, labels)
    before = evaluate(params)
    _, history = fit(init_state(params, TX), run, evaluate, 10)
    assert history[-1].val_loss < 0.5 * before.loss and history[-1].val_accuracy > before.accuracy
    assert [row.epoch for row in history] == list(range(1, 11))


@pytest.fixture(scope="module")
def small_backbone(shapes):
    return random_backbone(jax.random.key(0), shapes.images[:64], ResNetConfig(stage_sizes=(1, 1), width=8), 32)


def test_cached_and_live_give_the_same_head(small_backbone, shapes):
    train, val = shapes.take(np.arange(150)), shapes.take(np.arange(150, 200))
    params = init_head(jax.random.key(3), small_backbone.config.features, (16,), 10)
    tx = optax.sgd(0.1, momentum=0.5)

    extractor = make_extractor(small_backbone)
    cached = cached_runner(extractor(train.images), train.labels, tx, ORDER)
    evaluate = cached_evaluator(extractor(val.images), val.labels)
    state_cached, rows_cached = fit(init_state(params, tx), cached, evaluate, 2)
    live = live_runner(small_backbone, train, tx, ORDER, 32, "float32")
    state_live, rows_live = fit(init_state(params, tx), live, live_evaluator(small_backbone, val, 32, "float32"), 2)

    for x, y, start in zip(*map(jax.tree.leaves, (state_cached.params, state_live.params, params)), strict=True):
        assert relative_difference(x, y) < 1e-4
        assert np.abs(np.asarray(x) - np.asarray(start)).max() > 1e-3  # it has moved
    for a, b in zip(rows_cached, rows_live, strict=True):
        np.testing.assert_allclose(a[1:5], b[1:5], rtol=1e-4)
    assert state_live.batch_stats == ()


def test_a_live_step_moves_the_head_and_no_bit_of_the_backbone(small_backbone, shapes):
    before = jax.tree.map(np.array, small_backbone.variables)
    on_device = jax.tree.map(jnp.array, small_backbone)
    params = init_head(jax.random.key(3), small_backbone.config.features, (16,), 10)
    carry, step = (init_state(params, TX), jnp.array(True)), make_live_step(TX, 32)
    batch = Batch(jnp.asarray(shapes.images[:8]), jnp.asarray(shapes.labels[:8]), jnp.ones(8))
    for _ in range(3):
        carry, metrics = step(carry, on_device, batch, KEY)
        assert metrics.finite
    assert np.abs(carry[0].params[0]["kernel"] - params[0]["kernel"]).max() > 1e-3
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(on_device.variables), strict=True):
        np.testing.assert_array_equal(x, y)


def test_live_stops_at_the_first_bad_step(small_backbone, shapes):
    params = init_head(jax.random.key(3), small_backbone.config.features, (16,), 10)
    run = live_runner(small_backbone, shapes, optax.sgd(1e30), ORDER, 32, "float32")
    done = []
    state, metrics = run(init_state(params, optax.sgd(1e30)), 0, on_examples=done.append)
    assert not metrics.finite.all() and len(metrics.finite) < 13
    assert int(state.step) == int(np.argmin(metrics.finite)) == metrics.finite.sum()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_same_seed_same_bits_other_seed_other_order():
    features, labels, params = problem(70)
    evaluate = cached_evaluator(features, labels)

    def losses(order):
        return [
            row.train_loss
            for row in fit(init_state(params, TX), cached_runner(features, labels, TX, order), evaluate, 2)[1]
        ]

    assert losses(ORDER) == losses(ORDER)
    assert losses(ORDER) != losses(ORDER._replace(order_key=jax.random.key(9)))
