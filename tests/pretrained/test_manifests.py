"""Files with the names and shapes of the published ones load, and every tensor fills the variable of its name.

The published files are not available here; their manifests (see tests/make_manifests.py) list their tensors.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden.published import (
    MANIFESTS,
    Manifest,
    in_layout,
    place,
    read_manifest,
    tensors_of,
    write_keras,
    write_pth,
    write_safetensors,
)

from cifar_jax import Backbone, load_backbone
from cifar_jax.models.preprocess import CAFFE, TORCH
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained.registry import entries

KERAS = {"stride_in_1x1": True, "conv_bias": True, "bn_epsilon": 1.001e-5}
PYTORCH = {"stride_in_1x1": False, "conv_bias": False, "bn_epsilon": 1e-5}
# Variant, configuration and writer by prefix of the manifest's name, the longest first.
FAMILIES = {
    "keras-resnet50-2016": ("keras-2016", KERAS | {"bn_epsilon": 1e-3}, write_keras),
    "keras": ("keras", KERAS, write_keras),
    "torchvision": ("torchvision", PYTORCH, write_pth),
    "timm": ("torchvision", PYTORCH, write_safetensors),
    "huggingface": ("huggingface", PYTORCH, write_safetensors),
}


class Published(NamedTuple):
    """A file generated from a manifest, and the backbone loaded from it."""

    name: str
    manifest: Manifest
    file_size: int
    backbone: Backbone

    @property
    def family(self) -> str:
        return next(family for family in FAMILIES if self.name.startswith(family))

    def tensors(self) -> dict[tuple[str, ...], tuple[str, tuple[int, ...]]]:
        """Returns the (name, shape) of tensors by the path of the variable that they fill."""
        return {place(layer, name): (name, shape) for layer, name, shape in tensors_of(self.manifest)}


@pytest.fixture(scope="module", params=sorted(path.stem for path in MANIFESTS.glob("*.json")))
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    manifest, path = read_manifest(request.param), tmp_path_factory.mktemp("published") / "weights"
    write = next(write for family, (*_, write) in FAMILIES.items() if request.param.startswith(family))
    write(path, manifest, lambda _, name, shape: value(name, shape))
    yield Published(request.param, manifest, path.stat().st_size, load_backbone(path))
    path.unlink()


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns numbers unique to a tensor; positive, so that they are valid variances."""
    if name.endswith("num_batches_tracked"):
        return np.array(7)
    # A prime period, so that a transposed or swapped tensor differs; as many random numbers as weights take seconds.
    period = np.random.default_rng(zlib.crc32(name.encode())).random(997, np.float32) + np.float32(0.5)
    return np.resize(period, shape)


def test_every_published_file_has_its_manifest() -> None:
    ours = {path.stem for path in MANIFESTS.glob("*.json")}
    assert {name for name, entry in entries().items() if entry.file.endswith((".h5", ".pth"))} <= ours


def test_variant_matches_the_source(published: Published) -> None:
    variant, config, _ = FAMILIES[published.family]
    backbone = published.backbone
    assert backbone.variant == f"{variant} (by its tensor names)"
    if published.name in entries():
        assert variant == entries()[published.name].variant
    assert backbone.config == ResNetConfig(stage_sizes=(3, 4, 6, 3), width=64, pool_padding=1, **config)
    assert backbone.preprocessing == (CAFFE if config["conv_bias"] else TORCH)
    assert backbone.image_size == 224


def test_every_tensor_fills_the_variable_of_its_name(published: Published) -> None:
    filled, tensors = flatten_dict(published.backbone.variables), published.tensors()
    wanted = {path for path in tensors if path[0] != "top" and path[-1] != "count"}
    assert filled.keys() == wanted
    for path in wanted:
        name, shape = tensors[path]
        # A 1x1 convolution's kernel is a dense one here.
        ours = filled[path][None, None] if filled[path].ndim == 2 else filled[path]
        assert np.array_equal(in_layout(ours, shape), value(name, shape)), (path, name)
    biases = 26_560 if FAMILIES[published.family][1]["conv_bias"] else 0
    assert sum(leaf.size for leaf in filled.values()) == 23_561_152 + biases


def test_top_is_kept_separately(published: Published) -> None:
    top, tensors = published.backbone.top, published.tensors()
    if ("top", "kernel") not in tensors:
        assert top is None and published.name in ("keras-resnet50", "keras-resnet50-2016")
        return
    assert top is not None and top.keys() == {"kernel", "bias"}
    assert top["kernel"].shape == (2048, 1000)
    for leaf in ("kernel", "bias"):
        name, shape = tensors["top", leaf]
        assert np.array_equal(in_layout(top[leaf], shape), value(name, shape))


def test_size_is_close_to_that_of_the_published_file(published: Published) -> None:
    """Checks the manifests against the published file sizes.

    Keras's generated files lack 68 layers without weights, of 700 to 800 bytes each. The group inside each layer's
    group, which newer files have and those of 2016 do not, amounts to 100 kB.
    """
    if published.name not in entries():
        return
    size = entries()[published.name].size
    bytes_each = [8 if name.endswith("num_batches_tracked") else 4 for _, name, _ in tensors_of(published.manifest)]
    counts = [int(np.prod(shape)) for _, _, shape in tensors_of(published.manifest)]
    tensors = sum(each * count for each, count in zip(bytes_each, counts, strict=True))
    assert size - 500_000 < tensors < size
    if "keras" in published.family:
        assert 0 < size - published.file_size < 80_000
