"""Parity with torchvision, timm and transformers on real images, from files written by these libraries."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from conftest import relative_difference

from cifar_jax import load_backbone
from cifar_jax.data import Splits
from cifar_jax.models.preprocess import TORCH
from cifar_jax.pretrained.convert import convert
from cifar_jax.pretrained.verify import verify
from parity.compare import assert_alive, differences, differing, our_outputs
from parity.torch_networks import TorchCase, TorchReference, TorchWritten, make_reference, statistics

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

NUM_IMAGES = 256
CASES = [
    TorchCase("torchvision", "legacy-pth", 1, 96),
    TorchCase("timm", "hub-bin", 5, 64),
    TorchCase("transformers", "hub-bin", 8, 64, usual=False),
    TorchCase("transformers", "legacy-pth", 10, 64),
]
SLOW = [
    TorchCase("torchvision", "pth", 0, 224),
    TorchCase("torchvision", "pth", 2, 64, depth=101),
    TorchCase("torchvision", "pth", 3, 64, depth=152),
    TorchCase("timm", "hub", 4, 96, usual=False),
    TorchCase("timm", "pth", 6, 96),
    TorchCase("transformers", "hub", 7, 96),
    TorchCase("transformers", "hub", 9, 96, in_1x1=True),
]
Record = Callable[[str, float], None]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_stages_features_and_logits_agree(
    case: TorchCase, torch_written: TorchWritten, cifar10: Splits, record_property: Record
) -> None:
    images = cifar10.test.images[: NUM_IMAGES if case.image_size <= 96 else NUM_IMAGES // 4]
    with torch_written(case) as (reference, path):
        assert_alive(reference(images[:16]), *statistics(reference.model))
        backbone = load_backbone(path)
        assert backbone.config.stride_in_1x1 == case.in_1x1
        assert (backbone.preprocessing == TORCH) == case.usual
        found = differences(our_outputs(backbone, case.image_size), reference, images, batch_size=16)
    for name, value in found.items():
        record_property(name, value)
    assert differing(found) == {} and "logits" in found


@pytest.mark.parametrize("lib", ["torchvision", "timm", "transformers"])
def test_library_loads_converted_file(
    lib: str, torch_libs: SimpleNamespace, torch_written: TorchWritten, cifar10: Splits, tmp_path: Path
) -> None:
    """The library loads the converted file into another network, which gives bit-identical outputs."""
    case = TorchCase(lib, "pth", 11, 64)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "model.safetensors"
    images = cifar10.test.images[:8]
    with torch_written(case) as (reference, path):
        convert(path, ours)
        convert(ours, theirs, "huggingface" if lib == "transformers" else "torchvision")
        wanted = reference(images)
    other = make_reference(torch_libs, replace(case, seed=12), images)
    assert relative_difference(other(images)[-1], wanted[-1]) > 0.1
    if lib == "transformers":
        other.model.config.save_pretrained(tmp_path)
        model, info = type(other.model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    else:
        model = other.model
        tensors = safetensors.numpy.load_file(theirs)
        model.load_state_dict({name: torch_libs.torch.tensor(value) for name, value in tensors.items()}, strict=True)
    for a, b in zip(TorchReference(torch_libs, model, case)(images), wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("case", "library"),
    [
        (TorchCase("torchvision", "pth", 13, 64), "torchvision"),
        (TorchCase("timm", "hub", 14, 64, usual=False), "timm"),
        (TorchCase("transformers", "hub", 15, 64, in_1x1=True), "transformers"),
    ],
    ids=str,
)
def test_verify_weights_against_library(
    case: TorchCase, library: str, torch_written: TorchWritten, record_property: Record
) -> None:
    with torch_written(case) as (_, path):
        found = verify(path, against=library)
    for name, value in found.differences.items():
        record_property(name, value)
    assert found.problems == [] and list(found.differences) == [*(f"stage{n}" for n in range(1, 5)), "pooled", "logits"]
