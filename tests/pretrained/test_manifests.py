"""Files with the names and shapes of the published ones load, and every tensor goes where its name says.

The published files cannot be had here. Their manifests (see tests/make_manifests.py) say what they hold.
"""

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cifar_jax import Backbone, load_backbone
from cifar_jax.preprocess import CAFFE
from cifar_jax.pretrained.registry import entries
from cifar_jax.resnet import ResNetConfig

MANIFESTS = Path(__file__).resolve().parents[1] / "golden" / "manifests"
TOPS = ("probs", "fc1000")
VARIABLES = 23_587_712

Manifest = dict[str, list[tuple[str, list[int]]]]


class Published(NamedTuple):
    """A file made from a manifest, and what was loaded from it."""

    name: str
    manifest: Manifest
    file_size: int
    backbone: Backbone

    def tops(self) -> list[str]:
        return [layer for layer in self.manifest if layer in TOPS]


@pytest.fixture(scope="module", params=sorted(path.stem for path in MANIFESTS.glob("*.json")))
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    manifest = json.loads((MANIFESTS / f"{request.param}.json").read_text(encoding="utf-8"))
    path = tmp_path_factory.mktemp("published") / "weights.h5"
    write(manifest, path)
    yield Published(request.param, manifest, path.stat().st_size, load_backbone(path))
    path.unlink()


def write(manifest: Manifest, path: Path) -> None:
    """A weights file as Keras writes it, layers without weights among the others."""
    layers = {"input_1": [], **manifest, "activation_49": []}
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer, weights in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name, _ in weights]
            for name, shape in weights:
                group[name] = value(name, shape)


def value(name: str, shape: list[int]) -> np.ndarray:
    """Random numbers that no other tensor has; positive, as variances are."""
    return np.random.default_rng(zlib.crc32(name.encode())).random(shape, np.float32) + np.float32(0.5)


def test_every_published_file_has_its_manifest() -> None:
    """Of Keras; those of torchvision have the names that its own network gives, which parity with it holds."""
    of_keras = {name for name, entry in entries().items() if entry.file.endswith(".h5")}
    assert {path.stem for path in MANIFESTS.glob("*.json")} == of_keras


def test_it_runs_as_its_generation_does(published: Published) -> None:
    of_2016 = "2016" in published.name
    backbone = published.backbone
    assert backbone.variant == f"{'keras-2016' if of_2016 else 'keras'} (by its tensor names)"
    assert backbone.variant.startswith(f"{entries()[published.name].variant} (")
    assert backbone.config == ResNetConfig(
        stage_sizes=(3, 4, 6, 3),
        width=64,
        stride_in_1x1=True,
        conv_bias=True,
        bn_epsilon=1e-3 if of_2016 else 1.001e-5,
        pool_padding=1,
    )
    assert backbone.preprocessing == CAFFE
    assert backbone.image_size == 224


def test_every_tensor_goes_where_its_name_says(published: Published) -> None:
    filled = flatten_dict(published.backbone.variables)
    wanted = {
        place(layer, name): (name, shape)
        for layer, weights in published.manifest.items()
        if layer not in TOPS
        for name, shape in weights
    }
    assert filled.keys() == wanted.keys()
    for path, (name, shape) in wanted.items():
        expected = value(name, shape)
        if shape[:2] == [1, 1]:  # a 1x1 convolution's kernel is a dense one here
            expected = expected[0, 0]
        assert np.array_equal(filled[path], expected), (path, name)
    assert sum(leaf.size for leaf in filled.values()) == VARIABLES


def test_shortcut_and_last_convolution_are_not_swapped(published: Published) -> None:
    """Both are [1, 1, 64, 256], and their order in the file changed between versions of Keras."""
    block = published.backbone.variables["params"]["stage1_block1"]
    shortcut, last = (
        ("res2a_branch1_W:0", "res2a_branch2c_W:0")
        if "2016" in published.name
        else ("conv2_block1_0_conv/kernel:0", "conv2_block1_3_conv/kernel:0")
    )
    assert np.array_equal(block["conv_proj"]["kernel"], value(shortcut, [1, 1, 64, 256])[0, 0])
    assert np.array_equal(block["conv3"]["kernel"], value(last, [1, 1, 64, 256])[0, 0])


def test_top_is_kept_apart(published: Published) -> None:
    top, tops = published.backbone.top, published.tops()
    assert len(tops) == published.name.endswith("-top")
    if not tops:
        assert top is None
        return
    (kernel, kernel_shape), (bias, bias_shape) = published.manifest[tops[0]]
    assert (kernel_shape, bias_shape) == ([2048, 1000], [1000])
    assert top is not None and top.keys() == {"kernel", "bias"}
    assert np.array_equal(top["kernel"], value(kernel, kernel_shape))
    assert np.array_equal(top["bias"], value(bias, bias_shape))


def test_size_is_nearly_that_of_the_published_file(published: Published) -> None:
    """Speaks for the manifests: what is missing is 68 layers without weights, at 700 to 800 bytes each.

    A group inside each layer's group, which the newer files have and those of 2016 have not, makes 100 kB.
    """
    size = entries()[published.name].size
    tensors = sum(4 * int(np.prod(shape)) for weights in published.manifest.values() for _, shape in weights)
    assert size - 500_000 < tensors < size
    assert 0 < size - published.file_size < 80_000


MODERN_ROLES = {"0": "_proj", "1": "1", "2": "2", "3": "3"}
ROLES_OF_2016 = {"1": "_proj", "2a": "1", "2b": "2", "2c": "3"}
LEAVES = {
    ("params", "kernel"): ("kernel", "W"),
    ("params", "bias"): ("bias", "b", "beta"),
    ("params", "scale"): ("gamma",),
    ("batch_stats", "mean"): ("moving_mean", "running_mean"),
    ("batch_stats", "var"): ("moving_variance", "running_std"),
}


def place(layer: str, name: str) -> tuple[str, ...]:
    """The variable that a published tensor fills: the way back of the library's name map, told by the file's names."""
    tensor = name.removeprefix(f"{layer}/").removeprefix(f"{layer}_").removesuffix(":0")
    ((collection, leaf),) = (at for at, names in LEAVES.items() if tensor in names)
    return (collection, *module(layer), leaf)


def module(layer: str) -> tuple[str, ...]:
    if layer in ("conv1", "conv1_conv"):
        return ("stem_conv",)
    if layer in ("bn_conv1", "conv1_bn"):
        return ("stem_bn",)
    if match := re.fullmatch(r"conv(\d)_block(\d)_(\d)_(conv|bn)", layer):
        stage, block, role, kind = match.groups()
        return (f"stage{int(stage) - 1}_block{block}", kind + MODERN_ROLES[role])
    match = re.fullmatch(r"(res|bn)(\d)([a-f])_branch(\w+)", layer)
    assert match, layer
    kind, stage, letter, role = match.groups()
    kind = {"res": "conv", "bn": "bn"}[kind]
    return (f"stage{int(stage) - 1}_block{'abcdef'.index(letter) + 1}", kind + ROLES_OF_2016[role])
