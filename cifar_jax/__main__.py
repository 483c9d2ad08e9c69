"""`python -m cifar_jax`."""

from cifar_jax.cli.main import run

run()
