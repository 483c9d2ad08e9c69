"""The optimiser: what each option adds to plain SGD, and that every parameter is either trained or frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from cifar_jax.config import TrainConfig
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained.merge import variable_shapes
from cifar_jax.train.optimizer import is_kernel, make_optimizer, make_schedule, param_labels


@pytest.fixture(scope="module")
def params():
    """Params of a network of four stages and a head, all different."""
    shapes = variable_shapes(ResNetConfig(stage_sizes=(1, 1, 1, 1), width=2))
    rng = np.random.default_rng(0)
    backbone = {path[1:]: rng.normal(size=shape) for path, shape in shapes.items() if path[0] == "params"}
    head = ({"kernel": rng.normal(size=(64, 3)), "bias": rng.normal(size=3)},)
    return jax.tree.map(np.float32, {"backbone": unflatten_dict(backbone), "head": head})


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def config(**options):
    return TrainConfig(mode="finetune", learning_rate=0.1, **options)


def ones(params):
    return jax.tree.map(np.ones_like, params)


def updates_of(tx, params, grads, steps=1):
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads, state, params)
    return updates


def norm(tree):
    return np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(jax.device_get(tree))))


def test_without_options_it_is_plain_sgd(params):
    plain = make_optimizer(TrainConfig(learning_rate=0.1), 7)
    updates = updates_of(plain, params["head"], ones(params["head"]), steps=3)
    jax.tree.map(lambda update: np.testing.assert_array_equal(update, jnp.float32(-0.1)), updates)


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
        updates_of(make_optimizer(config(weight_decay=0.5), 7), params, jax.tree.map(np.zeros_like, params))
    )
    decayed = named(is_kernel(params))
    assert {name.rpartition("/")[2] for name, kernel in decayed.items() if not kernel} == {"bias", "scale"}
    for name, value in named(params).items():
        np.testing.assert_allclose(updates[name], -0.1 * 0.5 * value if decayed[name] else 0.0, rtol=1e-5, atol=1e-9)


def test_clipping_looks_at_all_groups_together(params):
    updates = updates_of(make_optimizer(config(clip_norm=0.5, backbone_learning_rate=0.1), 7), params, ones(params))
    assert norm(updates) == pytest.approx(0.1 * 0.5, rel=1e-5)


@pytest.mark.parametrize("freeze_stages", [0, 2])
def test_another_optimiser_is_one_for_all_that_trains(params, freeze_stages):
    tx = make_optimizer(config(freeze_stages=freeze_stages), 7, optax.clip_by_global_norm(0.5))
    updates = updates_of(tx, params, ones(params))
    assert norm(updates) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_all_options_together_are_the_steps_of_keras(nesterov):
    """Clipping, then decay of kernels, then velocity = m v - lr g and w += velocity, or with Nesterov m v - lr g."""
    options = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.01, "clip_norm": 1.0}
    tx = make_optimizer(TrainConfig(learning_rate=0.1, **options), 7)
    params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}
    weights = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    velocity, state = dict.fromkeys(weights, 0.0), tx.init(params)
    for step in range(4):
        gradient = {"kernel": np.array([1.0, -0.5]) * (step + 1), "bias": np.array([0.2])}
        given = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), gradient)
        updates, state = tx.update(given, state, params)
        params = optax.apply_updates(params, updates)

        norm = np.sqrt(sum((leaf**2).sum() for leaf in gradient.values()))
        for name, leaf in gradient.items():
            total = leaf / max(1, norm) + (0.01 * weights[name] if name == "kernel" else 0)
            velocity[name] = 0.9 * velocity[name] - 0.1 * total
            weights[name] = weights[name] + (0.9 * velocity[name] - 0.1 * total if nesterov else velocity[name])
            np.testing.assert_allclose(params[name], weights[name], rtol=1e-5)


def test_the_learning_rate_warms_up_linearly_and_decays_as_a_cosine_to_zero():
    def rates(**options):
        schedule = make_schedule(config(epochs=4, **options), 0.2, 10)
        return jax.vmap(schedule)(jnp.arange(41))

    steps = np.arange(41)
    warmup, decay = 0.2 * (1 + 10 * steps / 10) / 11, 0.1 * (1 + np.cos(np.pi * (steps - 10) / 30))
    expected = np.where(steps < 10, warmup, decay)
    np.testing.assert_allclose(rates(schedule="cosine", warmup_epochs=1), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(rates(schedule="cosine"), 0.1 * (1 + np.cos(np.pi * steps / 40)), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(rates(schedule="constant"), 0.2)


def test_the_schedule_counts_steps():
    options = {"learning_rate": 0.2, "schedule": "cosine", "epochs": 2}
    tx, params = make_optimizer(TrainConfig(**options), 2), {"kernel": jnp.zeros(1)}
    state, taken = tx.init(params), []
    for _ in range(4):
        updates, state = tx.update({"kernel": jnp.ones(1)}, state, params)
        taken.append(-float(updates["kernel"][0]))
    np.testing.assert_allclose(taken, 0.1 * (1 + np.cos(np.pi * np.arange(4) / 4)), rtol=1e-5)
