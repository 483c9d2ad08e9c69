"""Class weights: their values, the loss with them against NumPy, and what they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FIELDS, rows_of, summary_of

from cifar_jax.config import TrainConfig
from cifar_jax.errors import UserError
from cifar_jax.experiment import train
from cifar_jax.train.from_config import Parts, check_parts
from cifar_jax.train.losses import balanced_weights, cross_entropy, loss_of, weighted_cross_entropy

LABELS = np.array([0, 0, 0, 0, 0, 0, 2, 2, 3], np.int32)


def test_balanced_weights_are_those_of_scikit_learn():
    """`compute_class_weight("balanced", classes=[0, 2, 3], y=LABELS)` is n / (3 * count)."""
    np.testing.assert_allclose(balanced_weights(LABELS, 5), [9 / 18, 0, 9 / 6, 9 / 3, 0])
    assert balanced_weights(LABELS, 5)[LABELS].mean() == pytest.approx(1)
    np.testing.assert_allclose(balanced_weights(np.arange(4), 4), 1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_loss_is_that_of_numpy_for_classes_and_distributions(smoothing):
    rng = np.random.default_rng(0)
    logits, weights = rng.normal(size=(9, 5)).astype(np.float32), rng.uniform(0.1, 3, 5)
    mixed = rng.dirichlet(np.ones(5), 9).astype(np.float32)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for labels, targets in ((LABELS, np.eye(5)[LABELS]), (mixed, mixed)):
        expected = np.zeros(9)
        for n in range(9):
            for c in range(5):
                q = (1 - smoothing) * targets[n, c] + smoothing / 5
                expected[n] -= weights[c] * q * log_probs[n, c]
        found = jax.jit(weighted_cross_entropy(weights, smoothing))(logits, jnp.asarray(labels))
        assert found.shape == (9,) and found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_even_classes_have_the_loss_without_weights():
    config = TrainConfig(class_weights="balanced", label_smoothing=0.1)
    labels = np.arange(12, dtype=np.int32) % 4
    logits = jax.random.normal(jax.random.key(0), (12, 4))
    without = loss_of(TrainConfig(label_smoothing=0.1), labels, 4)(logits, jnp.asarray(labels))
    np.testing.assert_allclose(loss_of(config, labels, 4)(logits, jnp.asarray(labels)), without, rtol=1e-5)


def test_class_weights_and_a_loss_of_its_own_are_refused():
    parts = Parts(loss_fn=cross_entropy)
    with pytest.raises(UserError, match="--class-weights balanced weights the cross-entropy that loss_fn= replaces"):
        check_parts(TrainConfig(class_weights="balanced"), parts)
    check_parts(TrainConfig(), parts)


def test_balanced_accuracy_rises_on_uneven_classes_and_the_validation_loss_is_weighted(tmp_path, narrow):
    rng, uneven = np.random.default_rng(0), tmp_path / "uneven.npz"

    def images(labels):
        """Plain colours; the channel of the class is one and a half standard deviations brighter."""
        colors = 110 + 36 * np.eye(3)[labels] + rng.normal(0, 24, (len(labels), 3))
        pixels = colors[:, None, None] + rng.normal(0, 5, (len(labels), 32, 32, 3))
        return np.clip(pixels, 0, 255).astype(np.uint8)

    train_labels, test_labels = np.repeat([0, 1, 2], [300, 20, 20]), np.repeat([0, 1, 2], 60)
    arrays = {"train_labels": train_labels, "test_labels": test_labels}
    np.savez(uneven, train_images=images(train_labels), test_images=images(test_labels), **arrays)
    summaries = {}
    for weights in ("none", "balanced"):
        options = {"dataset": str(uneven), "epochs": 20, "hidden": (), "learning_rate": 0.3, "class_weights": weights}
        run = train(TrainConfig(**options, out=str(tmp_path / weights), cache_dir=str(tmp_path)), backbone=FIELDS)
        summaries[weights] = summary_of(run)
        # Of the epochs and of the end alike.
        assert rows_of(run)[-1]["val_loss"] == summaries[weights]["val_loss"]
    even, weighted = (summaries[name]["val_balanced_accuracy"] for name in ("none", "balanced"))
    assert weighted > even + 0.1
    recalls = [one["recall"] for one in summaries["balanced"]["val_classes"].values()]
    assert weighted == pytest.approx(np.mean(recalls))
