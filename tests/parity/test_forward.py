"""Parity with Keras on 256 real images: stages, pooled features and logits, from files written by Keras."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from cifar_jax import load_backbone, make_extractor
from cifar_jax.data import Splits
from cifar_jax.pretrained.convert import convert
from parity.compare import TOLERANCE, assert_alive, differences, differing, our_outputs
from parity.networks import Case, Reference, Written, build, of_2016, statistics, write_as_keras_1

pytestmark = [
    pytest.mark.parity,
    # Keras 3.15 passes TensorFlow tensors without `copy` support to NumPy 2; Keras 2 advises against HDF5 files.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning"),
]

NUM_IMAGES = 256
KERAS_PARAMETERS = 23_587_712

# At least three seeds per generation, every writer, every top name. At 224 a pass takes half a minute.
CASES = [
    Case("keras", "keras", "save", 0, 224),
    Case("keras", "keras", "save", 1, 96, top="predictions"),
    Case("keras", "tf_keras", "save_weights", 2, 96, top="probs"),
    Case("keras", "tf_keras", "save_weights", 3, 64),
    Case("keras-2016", "tf_keras", "keras-1", 0, 224),
    Case("keras-2016", "tf_keras", "keras-1", 1, 96, top="fc1000"),
    Case("keras-2016", "tf_keras", "save", 2, 96),
    Case("keras-2016", "tf_keras", "save_weights", 3, 96),
    Case("keras-2016-unpadded", "tf_keras", "save_weights", 4, 96),
    Case("keras-2016-unpadded", "keras", "save", 5, 96),
    Case("keras", "keras", "archive", 6, 64, top="predictions"),
    Case("keras", "keras", "keras-3-weights", 7, 64, top="predictions"),
    Case("keras", "tf_keras", "archive", 8, 64),
    Case("keras-2016-unpadded", "keras", "archive", 9, 64),
]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def reference_and_path(case: Case, written: Written) -> Iterator[tuple[Reference, Path]]:
    with written(case) as both:
        yield both


def test_stages_features_and_logits_agree_with_keras(
    case: Case,
    reference_and_path: tuple[Reference, Path],
    cifar10: Splits,
    record_property: Callable[[str, float], None],
) -> None:
    reference, path = reference_and_path
    images = cifar10.test.images[:NUM_IMAGES]
    assert_alive(reference(images[:16]), *statistics(reference.model))
    # Tensor names identify the generation, but only a model config or the user can tell whether the pool is padded.
    described = case.writer in ("save", "archive")
    asked = case.variant if case.variant.endswith("unpadded") and not described else None
    backbone = load_backbone(path, asked)
    assert backbone.variant.startswith(f"{case.variant} (by ")
    assert backbone.preprocessing.name == "caffe"
    assert_same_top(backbone.top, reference, case.top)

    found = differences(
        our_outputs(backbone, case.image_size), reference, images, batch_size=16 if case.image_size > 96 else 64
    )
    assert ("logits" in found) == (case.top is not None)
    for name, value in found.items():
        record_property(name, value)
    assert differing(found) == {}


def assert_same_top(top: dict[str, np.ndarray] | None, reference: Reference, name: str | None) -> None:
    """Asserts that the file's classifier is kept separately, bit for bit."""
    if name is None:
        assert top is None
        return
    kernel, bias = reference.model.get_layer(name).get_weights()
    assert top is not None
    np.testing.assert_array_equal(top["kernel"], kernel)
    np.testing.assert_array_equal(top["bias"], bias)


def test_parameter_count_matches_keras(written: Written) -> None:
    with written(Case("keras", "keras", "save", 0, 64)) as (reference, path):
        count = sum(leaf.size for leaf in jax.tree.leaves(load_backbone(path).variables))
        assert count == reference.model.count_params() == KERAS_PARAMETERS


def test_extractor_agrees_with_keras(written: Written, cifar10: Splits) -> None:
    """Covers the optimised inference path, including a last batch that is not full."""
    images = cifar10.test.images[:50]
    with written(Case("keras", "tf_keras", "save_weights", 0, 64)) as (reference, path):
        theirs = reference(images)[4]
        ours = make_extractor(load_backbone(path), image_size=64, batch_size=32)(images)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() <= TOLERANCE


@pytest.mark.parametrize(
    "case",
    [
        Case("keras", "keras", "archive", 0, 64, top="predictions"),
        Case("keras", "tf_keras", "save_weights", 0, 64),
        Case("keras-2016", "tf_keras", "keras-1", 0, 64, top="fc1000"),
        Case("keras-2016", "keras", "save", 0, 64),
    ],
    ids=str,
)
def test_keras_loads_converted_file(case: Case, written: Written, libs: dict[str, ModuleType], tmp_path: Path) -> None:
    """Keras loads layers by order, and every weight is bit-identical after the round trip."""
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "back.h5"
    with written(case) as (reference, path):
        convert(path, ours)
        convert(ours, theirs)
        wanted = {layer.name: layer.get_weights() for layer in reference.model.layers}
        other = build(libs[case.lib], case)
        other.load_weights(theirs)
    for layer in other.layers:
        for a, b in zip(layer.get_weights(), wanted.get(layer.name, []), strict=True):
            np.testing.assert_array_equal(a, b)


def test_keras_loads_keras_1_layout(libs: dict[str, ModuleType], tmp_path: Path) -> None:
    """Keras 1 is no longer available; that Keras 2 loads our file as a Keras 1 file shows that its layout is right."""
    wanted, read = (of_2016(libs["tf_keras"], 64, "fc1000") for _ in range(2))
    path = tmp_path / "weights.h5"
    write_as_keras_1(wanted, path)
    read.load_weights(path)
    path.unlink()
    for a, b in zip(read.get_weights(), wanted.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
