"""Loss functions: `(logits, labels) -> float32 [batch]`, one loss per example. The step masks and averages them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Int32

from cifar_jax.config import TrainConfig
from cifar_jax.errors import UserError

# Integer labels, or a distribution over the classes for each example, such as mixup produces.
Labels = Int32[Array, "batch"] | Float[Array, "batch classes"]
LossFn = Callable[[Float[Array, "batch classes"], Labels], Float[Array, "batch"]]


def losses_of(loss_fn: LossFn, logits: Float[Array, "batch classes"], labels: Labels) -> Float[Array, "batch"]:
    """Computes the losses of a batch.

    Raises:
      UserError: unless there is one loss per example. Any other shape would broadcast against the mask, or include
        padding.
    """
    losses, expected = loss_fn(logits, labels), labels.shape[:1]
    if jnp.shape(losses) != expected:
        raise UserError(
            f"The loss function returns shape {list(jnp.shape(losses))} for a batch of {expected[0]}, expected "
            f"{list(expected)}: one loss for each example, neither their mean nor a column."
        )
    return losses


def cross_entropy(logits: Float[Array, "batch classes"], labels: Labels) -> Float[Array, "batch"]:
    """Softmax cross-entropy of logits.

    Mathematically equal to Keras's `SparseCategoricalCrossentropy` of softmax probabilities, but more accurate.
    """
    if labels.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, labels)


def smoothed_cross_entropy(label_smoothing: float) -> LossFn:
    """Cross-entropy with label smoothing; `cross_entropy` itself if `label_smoothing` is 0.

    Reference:
      Szegedy et al. 2015, https://arxiv.org/abs/1512.00567, section 7
    """
    if not label_smoothing:
        return cross_entropy

    def loss_fn(logits: Float[Array, "batch classes"], labels: Labels) -> Float[Array, "batch"]:
        even = -jax.nn.log_softmax(logits).mean(axis=-1)
        return (1 - label_smoothing) * cross_entropy(logits, labels) + label_smoothing * even

    return loss_fn


def weighted_cross_entropy(weights: Float[np.ndarray, "classes"], label_smoothing: float = 0.0) -> LossFn:
    """Cross-entropy in which each class has a weight: `-sum(weights * q * log p)` for a distribution `q` of labels.

    That is PyTorch's `CrossEntropyLoss(weight=...)`, where label smoothing changes `q` before it is weighted. A mean
    over examples divides by their number, as with Keras's `class_weight`, not by the sum of their weights.

    Args:
      weights: weight of each class.
      label_smoothing: at least 0 and below 1.
    """
    by_class = np.asarray(weights, np.float32)

    def loss_fn(logits: Float[Array, "batch classes"], labels: Labels) -> Float[Array, "batch"]:
        log_probs = jax.nn.log_softmax(logits)
        targets = jax.nn.one_hot(labels, len(by_class)) if labels.ndim == 1 else labels
        smoothed = (1 - label_smoothing) * targets + label_smoothing / len(by_class)
        return -(by_class * smoothed * log_probs).sum(axis=-1)

    return loss_fn


def balanced_weights(labels: Int[np.ndarray, "n"], num_classes: int) -> Float[np.ndarray, "classes"]:
    """Weights of classes in inverse proportion to their numbers of examples: `n / (classes * count)`.

    As in scikit-learn's `class_weight="balanced"`, `classes` are those that have examples, so that the mean weight of
    an example is 1. A class without any has the weight 0: nothing was learnt about it, and examples of it in another
    split do not count in the loss.
    """
    counts = np.bincount(labels, minlength=num_classes)
    return np.where(counts > 0, len(labels) / ((counts > 0).sum() * np.maximum(counts, 1)), 0.0)


def loss_of(config: TrainConfig, labels: Int[np.ndarray, "n"], num_classes: int) -> LossFn:
    """The loss function of a configuration, for training, validation and test images alike.

    Args:
      config: the configuration.
      labels: labels of the training images, which class weights are computed from.
      num_classes: number of classes.
    """
    if config.optim.class_weights == "balanced":
        return weighted_cross_entropy(balanced_weights(labels, num_classes), config.optim.label_smoothing)
    return smoothed_cross_entropy(config.optim.label_smoothing)
