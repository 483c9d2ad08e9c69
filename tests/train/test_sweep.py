"""Many heads in one compiled call: each is the head that it would be alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_difference
from tasks import fitted, on_features

from cifar_jax import EpochOrder, eval_step, evaluate, train_heads
from cifar_jax.models.head import init_head
from cifar_jax.train.sweep import _train, unstacked
from cifar_jax.train.task import Batch

KEYS = jax.random.split(jax.random.key(3), 3)
ORDERS = [EpochOrder(jax.random.key(seed), jax.random.key(9), batch_size=16) for seed in range(3)]
SHAPE = {"hidden": (8,), "num_classes": 4}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 70).astype(np.int32)
    return rng.normal(size=(70, 12)).astype(np.float32) + 2 * np.eye(4, 12, dtype=np.float32)[labels], labels


RATES = np.array([0.1, 0.05, 0.02], np.float32)


def momentum(rate):
    return optax.sgd(rate, momentum=0.9)


@pytest.fixture(scope="module")
def alone(data):
    """State and rows of each head trained alone, in an order of its own."""
    heads = [on_features(init_head(key, 12, **SHAPE), data) for key in KEYS]
    return [fitted(*each, 2) for each in zip(heads, [momentum(float(rate)) for rate in RATES], ORDERS, strict=True)]


@pytest.mark.parametrize("at_once", [None, 2, 3])
def test_each_head_is_the_one_that_it_is_alone(data, alone, at_once):
    params, metrics = train_heads(KEYS, RATES, *data, ORDERS, 2, make_tx=momentum, at_once=at_once, **SHAPE)
    assert metrics.loss_sum.shape == (3, 2, 5) and metrics.finite.all()
    for number, (head, (state, rows)) in enumerate(zip(unstacked(params), alone, strict=True)):
        for x, y in zip(jax.tree.leaves(head), jax.tree.leaves(state.params["head"]), strict=True):
            assert relative_difference(x, y) < 1e-5
        np.testing.assert_allclose(metrics.loss_sum[number].sum(-1) / 70, [row.train_loss for row in rows], rtol=1e-5)
        correct = metrics.correct[number].sum(-1) / metrics.num[number].sum(-1)
        np.testing.assert_allclose(correct, [row.train_accuracy for row in rows], rtol=1e-6)
        assert evaluate(eval_step, {"head": head}, *data).accuracy == rows[-1].val_accuracy


def test_one_key_takes_several_rates_and_several_keys_one_rate(data):
    by_rate, _ = train_heads(KEYS[0], np.array([0.1, 0.05], np.float32), *data, ORDERS[0], 1, **SHAPE)
    by_key, _ = train_heads(KEYS[:2], 0.1, *data, ORDERS[0], 1, **SHAPE)
    first, second = (unstacked(params) for params in (by_rate, by_key))
    for x, y in zip(jax.tree.leaves(first[0]), jax.tree.leaves(second[0]), strict=True):
        np.testing.assert_array_equal(x, y)
    for a, b in ((first[0], first[1]), (second[0], second[1]), (first[1], second[1])):
        assert relative_difference(a[0]["kernel"], b[0]["kernel"]) > 1e-3


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_head_that_diverges_keeps_its_last_params_and_the_others_continue(data, at_once):
    diverging = RATES.copy()
    diverging[1] = 1e30
    good, bad = (
        train_heads(KEYS, rates, *data, ORDERS[0], 2, at_once=at_once, **SHAPE) for rates in (RATES, diverging)
    )
    assert good[1].finite.all() and bad[1].finite[::2].all() and not bad[1].finite[1, 1].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(bad[0]))
    for x, y in zip(jax.tree.leaves(good[0]), jax.tree.leaves(bad[0]), strict=True):
        np.testing.assert_array_equal(x[::2], y[::2])


def test_heads_are_evaluated_side_by_side(data):
    features, labels = data
    params, _ = train_heads(KEYS, 0.1, *data, ORDERS[0], 1, **SHAPE)
    batch = Batch(jnp.asarray(features), jnp.asarray(labels), jnp.ones(70))
    for sums in (
        jax.vmap(eval_step, in_axes=(0, None))({"head": params}, batch),
        jax.lax.map(lambda head: eval_step({"head": head}, batch), params),
    ):
        for number, head in enumerate(unstacked(params)):
            np.testing.assert_array_equal(sums.confusion[number], eval_step({"head": head}, batch).confusion)


def test_compiled_once_for_any_keys_rates_and_orders(data):
    train_heads(KEYS[:2], 0.1, *data, ORDERS[0], 3, **SHAPE)
    before = _train._cache_size()
    train_heads(KEYS[1:], 0.2, *data, ORDERS[1], 3, **SHAPE)
    assert _train._cache_size() == before


@pytest.mark.parametrize("orders", [ORDERS[:2], [*ORDERS[:2], ORDERS[2]._replace(batch_size=8)], []])
def test_orders_that_do_not_fit_are_refused(data, orders):
    with pytest.raises(ValueError, match="orders for 3 heads"):
        train_heads(KEYS, 0.1, *data, orders, 1, **SHAPE)
