"""The dense head with one hidden layer and its gradient, written out in float64 NumPy, and examples to train it on."""

from typing import NamedTuple

import jax
import numpy as np

from cifar_jax.models.head import init_head


class Sums(NamedTuple):
    """Sums over examples."""

    loss_sum: float
    correct: int


def make_examples(num=70, width=12, classes=4):
    """Features that depend on their labels, the labels, and params of a head."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, num).astype(np.int32)
    features = rng.normal(size=(num, width)).astype(np.float32) + 2 * np.eye(classes, width, dtype=np.float32)[labels]
    return features, labels, {"head": init_head(jax.random.key(3), width, (8,), classes)}


def reference_step(head, features, labels, label_smoothing=0.0):
    """Sums over the examples, and the gradient of their mean loss with respect to the head's params."""
    (first, second), x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (head, features))
    hidden = x @ first["kernel"] + first["bias"]
    active = np.maximum(hidden, 0)
    logits = active @ second["kernel"] + second["bias"]
    num, classes = logits.shape
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    targets = (1 - label_smoothing) * np.eye(classes)[labels] + label_smoothing / classes
    sums = Sums(-(targets * log_probs).sum(), int((logits.argmax(1) == labels).sum()))

    of_logits = (np.exp(log_probs) - targets) / num
    of_hidden = (of_logits @ second["kernel"].T) * (hidden > 0)
    gradient = (
        {"kernel": x.T @ of_hidden, "bias": of_hidden.sum(0)},
        {"kernel": active.T @ of_logits, "bias": of_logits.sum(0)},
    )
    return sums, gradient
