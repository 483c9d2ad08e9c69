"""Fixtures of the weights tests: narrow networks, the messages of refusals, and the log."""

import logging

import pytest
from helpers import narrow_networks

from cifar_jax.pretrained import WeightsError, load_backbone


@pytest.fixture
def narrow_resnet(monkeypatch):
    """Replaces ResNet50 by a network of two narrow blocks."""
    narrow_networks(monkeypatch)


@pytest.fixture
def log(caplog):
    """The log of the library, from INFO on."""
    caplog.set_level(logging.INFO, "cifar_jax")
    return caplog


@pytest.fixture
def refusal():
    """Loads an invalid file and returns the error message, which is one line and names the file's directory."""

    def load_invalid(path, variant=None):
        with pytest.raises(WeightsError) as caught:
            load_backbone(path, variant)
        message = str(caught.value)
        assert "\n" not in message and str(path.parent) in message, message
        return message

    return load_invalid
