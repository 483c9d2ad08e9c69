"""The error of everything that reads weights."""

from cifar_jax.errors import UserError


class WeightsError(UserError):
    """A weights file that is missing, damaged, or not the network that it should be."""
