"""What networks of torchvision, timm and transformers compute: ours from the files that they wrote, on real images."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import relative_difference

from cifar_jax import Backbone, load_backbone
from cifar_jax.data import Splits
from cifar_jax.preprocess import TORCH
from cifar_jax.pretrained.convert import convert
from parity.compare import TOLERANCE, differences, differing, our_outputs
from parity.torch_networks import WRITERS, TorchCase, TorchReference, batch_norms, imported, make_reference

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

NUM_IMAGES = 256
CASES = [
    TorchCase("torchvision", "pth", 0, 224),
    TorchCase("torchvision", "legacy-pth", 1, 96),
    TorchCase("torchvision", "pth", 2, 64, depth=101),
    TorchCase("torchvision", "pth", 3, 64, depth=152),
    TorchCase("timm", "hub", 4, 96, usual=False),
    TorchCase("timm", "hub-bin", 5, 64),
    TorchCase("timm", "pth", 6, 96),
    TorchCase("transformers", "hub", 7, 96),
    TorchCase("transformers", "hub-bin", 8, 64, usual=False),
    TorchCase("transformers", "hub", 9, 96, in_1x1=True),
    TorchCase("transformers", "legacy-pth", 10, 64),
]
MUTATED = [
    TorchCase("torchvision", "pth", 0, 64),
    TorchCase("timm", "hub", 0, 64, usual=False),
    TorchCase("transformers", "hub", 0, 64),
]
Record = Callable[[str, float], None]
Written = Callable[[TorchCase], AbstractContextManager[tuple[TorchReference, Path]]]


@pytest.fixture(scope="module")
def torch_libs() -> Iterator[SimpleNamespace]:
    with imported() as libs:
        yield libs


@pytest.fixture(scope="module")
def torch_written(torch_libs: SimpleNamespace, cifar10: Splits, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Makes a reference network and has its library write it; the files go when the context ends."""

    @contextmanager
    def write(case: TorchCase) -> Iterator[tuple[TorchReference, Path]]:
        images = cifar10.train.images[: 8 if case.image_size > 96 else 32]
        reference = make_reference(torch_libs, case, images)
        directory = tmp_path_factory.mktemp("weights")
        try:
            yield reference, WRITERS[case.writer](reference, directory)
        finally:
            shutil.rmtree(directory)

    return write


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stages_features_and_logits_agree(
    case: TorchCase, torch_written: Written, cifar10: Splits, record_property: Record
) -> None:
    images = cifar10.test.images[: NUM_IMAGES if case.image_size <= 96 else NUM_IMAGES // 4]
    with torch_written(case) as (reference, path):
        assert_alive(reference, images[:16])
        backbone = load_backbone(path)
        assert backbone.config.stride_in_1x1 == case.in_1x1
        assert (backbone.preprocessing == TORCH) == case.usual
        found = differences(our_outputs(backbone, case.image_size), reference, images, batch_size=16)
        found |= logits_difference(backbone, reference, images[:64])
    for name, value in found.items():
        record_property(name, value)
    assert differing(found) == {}


def logits_difference(backbone: Backbone, reference: TorchReference, images_u8: np.ndarray) -> dict[str, float]:
    """Of the network's own classifier on our features."""
    pooled = our_outputs(backbone, reference.case.image_size)(images_u8)[-1]
    assert backbone.top is not None and backbone.top["bias"].shape == (1000,)
    return {
        "logits": relative_difference(
            pooled @ backbone.top["kernel"] + backbone.top["bias"], reference.run(images_u8)[1]
        )
    }


def assert_alive(reference: TorchReference, images_u8: np.ndarray) -> None:
    """Dead networks agree about everything, and ordinary statistics hide a wrong epsilon: this one is neither."""
    *stages, pooled = reference(images_u8)
    for stage in stages:
        assert 0.3 < stage.std() < 3
        assert 0.05 < (stage == 0).mean() < 0.5, "its relu cuts some off, not all"
    assert pooled.std(axis=0).mean() > 0.3 * pooled.std(), "images differ from each other, not only channels"
    variances = np.concatenate([norm.running_var.numpy() for norm in batch_norms(reference.model)])
    means = np.concatenate([norm.running_mean.numpy() for norm in batch_norms(reference.model)])
    assert np.abs(means).mean() > 0.1
    assert ((variances > 5e-6) & (variances < 2e-5)).mean() > 0.02
    assert (variances > 0.1).mean() > 0.4


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes are noticed


def reconfigured(**changes: Any) -> Callable[[Backbone], Backbone]:
    return lambda backbone: backbone.replace(config=replace(backbone.config, **changes))


def repixelled(**changes: Any) -> Callable[[Backbone], Backbone]:
    return lambda backbone: backbone.replace(preprocessing=replace(backbone.preprocessing, **changes))


def swapped(backbone: Backbone) -> Backbone:
    """The shortcut's kernel and the last one of a stage's first block, which have the same shape in the first stage."""
    variables = jax.tree.map(lambda leaf: leaf, backbone.variables)
    block = variables["params"]["stage1_block1"]
    block["conv3"], block["conv_proj"] = block["conv_proj"], block["conv3"]
    return backbone.replace(variables=variables)


MISTAKES = {
    "stride in the first 1x1": reconfigured(stride_in_1x1=True),
    "epsilon 1.001e-5 for 1e-5": reconfigured(bn_epsilon=1.001e-5),
    "epsilon 1e-3 for 1e-5": reconfigured(bn_epsilon=1e-3),
    "max-pool not padded": reconfigured(pool_padding=0),
    "BGR for RGB": repixelled(channels="bgr"),
    "mean forgotten": repixelled(mean=(0.0, 0.0, 0.0)),
    "another mean": repixelled(mean=(0.45, 0.45, 0.45)),
    "not divided by 255": repixelled(scale=1.0),
    "two tensors swapped": swapped,
}


@pytest.mark.parametrize("case", MUTATED, ids=str)
def test_mistakes_are_noticed(
    case: TorchCase, torch_written: Written, cifar10: Splits, record_property: Record
) -> None:
    images = cifar10.test.images[:8]
    with torch_written(case) as (reference, path):
        theirs, backbone = reference(images), load_backbone(path)

    def found(backbone: Backbone) -> dict[str, float]:
        return differences(our_outputs(backbone, case.image_size), lambda _: theirs, images, len(images))

    assert differing(found(backbone)) == {}
    for mistake, make in MISTAKES.items():
        value = found(make(backbone))["pooled"]
        record_property(mistake, value)
        assert not value <= TOLERANCE, mistake


# ---------------------------------------------------------------------------------------------------------------------
# The way back


@pytest.mark.parametrize("lib", ["torchvision", "timm", "transformers"])
def test_what_convert_writes_goes_home(
    lib: str, torch_libs: SimpleNamespace, torch_written: Written, cifar10: Splits, tmp_path: Path
) -> None:
    """Another network of the library takes it whole, and computes the same bits as the one it came from."""
    case = TorchCase(lib, "pth", 11, 64)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "model.safetensors"
    images = cifar10.test.images[:8]
    with torch_written(case) as (reference, path):
        convert(path, ours)
        convert(ours, theirs, "huggingface" if lib == "transformers" else "torchvision")
        wanted = reference.run(images)
    other = make_reference(torch_libs, replace(case, seed=12), images)
    assert relative_difference(other.run(images)[1], wanted[1]) > 0.1
    if lib == "transformers":
        other.model.config.save_pretrained(tmp_path)
        model, info = type(other.model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    else:
        model = other.model
        tensors = safetensors.numpy.load_file(theirs)
        model.load_state_dict({name: torch_libs.torch.tensor(value) for name, value in tensors.items()}, strict=True)
    found = TorchReference(torch_libs, model, case).run(images)
    for a, b in zip((*found[0], found[1]), (*wanted[0], wanted[1]), strict=True):
        np.testing.assert_array_equal(a, b)
