"""The optimiser: what each option adds to plain SGD, and that every parameter is either trained or frozen."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cifar_jax.config import TrainConfig
from cifar_jax.models.head import init_head
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained.random_init import init_variables
from cifar_jax.train.optimizer import is_kernel, make_optimizer, make_schedule, param_labels


@pytest.fixture(scope="module")
def params():
    network = ResNetConfig(stage_sizes=(2, 1, 1, 1), width=2)
    variables = init_variables(jax.random.key(0), network)
    return jax.tree.map(
        jnp.asarray,
        {"backbone": variables["params"], "head": init_head(jax.random.key(1), network.features, (4,), 3)},
    )


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def config(**options):
    return TrainConfig(mode="finetune", learning_rate=0.1, **options)


def updates_of(tx, params, grads, steps=1):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
    return updates


def test_without_options_it_is_plain_sgd(params):
    grads = jax.tree.map(jnp.ones_like, params["head"])
    for momentum in (0.0, 0.9):
        plain = TrainConfig(learning_rate=0.1, momentum=momentum)
        ours = updates_of(make_optimizer(plain, 7), params["head"], grads, steps=3)
        theirs = updates_of(optax.sgd(0.1, momentum or None), params["head"], grads, steps=3)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("freeze_stages", range(5))
def test_nothing_falls_between_trained_and_frozen(params, freeze_stages):
    labels = named(param_labels(params, freeze_stages))
    assert set(labels) == set(named(params))
    for name, label in labels.items():
        part = name.split("/")[1]
        stage = 1 if part.startswith("stem") else int(part[5]) if part.startswith("stage") else None
        expected = "head" if name.startswith("head") else "frozen" if stage <= freeze_stages else "backbone"
        assert label == expected, name
    moved = named(updates_of(make_optimizer(config(freeze_stages=freeze_stages), 7), params, ones(params)))
    assert {name for name, update in moved.items() if not update.any()} == {n for n in labels if labels[n] == "frozen"}


def ones(params):
    return jax.tree.map(jnp.ones_like, params)


def test_a_name_that_belongs_to_no_part_is_an_error(params):
    for wrong in ({"extra": jnp.ones(2)}, {"backbone": {"stage_x": {"kernel": jnp.ones(2)}}}):
        with pytest.raises(ValueError, match="belongs to no part of the network"):
            param_labels(wrong, 1)


def test_groups_have_rates_of_their_own(params):
    updates = named(updates_of(make_optimizer(config(backbone_learning_rate=0.01), 7), params, ones(params)))
    for name, update in updates.items():
        np.testing.assert_allclose(update, -0.1 if name.startswith("head") else -0.01, rtol=1e-6)


def test_weight_decay_is_for_kernels_only(params):
    updates = named(
        updates_of(make_optimizer(config(weight_decay=0.5), 7), params, jax.tree.map(jnp.zeros_like, params))
    )
    decayed = named(is_kernel(params))
    assert {name.rpartition("/")[2] for name, kernel in decayed.items() if not kernel} == {"bias", "scale"}
    for name, value in named(params).items():
        np.testing.assert_allclose(updates[name], -0.1 * 0.5 * value if decayed[name] else 0.0, rtol=1e-5, atol=1e-9)


def test_clipping_looks_at_all_groups_together(params):
    updates = updates_of(make_optimizer(config(clip_norm=0.5, backbone_learning_rate=0.1), 7), params, ones(params))
    assert float(optax.tree.norm(updates)) == pytest.approx(0.1 * 0.5, rel=1e-5)


@pytest.mark.parametrize("freeze_stages", [0, 2])
def test_another_optimiser_is_one_for_all_that_trains(params, freeze_stages):
    tx = make_optimizer(config(freeze_stages=freeze_stages), 7, optax.clip_by_global_norm(0.5))
    updates = updates_of(tx, params, ones(params))
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5, rel=1e-5)


def test_nesterov_looks_one_step_ahead():
    """Keras: velocity = m v - lr g; w += m velocity - lr g."""
    tx = make_optimizer(TrainConfig(learning_rate=0.1, momentum=0.9, nesterov=True), 7)
    params, velocity, weight = {"kernel": jnp.ones(1)}, 0.0, 1.0
    state = tx.init(params)
    for gradient in (1.0, -0.5, 2.0):
        updates, state = tx.update({"kernel": jnp.full(1, gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        velocity = 0.9 * velocity - 0.1 * gradient
        weight += 0.9 * velocity - 0.1 * gradient
        assert float(params["kernel"][0]) == pytest.approx(weight, rel=1e-6)


def test_cosine_rises_to_its_peak_and_ends_at_zero():
    schedule = make_schedule(config(schedule="cosine", warmup_epochs=1, epochs=4), 0.2, 10)
    rates = [float(schedule(jnp.int32(step))) for step in range(41)]
    assert 0 < rates[0] < rates[5] < rates[10] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert (
        rates[25] == pytest.approx(0.1, rel=1e-5) and 0 < rates[39] < 0.002 and rates[40] == pytest.approx(0, abs=1e-8)
    )
    assert float(make_schedule(config(schedule="cosine"), 0.2, 10)(jnp.int32(0))) == pytest.approx(0.2)
