"""Fixtures of tests of TFDS sets: a data directory, a function that loads sets from it, and an end of TensorFlow."""

import sys

import pytest

from cifar_jax.data import load_splits


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def load(root, tmp_path):
    """Loads a set, `tiny` if not named, from `root`."""

    def load_from_root(name="tiny", **options):
        return load_splits(str(name), data_dir=str(root), cache_dir=str(tmp_path / "cache"), **options)

    return load_from_root


@pytest.fixture
def no_tensorflow(monkeypatch):
    """A function that makes imports of TensorFlow fail from then on."""
    return lambda: monkeypatch.setitem(sys.modules, "tensorflow", None)
