"""The comparison notices mistakes: each of these is made on our side, and must be seen by the same function."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import jax
import numpy as np
import pytest

import cifar_jax.resnet
from cifar_jax import Backbone, load_backbone
from cifar_jax.data import Splits
from cifar_jax.preprocess import CAFFE
from cifar_jax.pretrained import WeightsError
from parity.compare import TOLERANCE, differences, differing, our_outputs
from parity.networks import Case, Written

pytestmark = pytest.mark.parity

IMAGE_SIZE, NUM_IMAGES = 64, 8
Record = Callable[[str, float], None]


class Known(NamedTuple):
    """A file, what Keras computes from it, and the images that it did it for."""

    path: Path
    theirs: list[np.ndarray]
    images: np.ndarray

    def differences(self, backbone: Backbone) -> dict[str, float]:
        """How far a network of ours is from Keras's."""
        ours = our_outputs(backbone, IMAGE_SIZE)
        return differences(ours, lambda _: self.theirs, self.images, NUM_IMAGES)


@pytest.fixture(scope="module")
def modern(written: Written, cifar10: Splits) -> Iterator[Known]:
    yield from known(Case("keras", "tf_keras", "save_weights", 0, IMAGE_SIZE), written, cifar10)


@pytest.fixture(scope="module")
def of_2016(written: Written, cifar10: Splits) -> Iterator[Known]:
    yield from known(Case("keras-2016", "tf_keras", "keras-1", 0, IMAGE_SIZE), written, cifar10)


def known(case: Case, written: Written, cifar10: Splits) -> Iterator[Known]:
    images = cifar10.test.images[:NUM_IMAGES]
    with written(case) as (reference, path):
        yield Known(path, reference(images), images)


def assert_noticed(found: dict[str, float], record: Record) -> None:
    """The pooled features have one shape whatever the mistake, so they alone must tell."""
    record("pooled", found["pooled"])
    assert "pooled" in differing(found), found


def test_no_mistake_is_found_where_none_is_made(modern: Known, of_2016: Known) -> None:
    for reference in (modern, of_2016):
        assert differing(reference.differences(load_backbone(reference.path))) == {}


def reconfigured(backbone: Backbone, **changes: Any) -> Backbone:
    return backbone.replace(config=replace(backbone.config, **changes))


def rgb_for_bgr(backbone: Backbone) -> Backbone:
    return backbone.replace(preprocessing=replace(CAFFE, channels="rgb", mean=CAFFE.mean[::-1]))


def mean_forgotten(backbone: Backbone) -> Backbone:
    return backbone.replace(preprocessing=replace(CAFFE, mean=(0.0, 0.0, 0.0)))


def variance_as_deviation(backbone: Backbone) -> Backbone:
    """What Keras 1's name for the variance, `running_std`, suggests."""

    def squared(path: tuple[Any, ...], leaf: np.ndarray) -> np.ndarray:
        return leaf**2 if path[-1].key == "var" else leaf

    return backbone.replace(variables=jax.tree_util.tree_map_with_path(squared, backbone.variables))


MODERN_MISTAKES = {
    "epsilon 1e-5 for 1.001e-5": partial(reconfigured, bn_epsilon=1e-5),
    "epsilon 1e-3 for 1.001e-5": partial(reconfigured, bn_epsilon=1e-3),
    "stride in the 3x3 convolution": partial(reconfigured, stride_in_1x1=False),
    "max-pool not padded": partial(reconfigured, pool_padding=0),
    "RGB for BGR": rgb_for_bgr,
    "mean not subtracted": mean_forgotten,
}
MISTAKES_OF_2016 = {
    "epsilon 1.001e-5 for 1e-3": partial(reconfigured, bn_epsilon=1.001e-5),
    "variance taken for a deviation": variance_as_deviation,
}


@pytest.mark.parametrize("mistake", MODERN_MISTAKES)
def test_mistake_is_noticed(mistake: str, modern: Known, record_property: Record) -> None:
    backbone = MODERN_MISTAKES[mistake](load_backbone(modern.path))
    assert_noticed(modern.differences(backbone), record_property)


@pytest.mark.parametrize("mistake", MISTAKES_OF_2016)
def test_mistake_of_2016_is_noticed(mistake: str, of_2016: Known, record_property: Record) -> None:
    backbone = MISTAKES_OF_2016[mistake](load_backbone(of_2016.path))
    assert_noticed(of_2016.differences(backbone), record_property)


def test_same_padding_of_convolutions_is_noticed(
    modern: Known, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    usual = jax.lax.conv_general_dilated

    def same(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], _: object, **rest: Any) -> jax.Array:
        return usual(x, kernel, strides, "SAME", **rest)

    monkeypatch.setattr(jax.lax, "conv_general_dilated", same)
    assert_noticed(modern.differences(load_backbone(modern.path)), record_property)


def test_same_padding_of_the_pool_is_noticed(
    modern: Known, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    usual = cifar_jax.resnet.nn.max_pool
    monkeypatch.setattr(
        cifar_jax.resnet.nn, "max_pool", lambda *args, **rest: usual(*args, **rest | {"padding": "SAME"})
    )
    assert_noticed(modern.differences(load_backbone(modern.path)), record_property)


@pytest.fixture
def swap(modern: Known, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the file where the kernels of a block's `_0_conv` and `_3_conv` have changed places."""

    def swapped(block: str) -> Path:
        path = tmp_path / f"{block}.h5"
        with h5py.File(modern.path) as file, h5py.File(path, "w") as copy:
            for name in file:
                file.copy(name, copy)
            copy.attrs.update(file.attrs)
            shortcut, last = copy[f"{block}_0_conv"], copy[f"{block}_3_conv"]
            of_shortcut, of_last = f"{block}_0_conv/kernel:0", f"{block}_3_conv/kernel:0"
            kernels = shortcut[of_shortcut][()], last[of_last][()]
            del shortcut[of_shortcut], last[of_last]
            last[of_last], shortcut[of_shortcut] = kernels
        return path

    return swapped


def test_swapped_shortcut_is_noticed(modern: Known, swap: Callable[[str], Path], record_property: Record) -> None:
    """In the first stage both kernels have one shape, so the file loads; what it computes tells."""
    path = swap("conv2_block1")
    assert_noticed(modern.differences(load_backbone(path)), record_property)
    path.unlink()


def test_swapped_shortcut_of_another_shape_is_refused(swap: Callable[[str], Path]) -> None:
    path = swap("conv3_block1")
    with pytest.raises(WeightsError, match="conv3_block1_0_conv/kernel"):
        load_backbone(path)
    path.unlink()


def test_tolerance_is_the_one_that_parity_promises() -> None:
    assert TOLERANCE == 1e-5
    assert differing({"at": 1e-5, "above": 1.1e-5, "nan": float("nan"), "shape": float("inf")}).keys() == {
        "above",
        "nan",
        "shape",
    }
