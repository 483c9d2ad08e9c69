"""Invalid weights are refused with a one-line error before anything is written."""

import json
import os

import h5py
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from helpers import (
    NARROW,
    command,
    encoded,
    files_below,
    full_disk,
    is_one_error,
    keras_tensors,
    write_keras_h5,
)

from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.files import sha256_of_file
from cifar_jax.models.preprocess import EvalTransform
from cifar_jax.pretrained import load_backbone, random_backbone, save_backbone
from cifar_jax.pretrained.formats import safetensors_file

pytestmark = pytest.mark.usefixtures("narrow_resnet")

KERNEL, SHORTCUT, VARIANCE = "conv2_block1_2_conv/kernel", "conv2_block1_0_conv/kernel", "conv1_bn/moving_variance"


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("empty.h5", b"", "is empty"),
        ("page.h5", b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        ("error.h5", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
        ("text.h5", b"please find the weights attached", "is not a Keras HDF5 file"),
        ("model.pth", b"PK\x03\x04archive/data.pkl", "is corrupt or truncated"),
        ("cut.h5", b"\x89HDF\r\n\x1a\n" + b"\0" * 50, "is corrupt or truncated"),
        ("text.safetensors", b"please find the weights attached", "is not a valid safetensors file"),
        ("empty.safetensors", b"", "is not a valid safetensors file"),
    ],
)
def test_non_weights_files_are_refused(tmp_path, refusal, name, content, part):
    path = tmp_path / name
    path.write_bytes(content)
    assert part in refusal(path)


def try_to_train(capsys, tmp_path, weights, *more):
    options = ["--train-examples", 64, "--test-examples", 10, "--out", tmp_path / "out"]
    return command(capsys, "train", "--preset", "demo", "--weights", weights, *options, *more)


def test_invalid_paths_are_refused(tmp_path, capsys):
    (tmp_path / "directory.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.h5")  # opening a pipe without a writer would block forever
    cases = [
        (tmp_path / "missing.h5", "does not exist"),
        (tmp_path / "missing" / "weights", "does not exist"),
        ("~unknown-user/weights.h5", "does not exist"),
        (tmp_path / "directory.safetensors", "is a directory without model.safetensors or pytorch_model.bin"),
        (tmp_path / "pipe.h5", "is not a regular file"),
        ("x" * 300, "No file or known weights named"),
        (tmp_path / ("x" * 300 + ".h5"), "cannot be read (File name too long)"),
        ("resnet50", "keras-resnet50, keras-resnet50-top, keras-resnet50-2016"),
    ]
    for path, part in cases:
        is_one_error(try_to_train(capsys, tmp_path, path), 2, str(path), part)
    assert files_below(tmp_path) == ["directory.safetensors", "pipe.h5"]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_truncated_files_are_refused(tmp_path, refusal, native_file, share):
    keras_file = write_keras_h5(tmp_path / "weights.h5", keras_tensors())
    for path, part in ((keras_file, "is corrupt or truncated"), (native_file, "is not a valid safetensors file")):
        content = path.read_bytes()
        cut = tmp_path / f"cut{path.suffix}"
        cut.write_bytes(content[: int(share * len(content))])
        assert part in refusal(cut)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that do not match the network


def without(tensors, *names):
    return {name: value for name, value in tensors.items() if name not in names}


def filled(tensors, name, value):
    changed = tensors[name].copy()
    changed.flat[0] = value
    return tensors | {name: changed}


LAYER = ["conv3_block1_2_conv/bias", "conv3_block1_2_conv/kernel"]
OTHER = "conv3_block1_9_conv/kernel"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t | {KERNEL: t[KERNEL][:, :, :2]}, f"{KERNEL} has shape (3, 3, 2, 4), expected (3, 3, 4, 4)"),
        (
            lambda t: t | {SHORTCUT: t[SHORTCUT].transpose(0, 1, 3, 2)},
            f"{SHORTCUT} has shape (1, 1, 16, 4), expected (4, 16)",
        ),
        (lambda t: without(t, *LAYER), f"missing tensors: {', '.join(LAYER)}; unexpected tensors: none"),
        (lambda t: t | {OTHER: t[KERNEL]}, f"missing tensors: none; unexpected tensors: {OTHER}"),
        (
            lambda t: without(t, KERNEL) | {OTHER: t[KERNEL]},
            f"missing tensors: {KERNEL}; unexpected tensors: {OTHER}",
        ),
        (lambda t: filled(t, KERNEL, np.nan), f"non-finite values in {KERNEL}"),
        (lambda t: filled(t, VARIANCE, np.inf), f"non-finite values in {VARIANCE}"),
        (lambda t: filled(t, VARIANCE, -1e-9), f"negative variances in {VARIANCE}"),
    ],
)
def test_mismatched_tensors_are_refused(tmp_path, refusal, change, part):
    assert part in refusal(write_keras_h5(tmp_path / "weights.h5", change(keras_tensors())))


@pytest.mark.parametrize(
    ("layers", "part"),
    [
        (["block1_conv1", "block5_conv3"], "is not a Keras ResNet: its layers are named block1_conv1"),
        (["conv1_conv", "conv2_block1_0_conv"], "is not a Keras ResNet"),
        (["conv1_conv", "conv1_bn", "conv2_block1_1_conv", "conv2_block2_1_conv"], "holds a ResNet with (2,) blocks"),
    ],
)
def test_other_keras_networks_are_refused(tmp_path, refusal, layers, part):
    tensors = {f"{layer}/kernel": np.zeros((1, 1, 2, 2), np.float32) for layer in layers}
    assert part in refusal(write_keras_h5(tmp_path / "weights.h5", tensors))


@pytest.mark.parametrize(
    ("blocks", "part"),
    [
        (23, "missing tensors: conv1_bn/beta"),  # ResNet101, whose other tensors are missing
        (7, "(3, 4, 7, 3) blocks; supported are (3, 4, 6, 3) (ResNet50), (3, 4, 23, 3) (ResNet101)"),
    ],
)
def test_depth_is_detected_from_layer_names(tmp_path, refusal, monkeypatch, blocks, part):
    monkeypatch.undo()  # the real sizes
    sizes = {2: 3, 3: 4, 4: blocks, 5: 3}
    layers = ["conv1_conv", *(f"conv{s}_block{b + 1}_1_conv" for s, count in sizes.items() for b in range(count))]
    tensors = {f"{layer}/kernel": np.zeros((1, 1, 1, 1), np.float32) for layer in layers}
    assert part in refusal(write_keras_h5(tmp_path / "weights.h5", tensors))


# ---------------------------------------------------------------------------------------------------------------------
# HDF5 files without Keras's layout, or with data outside the file

STORED = f"{KERNEL.partition('/')[0]}/{KERNEL}:0"  # name of the kernel in the file


def moved_to_other_file(file, path):
    """Moves the kernel into another file, whose path is returned."""
    other = path.with_name("other.h5")
    with h5py.File(other, "w") as elsewhere:
        elsewhere[STORED] = file[STORED][()]
        elsewhere[STORED.partition("/")[0]].attrs["weight_names"] = encoded([f"{KERNEL}:0"])
    del file[STORED]
    return other


def with_external_link(file, path):
    file[STORED] = h5py.ExternalLink(moved_to_other_file(file, path), STORED)


def with_external_group(file, path):
    other, layer = moved_to_other_file(file, path), STORED.partition("/")[0]
    del file[layer]
    file[layer] = h5py.ExternalLink(other, layer)


def with_external_storage(file, path):
    raw = path.with_name("raw")
    raw.write_bytes(bytes(3 * 3 * 4 * 4 * 4))
    del file[STORED]
    file.create_dataset(STORED, (3, 3, 4, 4), "f4", external=[(str(raw), 0, h5py.h5f.UNLIMITED)])


def with_virtual_data(file, path):
    layout = h5py.VirtualLayout((3, 3, 4, 4), "f4")
    layout[...] = h5py.VirtualSource(str(moved_to_other_file(file, path)), STORED, shape=(3, 3, 4, 4))
    file.create_virtual_dataset(STORED, layout)


def with_huge_dataset(file, _):
    del file[STORED]
    file.create_dataset(STORED, (10**6, 10**6), "f4", chunks=(1000, 1000))


def with_many_hard_links(file, _):
    """Makes a file of one megabyte that would need fifty when read."""
    group = file["conv1_conv"]
    group["one"] = np.zeros(250_000, np.float32)
    names = [f"conv1_conv/more{number}" for number in range(50)]
    for name in names:
        group[f"{name}:0"] = group["one"]
    group.attrs["weight_names"] = np.append(group.attrs["weight_names"], encoded(f"{name}:0" for name in names))


def with_integers(file, _):
    del file[STORED]
    file[STORED] = np.zeros((3, 3, 4, 4), np.int32)


def with_missing_layer(file, _):
    del file["conv1_conv"]


def with_duplicate_layer_name(file, _):
    file.attrs["layer_names"] = np.append(file.attrs["layer_names"], b"conv1_conv")


def without_layer_names(file, _):
    del file.attrs["layer_names"]


def with_invalid_layer_names(file, _):
    file.attrs["layer_names"] = 3


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (with_external_link, "does not itself contain"),
        (with_external_group, "does not itself contain"),
        (with_external_storage, "in another file"),
        (with_virtual_data, "in another file"),
        (with_huge_dataset, "claims more data than a file of its size can hold"),
        (with_many_hard_links, "claims more data than a file of its size can hold"),
        (with_integers, "not an array of floating-point numbers"),
        (with_missing_layer, "does not itself contain /conv1_conv."),
        (with_duplicate_layer_name, "holds conv1_conv/bias twice"),
        (without_layer_names, "not a Keras file: it has no layer_names"),
        (with_invalid_layer_names, "is corrupt or truncated"),
    ],
)
def test_malformed_hdf5_files_are_refused(tmp_path, refusal, change, part):
    path = write_keras_h5(tmp_path / "weights.h5", keras_tensors())
    with h5py.File(path, "a") as file:
        change(file, path)
    assert part in refusal(path)


@pytest.mark.parametrize(
    "description",
    [
        "[]",
        "{",
        '{"config": {"layers": [3]}}',
        '{"config": {"layers": []}}',
        '{"config": {"layers": [{"class_name": "Conv2D", "config": {"use_bias": true, "kernel_size": [1, 1], '
        '"strides": [1, 1]}}, {"class_name": "BatchNormalization", "config": {"epsilon": "small"}}]}}',
    ],
)
def test_invalid_model_configs_are_refused(tmp_path, refusal, description):
    message = refusal(write_keras_h5(tmp_path / "weights.h5", keras_tensors(), model_config=description))
    assert "model config" in message or "corrupt" in message


# ---------------------------------------------------------------------------------------------------------------------
# Variants


@pytest.mark.parametrize(
    ("family", "variant", "parts"),
    [
        ("keras", "resnet", ["There is no --variant 'resnet'.", "keras, keras-2016, keras-2016-unpadded"]),
        ("keras", "torchvision", ["--variant torchvision does not fit", "have keras names"]),
        ("keras-2016", "keras", ["--variant keras does not fit", "have keras-2016 names"]),
    ],
)
def test_wrong_variant_is_refused(tmp_path, capsys, family, variant, parts):
    path = write_keras_h5(tmp_path / "weights.h5", keras_tensors(family=family))
    is_one_error(try_to_train(capsys, tmp_path, path, "--variant", variant), 2, *parts)


def test_variant_is_refused_where_it_is_not_open(tmp_path, capsys, native_file):
    result = try_to_train(capsys, tmp_path, "random", "--variant", "keras")
    is_one_error(result, 2, "--variant keras is for pretrained weights", "random")
    result = try_to_train(capsys, tmp_path, native_file, "--variant", "keras")
    is_one_error(result, 2, f"--variant keras does not apply to {native_file}")


# ---------------------------------------------------------------------------------------------------------------------
# Backbones in the project's own format


def make_backbone():
    return random_backbone(jax.random.key(0), draw_shapes(10, seed=0)[0], NARROW, 32)


@pytest.fixture(scope="module")
def native_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "backbone.safetensors"
    save_backbone(path, make_backbone())
    return path


def test_corrupt_native_file_is_refused(tmp_path, refusal, native_file):
    content, path = native_file.read_bytes(), tmp_path / "x.safetensors"
    for at in np.random.default_rng(0).integers(0, len(content), 300):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        refusal(path)


def test_equal_backbones_make_equal_files(tmp_path, native_file):
    again = make_backbone()
    digest = save_backbone(tmp_path / "again.safetensors", again)
    assert digest == again.sha256 == sha256_of_file(native_file) == sha256_of_file(tmp_path / "again.safetensors")


def test_strided_views_are_written_correctly(tmp_path, native_file):
    backbone = load_backbone(native_file)
    turned = jax.tree.map(lambda leaf: np.asarray(leaf)[..., ::-1], backbone.variables)
    save_backbone(tmp_path / "turned.safetensors", backbone.replace(variables=turned))
    jax.tree.map(np.testing.assert_array_equal, load_backbone(tmp_path / "turned.safetensors").variables, turned)


def test_half_precision_applies_to_kernels_only(tmp_path, native_file):
    whole = load_backbone(native_file)
    save_backbone(tmp_path / "half.safetensors", whole, half=True)
    leaves = flatten_dict(load_backbone(tmp_path / "half.safetensors").variables)
    for path, leaf in flatten_dict(whole.variables).items():
        assert leaves[path].dtype == np.float32
        kernel = path[-1] == "kernel"
        np.testing.assert_allclose(leaves[path], leaf, rtol=2**-10 if kernel else 0, atol=1e-7 if kernel else 0)


CONFIG = {
    "stage_sizes": [1, 1], "width": 4, "stride_in_1x1": True, "conv_bias": True, "bn_epsilon": 1e-5, "pool_padding": 1
}  # fmt: skip
PIXELS = {"name": "torch", "channels": "rgb", "scale": 255.0, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}


@pytest.mark.parametrize(
    ("metadata", "part"),
    [
        ({"format": "backbone 7"}, "invalid metadata"),
        ({"sha256": None}, "invalid metadata"),
        ({"sha256": "0"}, "checksum mismatch"),
        ({"config": "{"}, "invalid metadata"),
        ({"config": CONFIG | {"depth": 50}}, "invalid metadata"),
        ({"config": CONFIG | {"width": -4}}, "invalid metadata"),
        ({"config": CONFIG | {"stage_sizes": 5}}, "invalid metadata"),
        ({"config": CONFIG | {"stage_sizes": []}}, "invalid metadata"),
        ({"config": CONFIG | {"bn_epsilon": "x"}}, "invalid metadata"),
        ({"config": CONFIG | {"pool_padding": 7}}, "invalid metadata"),
        ({"config": CONFIG | {"width": 10**12}}, ", expected ("),
        ({"config": CONFIG | {"conv_bias": False}}, "missing tensors: none; unexpected tensors: params/"),
        ({"config": CONFIG | {"stage_sizes": [1, 2]}}, "missing tensors: batch_stats/stage2_block2/bn1/mean"),
        ({"preprocessing": PIXELS | {"mean": [0.5]}}, "invalid metadata"),
        ({"preprocessing": PIXELS | {"std": [0.2, 0.2, 0]}}, "invalid metadata"),
        ({"preprocessing": PIXELS | {"scale": "x"}}, "invalid metadata"),
        ({"preprocessing": PIXELS | {"channels": "hsv"}}, "invalid metadata"),
        ({"image_size": "big"}, "invalid metadata"),
        ({"image_size": 1024000000}, "invalid metadata"),
    ],
)
def test_native_file_with_invalid_metadata_is_refused(tmp_path, refusal, native_file, metadata, part):
    path, key = tmp_path / "x.safetensors", safetensors_file.KEY
    with safetensors.safe_open(native_file, framework="numpy") as file:
        about = json.loads(file.metadata()[key]) | metadata
    kept = {name: value for name, value in about.items() if value is not None}
    safetensors.numpy.save_file(safetensors.numpy.load_file(native_file), path, {key: json.dumps(kept)})
    assert part in refusal(path)


def test_safetensors_file_of_another_network_is_refused(tmp_path, refusal):
    path = tmp_path / "bare.safetensors"
    safetensors.numpy.save_file({"params/stem_bn/scale": np.ones(4, np.float32)}, path, {"format": "pt"})
    assert "was not written by this project" in refusal(path)


def test_weights_of_any_image_size_train(tmp_path, capsys, native_file):
    """Images of 32 pixels cannot be repeated to 100, so they go through the weights' evaluation transform."""
    path = tmp_path / "x.safetensors"
    save_backbone(
        path, load_backbone(native_file).replace(image_size=100, transform=EvalTransform(235, 224, "bicubic"))
    )
    trained = try_to_train(capsys, tmp_path, path)
    assert trained.code == 0, trained
    resize = json.loads((tmp_path / "out" / "summary.json").read_text())["resize"]
    assert resize == {"method": "eval-transform", "side": 100, "shorter": 105, "interpolation": "bicubic"}


def test_failed_write_leaves_no_file(tmp_path, native_file):
    backbone = load_backbone(native_file)
    with full_disk(at=1000), pytest.raises(OSError, match="File too large"):
        save_backbone(tmp_path / "copy.safetensors", backbone)
    assert files_below(tmp_path) == []
