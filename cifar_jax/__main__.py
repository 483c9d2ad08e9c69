"""`python -m cifar_jax`."""

from cifar_jax.cli import run

run()
