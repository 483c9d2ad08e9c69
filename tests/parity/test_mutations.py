"""Deliberate mistakes in our network are detected by the parity comparison, for each source of weights."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest

from cifar_jax import Backbone, load_backbone
from cifar_jax.data import Splits
from parity.compare import TOLERANCE, differences, differing, our_outputs
from parity.mistakes import MISTAKES
from parity.networks import Case
from parity.torch_networks import TorchCase

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

IMAGE_SIZE, NUM_IMAGES = 64, 8
SOURCES = [
    Case("keras", "keras", "archive", 0, IMAGE_SIZE, top="predictions"),
    Case("keras-2016", "tf_keras", "keras-1", 0, IMAGE_SIZE, top="fc1000"),
    TorchCase("torchvision", "pth", 0, IMAGE_SIZE),
    TorchCase("transformers", "hub", 0, IMAGE_SIZE),
]
MORE_SOURCES = [
    Case("keras", "tf_keras", "save_weights", 0, IMAGE_SIZE),
    TorchCase("timm", "hub", 0, IMAGE_SIZE, usual=False),
    TorchCase("transformers", "hub-bin", 0, IMAGE_SIZE, in_1x1=True),
]


class Known(NamedTuple):
    """Our network, loaded from another library's file, and that library's outputs."""

    backbone: Backbone
    theirs: list[np.ndarray]
    images: np.ndarray

    def differences(self, backbone: Backbone) -> dict[str, float]:
        """Returns the differences between a network of ours and the library's."""
        ours = our_outputs(backbone, IMAGE_SIZE, compiled=False)
        return differences(ours, lambda _: self.theirs, self.images, NUM_IMAGES)


@pytest.fixture(
    scope="module",
    params=[*SOURCES, *(pytest.param(source, marks=pytest.mark.slow) for source in MORE_SOURCES)],
    ids=str,
)
def known(request: pytest.FixtureRequest, cifar10: Splits) -> Iterator[Known]:
    written = request.getfixturevalue("written" if isinstance(request.param, Case) else "torch_written")
    images = cifar10.test.images[:NUM_IMAGES]
    with written(request.param) as (reference, path):
        yield Known(load_backbone(path), reference(images), images)


def test_correct_network_has_no_differences(known: Known) -> None:
    assert differing(known.differences(known.backbone)) == {}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_noticed(
    mistake: str, known: Known, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, float], None]
) -> None:
    """Only the pooled features count, because their shape is the same for every mistake."""
    mistaken = MISTAKES[mistake](known.backbone, monkeypatch)
    if mistaken is None:
        return  # not a mistake for this source
    found = known.differences(mistaken)
    record_property("pooled", found["pooled"])
    assert "pooled" in differing(found), found


def test_tolerance() -> None:
    assert TOLERANCE == 1e-5
    assert differing({"at": 1e-5, "above": 1.1e-5, "nan": float("nan"), "shape": float("inf")}).keys() == {
        "above",
        "nan",
        "shape",
    }
