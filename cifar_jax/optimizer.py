"""The optimiser of a run, composed from Optax."""

import optax

from cifar_jax.config import TrainConfig


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """SGD as Keras has it: a constant learning rate, and momentum where it is asked for.

    Keras folds the learning rate into its velocity and Optax multiplies by it afterwards; with a constant rate both
    take the same steps.
    """
    return optax.sgd(config.learning_rate, momentum=config.momentum or None)
