"""Finds the packages, and puts `weights` among them, so that an installed copy has it; pyproject.toml says the rest."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["cifar_jax*"]), "cifar_jax.weights"],
    package_dir={"cifar_jax.weights": "weights"},
)
