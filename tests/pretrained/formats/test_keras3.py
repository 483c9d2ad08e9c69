"""Keras 3 files: weights by class and number, matched by their stored names or by the archive's config."""

import json
import zipfile

import h5py
import numpy as np
import pytest
from helpers import keras_description, keras_tensors, write_keras3_h5

from cifar_jax.pretrained import load_backbone
from cifar_jax.pretrained.formats.keras3 import snake_case

pytestmark = pytest.mark.usefixtures("narrow_resnet")


@pytest.fixture
def tensors():
    rng = np.random.default_rng(1)
    top = {"predictions/kernel": rng.normal(size=(32, 5)), "predictions/bias": rng.normal(size=5)}
    return keras_tensors() | {name: value.astype(np.float32) for name, value in top.items()}


def layers_of(tensors):
    return list(dict.fromkeys(name.rpartition("/")[0] for name in tensors))


def shuffled(tensors):
    """Shuffles the layers: tensors must be matched by name, whatever their order in the file."""
    layers = layers_of(tensors)
    np.random.default_rng(0).shuffle(layers)
    return {name: tensors[name] for layer in layers for name in tensors if name.rpartition("/")[0] == layer}


def archived(path, tensors, description, named=False, change=lambda file: None, compression=zipfile.ZIP_STORED):
    weights = write_keras3_h5(path.with_suffix(".h5"), tensors, named)
    with h5py.File(weights, "a") as file:
        change(file)
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("metadata.json", "{}")
        file.writestr("config.json", description if isinstance(description, str) else json.dumps(description))
        file.write(weights, "model.weights.h5")
    weights.unlink()
    return path


def assert_filled(backbone, tensors):
    block = backbone.variables["params"]["stage2_block1"]
    np.testing.assert_array_equal(block["conv_proj"]["kernel"], tensors["conv3_block1_0_conv/kernel"][0, 0])
    np.testing.assert_array_equal(block["conv3"]["kernel"], tensors["conv3_block1_3_conv/kernel"][0, 0])
    np.testing.assert_array_equal(block["conv2"]["bias"], tensors["conv3_block1_2_conv/bias"])
    np.testing.assert_array_equal(block["bn2"]["scale"], tensors["conv3_block1_2_bn/gamma"])
    variance = backbone.variables["batch_stats"]["stage1_block1"]["bn_proj"]["var"]
    np.testing.assert_array_equal(variance, tensors["conv2_block1_0_bn/moving_variance"])
    np.testing.assert_array_equal(backbone.top["kernel"], tensors["predictions/kernel"])


def test_names_stored_with_the_weights(tmp_path, tensors):
    backbone = load_backbone(write_keras3_h5(tmp_path / "x.weights.h5", shuffled(tensors)))
    assert_filled(backbone, tensors)
    assert backbone.variant == "keras (by its tensor names)"


@pytest.mark.parametrize("named", [False, True])
def test_archive_is_read_in_the_order_of_its_config(tmp_path, tensors, named):
    held = shuffled(tensors)
    backbone = load_backbone(archived(tmp_path / "x.keras", held, keras_description(layers_of(held)), named))
    assert_filled(backbone, tensors)
    assert backbone.variant == "keras (by its description)"


def test_nested_model(tmp_path, tensors):
    def nest(file):
        file.move("layers", "inner")
        file.create_group("layers/functional")
        file.move("inner", "layers/functional/layers")

    inner = keras_description(layers_of(tensors))
    outer = {
        "class_name": "Sequential",
        "config": {"layers": [{**inner, "config": {**inner["config"], "name": "base"}}]},
    }
    assert_filled(load_backbone(archived(tmp_path / "x.keras", tensors, outer, change=nest)), tensors)


def test_file_without_layer_names_is_refused(tmp_path, tensors, refusal):
    path = write_keras3_h5(tmp_path / "x.weights.h5", tensors, named=False)
    assert "written by Keras 3's save_weights, which stores no layer names" in refusal(path)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            lambda file: file["layers/conv2d/vars"].attrs.update(name="conv1_conv"),
            "but 'conv2_block1_1_conv' in the model config",
        ),
        (lambda file: file.move("layers/conv2d_2", "layers/conv2d_77"), "that its model config does not list"),
        (lambda file: file.pop("layers/conv2d_1"), "missing tensors: conv2_block1_2_conv/bias"),
        (
            lambda file: file.move("layers/conv2d/vars/1", "layers/conv2d/vars/7"),
            "unexpected tensors: conv2_block1_1_conv/7",
        ),
        (
            lambda file: file.move("layers/conv2d/vars/1", "layers/conv2d/vars/x"),
            "unexpected tensors: conv2_block1_1_conv/x",
        ),
        (lambda file: file.pop("layers"), "it has no layer_names"),
    ],
)
def test_inconsistent_archives_are_refused(tmp_path, tensors, refusal, change, part):
    path = archived(tmp_path / "x.keras", tensors, keras_description(layers_of(tensors)), True, change)
    assert part in refusal(path)


def test_duplicate_layer_names_are_refused(tmp_path, tensors, refusal):
    path = write_keras3_h5(tmp_path / "x.weights.h5", tensors)
    with h5py.File(path, "a") as file:
        file["layers/conv2d/vars"].attrs["name"] = "conv1_conv"
    assert "holds conv1_conv/kernel twice" in refusal(path)


@pytest.mark.parametrize("description", ["{", "[]", "{}", '{"config": {"layers": [3]}}', "[" * 10**5])
def test_invalid_configs_are_refused(tmp_path, tensors, refusal, description):
    message = refusal(archived(tmp_path / "x.keras", tensors, description))
    assert "cannot be parsed" in message or "corrupt" in message


def test_compressed_archive_is_refused(tmp_path, tensors, refusal):
    description = keras_description(layers_of(tensors))
    path = archived(tmp_path / "x.keras", tensors, description, compression=zipfile.ZIP_DEFLATED)
    assert "compressed or encrypted" in refusal(path)


def test_snake_case_matches_keras_group_names():
    names = {
        "Conv2D": "conv2d",
        "BatchNormalization": "batch_normalization",
        "ReLU": "re_lu",
        "ZeroPadding2D": "zero_padding2d",
    }
    assert {name: snake_case(name) for name in names} == names
