"""Finished runs that the tests of model cards read; those that change one change a copy."""

from pathlib import Path

import pytest
from helpers import tiny_run
from hub_cards import pictures_run


@pytest.fixture(scope="session")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on synthetic images."""
    return tiny_run(tmp_path_factory).path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a folder of pictures, with held-out images."""
    return pictures_run(tmp_path_factory)
