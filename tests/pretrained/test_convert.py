"""`convert`: bit-exact round trips between all formats; targets that would change the network are refused."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from helpers import (
    NARROW,
    NARROW_TORCH,
    command,
    files_below,
    full_disk,
    is_one_error,
    is_refused,
    keras_tensors,
    torch_tensors,
    write_keras_h5,
)
from torch_files import write_torch

from cifar_jax.files import sha256_of_file
from cifar_jax.models.preprocess import TORCH, EvalTransform
from cifar_jax.pretrained import Backbone, load_backbone, save_backbone
from cifar_jax.pretrained.convert import TARGETS, convert
from cifar_jax.pretrained.formats.keras_h5 import read_keras_h5
from cifar_jax.pretrained.names import keras as keras_names
from cifar_jax.pretrained.random_init import init_variables

MANIFESTS = Path(__file__).resolve().parents[1] / "golden" / "manifests"


pytestmark = pytest.mark.usefixtures("narrow_resnet")


def keras_file(path, family="keras", top="predictions"):
    rng = np.random.default_rng(2)
    classifier = {f"{top}/kernel": rng.normal(size=(32, 5)), f"{top}/bias": rng.normal(size=5)}
    tensors = keras_tensors(NARROW, family) | {name: value.astype(np.float32) for name, value in classifier.items()}
    return write_keras_h5(path, tensors), tensors


def torch_file(path, family="torchvision"):
    tensors = torch_tensors(NARROW_TORCH, family)
    if family == "huggingface":
        tensors = {
            name if name.startswith("classifier") else f"resnet.{name}": value for name, value in tensors.items()
        }
    return write_torch(path, tensors), tensors


def assert_same_tensors(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def assert_same_network(a, b):
    assert (a.config, a.preprocessing, a.image_size) == (b.config, b.preprocessing, b.image_size)
    assert a.transform == b.transform
    assert_same_tensors(flatten_dict(a.variables), flatten_dict(b.variables))
    assert_same_tensors(a.top, b.top)


@pytest.mark.parametrize(("family", "top"), [("keras", "predictions"), ("keras-2016", "fc1000")])
def test_keras_roundtrip(tmp_path, family, top):
    source, tensors = keras_file(tmp_path / "a.h5", family, top)
    convert(source, tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c.h5")
    assert_same_network(load_backbone(tmp_path / "b.safetensors"), load_backbone(source))
    assert_same_network(load_backbone(tmp_path / "c.h5"), load_backbone(source))
    assert_same_tensors(read_keras_h5(tmp_path / "c.h5").tensors, tensors)


@pytest.mark.parametrize("family", ["torchvision", "huggingface"])
def test_torch_roundtrip(tmp_path, family):
    source, tensors = torch_file(tmp_path / "a.pth", family)
    convert(source, tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", family)
    assert_same_network(load_backbone(tmp_path / "b.safetensors"), load_backbone(source))
    # `num_batches_tracked` is not kept, because it is not needed to run the network.
    wanted = {name: value * 0 if name.endswith("num_batches_tracked") else value for name, value in tensors.items()}
    assert_same_tensors(safetensors.numpy.load_file(tmp_path / "c.safetensors"), wanted)
    with safetensors.safe_open(tmp_path / "c.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_torchvision_and_transformers_convert_to_each_other(tmp_path):
    source, _ = torch_file(tmp_path / "a.pth")
    convert(source, tmp_path / "b.safetensors", "huggingface")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "torchvision")
    for name in ("b", "c"):
        assert_same_network(load_backbone(tmp_path / f"{name}.safetensors"), load_backbone(source))


def test_files_without_top_convert_without_top(tmp_path):
    tensors = {
        name: value for name, value in torch_tensors(NARROW_TORCH, "huggingface").items() if "classifier" not in name
    }
    convert(write_torch(tmp_path / "a.pth", tensors), tmp_path / "b.safetensors", "huggingface")
    found = safetensors.numpy.load_file(tmp_path / "b.safetensors")
    assert found.keys() == tensors.keys()  # without a prefix, as in ResNetModel
    convert(write_keras_h5(tmp_path / "a.h5", keras_tensors()), tmp_path / "c.h5")
    assert read_keras_h5(tmp_path / "c.h5").tensors.keys() == keras_tensors().keys()


def test_equal_weights_make_equal_files(tmp_path):
    source, _ = keras_file(tmp_path / "a.h5")
    for suffix in (".h5", ".safetensors"):
        first, second = (convert(source, tmp_path / f"{name}{suffix}")["sha256"] for name in ("b", "c"))
        assert first == second == sha256_of_file(tmp_path / f"b{suffix}")


@pytest.mark.parametrize("name", ["keras-resnet50", "keras-resnet50-2016"])
def test_layer_order_matches_keras(name):
    """Keras loads layers by order, and the kernels of the shortcut and the last convolution have the same shape."""
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    family = "keras-2016" if "2016" in name else "keras"
    names = keras_names.FAMILIES[family].name_map((3, 4, 6, 3)).values()
    assert list(dict.fromkeys(name.rpartition("/")[0] for name in names)) == list(manifest)


def test_weight_names_and_order_match_keras(tmp_path):
    source, _ = keras_file(tmp_path / "a.h5")
    convert(source, tmp_path / "b.h5")
    with h5py.File(tmp_path / "b.h5") as file:
        assert list(file["conv1_bn"].attrs["weight_names"]) == [
            f"conv1_bn/{name}:0".encode() for name in ("gamma", "beta", "moving_mean", "moving_variance")
        ]
        assert list(file["conv1_conv"].attrs["weight_names"]) == [b"conv1_conv/kernel:0", b"conv1_conv/bias:0"]
        assert file.attrs["keras_version"] == "2.15.0" and file.attrs["layer_names"][-1] == b"predictions"


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def refused(capsys, *arguments):
    result = command(capsys, "convert", *arguments)
    is_refused(result)
    return result.err


@pytest.mark.parametrize(
    ("changes", "to", "parts"),
    [
        ({}, "keras", ["must stride in its 3x3 convolutions", "do without biases", "would stride in its first 1x1"]),
        ({"stride_in_1x1": True}, "torchvision", ["must stride in its first 1x1", "would stride in its 3x3"]),
        ({"bn_epsilon": 1e-3}, "torchvision", ["must add 0.001 to its variances", "would add 1e-05"]),
        ({"pool_padding": 0}, "torchvision", ["must pad its max-pool by 0", "would pad its max-pool by 1"]),
        ({"width": 8}, "torchvision", ["must begin with 8 channels", "would begin with 4"]),
        ({"conv_bias": True}, "huggingface", ["must have biases", "would do without biases"]),
    ],
)
def test_incompatible_targets_are_refused(tmp_path, capsys, changes, to, parts):
    config = replace(NARROW_TORCH, **changes)
    variables = init_variables(jax.random.key(0), config)
    save_backbone(tmp_path / "a.safetensors", Backbone(config, TORCH, 32, variables))
    target = tmp_path / f"b{TARGETS[to].suffixes[0]}"
    message = refused(capsys, tmp_path / "a.safetensors", target, "--to", to)
    assert f"cannot be converted to {to}" in message and all(part in message for part in parts), message
    assert files_below(tmp_path) == ["a.safetensors"]


def test_keras_does_not_convert_to_torchvision(tmp_path, capsys):
    source, _ = keras_file(tmp_path / "a.h5")
    assert "would stride in its 3x3" in refused(capsys, source, tmp_path / "b.safetensors", "--to", "torchvision")


@pytest.mark.parametrize(
    ("target", "more", "part"),
    [
        ("b.pth", [], "must end in .safetensors or .h5"),
        ("b.safetensors", ["--to", "keras"], "must end in .h5"),
        ("b.h5", ["--to", "ours"], "must end in .safetensors"),
        ("nowhere/b.h5", [], "does not exist"),
        ("there.h5", [], "already exists. Pass --overwrite"),
        ("a.h5", ["--overwrite"], "is the file to convert"),
        ("b.h5", ["--to", "onnx"], "onnx"),
        ("b.h5", ["--variant", "torchvision"], "does not fit"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, capsys, target, more, part):
    source, _ = keras_file(tmp_path / "a.h5")
    (tmp_path / "there.h5").write_bytes(b"kept")
    before = sha256_of_file(source)
    assert part in refused(capsys, source, tmp_path / target, *more)
    assert (tmp_path / "there.h5").read_bytes() == b"kept" and sha256_of_file(source) == before
    assert files_below(tmp_path) == ["a.h5", "there.h5"]


def test_full_disk_leaves_no_file(tmp_path, capsys):
    source, _ = keras_file(tmp_path / "a.h5")
    for target in ("b.h5", "b.safetensors"):
        with full_disk(at=5000):
            result = command(capsys, "convert", source, tmp_path / target)
        is_one_error(result, 1, "could not be written")
    assert files_below(tmp_path) == ["a.h5"]


def test_summary(tmp_path, capsys):
    source, _ = keras_file(tmp_path / "a.h5")
    result = command(capsys, "convert", source, tmp_path / "b.safetensors", "--json")
    about = json.loads(result.out)
    assert about["sha256"] == sha256_of_file(tmp_path / "b.safetensors") and about["variant"].startswith("keras (by")
    assert about["top"] == "5 classes"


def test_evaluation_transform_is_kept(tmp_path):
    backbone = load_backbone(torch_file(tmp_path / "a.pth")[0])
    usual, other = tmp_path / "usual.safetensors", tmp_path / "other.safetensors"
    save_backbone(usual, backbone)
    save_backbone(other, backbone.replace(transform=EvalTransform(235, 224, "bicubic")))
    convert(other, tmp_path / "c.safetensors")
    assert load_backbone(tmp_path / "c.safetensors").transform == EvalTransform(235, 224, "bicubic")
    assert load_backbone(usual).transform == EvalTransform()
    # The usual one is not recorded, so that such files stay what they were before it was recorded at all.
    for path, recorded in ((usual, False), (other, True)):
        with safetensors.safe_open(path, framework="numpy") as file:
            assert ("transform" in json.loads(file.metadata()["cifar_jax"])) == recorded


def test_lost_evaluation_transform_is_logged(tmp_path, log):
    backbone = load_backbone(torch_file(tmp_path / "a.pth")[0])
    save_backbone(tmp_path / "b.safetensors", backbone.replace(transform=EvalTransform(232, 224)))
    log.clear()
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "torchvision")
    (message,) = log.messages
    assert "keep a note of it" in message and "photos: shorter side to 232 (bilinear), centre crop of 224." in message


@pytest.mark.parametrize(
    "transform",
    [
        {"shorter": 100, "side": 224},
        {"shorter": 256.0},
        {"shorter": "256"},
        {"interpolation": "cubic"},
        {"more": 1},
        [],
    ],
)
def test_invalid_evaluation_transform_in_a_file_is_refused(tmp_path, refusal, transform):
    path = tmp_path / "a.safetensors"
    save_backbone(path, load_backbone(torch_file(tmp_path / "a.pth")[0]))
    with safetensors.safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["cifar_jax"])
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors, path, {"cifar_jax": json.dumps(about | {"transform": transform})})
    assert "has invalid metadata" in refusal(path)


def test_lost_preprocessing_is_logged(tmp_path, log):
    source = torch_file(tmp_path / "a.pth")[0]
    save_backbone(tmp_path / "b.safetensors", load_backbone(source).replace(image_size=160))
    log.clear()
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "torchvision")
    (message,) = log.messages
    assert "cannot record the preprocessing" in message and "160 pixels" in message
