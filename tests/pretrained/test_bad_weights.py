"""Invalid weights are refused with a one-line error before anything is written."""

import json
import os
from pathlib import Path

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
    narrow_networks,
    write_keras_h5,
)

from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.files import sha256_of_file
from cifar_jax.pretrained import WeightsError, load_backbone, random_backbone, save_backbone
from cifar_jax.pretrained.formats import detect, safetensors_file
from cifar_jax.pretrained.formats.safetensors_file import read_backbone

KERNEL, SHORTCUT, VARIANCE = "conv2_block1_2_conv/kernel", "conv2_block1_0_conv/kernel", "conv1_bn/moving_variance"


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    narrow_networks(monkeypatch)


def refusal(path, variant=None):
    """Loads an invalid file and returns the error message, which is one line and names the file."""
    with pytest.raises(WeightsError) as caught:
        load_backbone(path, variant)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message, message
    return message


def test_generated_files_load(tmp_path):
    """The generated files are valid, so the tests below fail for the intended reasons only."""
    for family in ("keras", "keras-2016"):
        backbone = load_backbone(write_keras_h5(tmp_path / f"{family}.h5", keras_tensors(family=family)))
        assert backbone.variant == f"{family} (by its tensor names)"
        kernel = backbone.variables["params"]["stage1_block1"]["conv2"]["kernel"]
        name = {"keras": KERNEL, "keras-2016": "res2a_branch2b/kernel"}[family]
        np.testing.assert_array_equal(kernel, keras_tensors(family=family)[name])


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
        ("page.safetensors", b"<!DOCTYPE html><html></html>", "is not a valid safetensors file"),
    ],
)
def test_non_weights_files_are_refused(tmp_path, capsys, name, content, part):
    path = tmp_path / name
    path.write_bytes(content)
    is_one_error(try_to_train(capsys, tmp_path, path), 2, str(path), part)
    assert not (tmp_path / "out").exists()


def try_to_train(capsys, tmp_path, weights, *more):
    options = ["--train-examples", 64, "--test-examples", 10, "--out", tmp_path / "out"]
    return command(capsys, "train", "--preset", "demo", "--weights", weights, *options, *more)


def test_invalid_paths_are_refused(tmp_path, capsys):
    (tmp_path / "directory.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.h5")  # opening a pipe without a writer would block forever
    cases = [
        (tmp_path / "missing.h5", "does not exist"),
        (tmp_path / "missing.safetensors", "does not exist"),
        (tmp_path / "missing" / "weights", "does not exist"),
        ("~unknown-user/weights.h5", "does not exist"),
        (tmp_path / "directory.safetensors", "is a directory"),
        (tmp_path / "pipe.h5", "is not a regular file"),
        ("x" * 300, "No file or known weights named"),
        (tmp_path / ("x" * 300 + ".h5"), "cannot be read (File name too long)"),
        ("resnet50", "keras-resnet50, keras-resnet50-top, keras-resnet50-2016"),
    ]
    for path, part in cases:
        is_one_error(try_to_train(capsys, tmp_path, path), 2, str(path), part)
    assert files_below(tmp_path) == ["directory.safetensors", "pipe.h5"]


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = write_keras_h5(tmp_path / "weights.h5", keras_tensors())

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(detect, "open", refuse, raising=False)
    assert "cannot be read (Permission denied)" in refusal(path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_truncated_keras_file_is_refused(tmp_path, share):
    path = write_keras_h5(tmp_path / "weights.h5", keras_tensors())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "is corrupt or truncated" in refusal(path)


def test_truncated_native_file_is_refused(tmp_path, backbone_file):
    whole = backbone_file.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(whole[:size])
        assert "is not a valid safetensors file" in refusal(cut)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that do not match the network


def without(tensors, *names):
    return {name: value for name, value in tensors.items() if name not in names}


def filled(tensors, name, value):
    changed = tensors[name].copy()
    changed.flat[0] = value
    return tensors | {name: changed}


def merge_cases():
    tensors = keras_tensors()
    layer = [name for name in tensors if name.startswith("conv3_block1_2_conv/")]
    extra = {"conv3_block1_9_conv/kernel": tensors[KERNEL]}
    return {
        "wrong shape": (
            tensors | {KERNEL: tensors[KERNEL][:, :, :2]},
            [f"{KERNEL} has shape (3, 3, 2, 4), expected (3, 3, 4, 4)", "does not match the network"],
        ),
        "a transposed kernel": (
            tensors | {SHORTCUT: tensors[SHORTCUT].transpose(0, 1, 3, 2)},
            [f"{SHORTCUT} has shape (1, 1, 16, 4), expected (4, 16)"],
        ),
        "a missing layer": (
            without(tensors, *layer),
            [f"missing tensors: {', '.join(sorted(layer))}; unexpected tensors: none"],
        ),
        "an extra layer": (tensors | extra, [f"missing tensors: none; unexpected tensors: {next(iter(extra))}"]),
        "a renamed layer": (
            without(tensors, KERNEL) | extra,
            [f"missing tensors: {KERNEL}; unexpected tensors: {next(iter(extra))}"],
        ),
        "not a number": (filled(tensors, KERNEL, np.nan), ["non-finite", KERNEL]),
        "infinite": (filled(tensors, VARIANCE, np.inf), ["non-finite", VARIANCE]),
        "negative variance": (filled(tensors, VARIANCE, -1e-9), ["negative variances", VARIANCE]),
    }


@pytest.mark.parametrize("case", merge_cases())
def test_mismatched_tensors_are_refused(tmp_path, case):
    tensors, parts = merge_cases()[case]
    message = refusal(write_keras_h5(tmp_path / "weights.h5", tensors))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("layers", "part"),
    [
        (["block1_conv1", "block5_conv3"], "is not a Keras ResNet: its layers are named block1_conv1"),
        (["conv1_conv", "conv2_block1_0_conv"], "is not a Keras ResNet"),
        (["conv1_conv", "conv1_bn", "conv2_block1_1_conv", "conv2_block2_1_conv"], "holds a ResNet with (2,) blocks"),
        (["stem", "conv2_block1_preact_bn", "conv2_block1_1_conv"], "is not a Keras ResNet"),
    ],
)
def test_other_keras_networks_are_refused(tmp_path, layers, part):
    tensors = {f"{layer}/kernel": np.zeros((1, 1, 2, 2), np.float32) for layer in layers}
    assert part in refusal(write_keras_h5(tmp_path / "weights.h5", tensors))


@pytest.mark.parametrize(("blocks", "name"), [(23, "ResNet101"), (7, None)])
def test_depth_is_detected_from_layer_names(tmp_path, monkeypatch, blocks, name):
    monkeypatch.undo()  # the real sizes
    sizes = {2: 3, 3: 4, 4: blocks, 5: 3}
    layers = ["conv1_conv", *(f"conv{s}_block{b + 1}_1_conv" for s, count in sizes.items() for b in range(count))]
    tensors = {f"{layer}/kernel": np.zeros((1, 1, 1, 1), np.float32) for layer in layers}
    message = refusal(write_keras_h5(tmp_path / "weights.h5", tensors))
    if name:
        assert "missing tensors: conv1_bn/beta" in message
    else:
        assert "(3, 4, 7, 3) blocks; supported are (3, 4, 6, 3) (ResNet50), (3, 4, 23, 3) (ResNet101)" in message


# ---------------------------------------------------------------------------------------------------------------------
# HDF5 files without Keras's layout, or with data outside the file


def move_to_other_file(path):
    """Moves a tensor of the file into another file; returns its name in both."""
    name, other = f"{KERNEL.partition('/')[0]}/{KERNEL}:0", path.with_name("other.h5")
    with h5py.File(path, "a") as file, h5py.File(other, "w") as elsewhere:
        elsewhere[name] = file[name][()]
        del file[name]
    return name, other


def with_external_link(path):
    name, other = move_to_other_file(path)
    with h5py.File(path, "a") as file:
        file[name] = h5py.ExternalLink(other, name)


def with_external_group(path):
    _, other = move_to_other_file(path)
    layer = KERNEL.partition("/")[0]
    with h5py.File(path, "a") as file, h5py.File(other, "a") as elsewhere:
        elsewhere[layer].attrs["weight_names"] = encoded([f"{KERNEL}:0"])
        del file[layer]
        file[layer] = h5py.ExternalLink(other, layer)


def with_soft_link(path):
    name, _ = move_to_other_file(path)
    with h5py.File(path, "a") as file:
        file[name] = h5py.SoftLink("/conv3_block1_2_conv/conv3_block1_2_conv/kernel:0")


def with_external_storage(path):
    name, _ = move_to_other_file(path)
    raw = path.with_name("raw")
    raw.write_bytes(bytes(3 * 3 * 4 * 4 * 4))
    with h5py.File(path, "a") as file:
        file.create_dataset(name, (3, 3, 4, 4), "f4", external=[(str(raw), 0, h5py.h5f.UNLIMITED)])


def with_virtual_data(path):
    name, other = move_to_other_file(path)
    layout = h5py.VirtualLayout((3, 3, 4, 4), "f4")
    layout[...] = h5py.VirtualSource(str(other), name, shape=(3, 3, 4, 4))
    with h5py.File(path, "a") as file:
        file.create_virtual_dataset(name, layout)


def with_huge_dataset(path):
    name, _ = move_to_other_file(path)
    with h5py.File(path, "a") as file:
        file.create_dataset(name, (10**6, 10**6), "f4", chunks=(1000, 1000))


def with_many_hard_links(path):
    """A file of one megabyte that would need fifty when read."""
    with h5py.File(path, "a") as file:
        group = file["conv1_conv"]
        group["one"] = np.zeros(250_000, np.float32)
        names = [f"conv1_conv/more{number}" for number in range(50)]
        for name in names:
            group[f"{name}:0"] = group["one"]
        group.attrs["weight_names"] = np.append(group.attrs["weight_names"], encoded(f"{name}:0" for name in names))


def with_integers(path):
    name, _ = move_to_other_file(path)
    with h5py.File(path, "a") as file:
        file[name] = np.zeros((3, 3, 4, 4), np.int32)


def with_group_instead_of_tensor(path):
    name, _ = move_to_other_file(path)
    with h5py.File(path, "a") as file:
        file.create_group(name)


def with_missing_tensor(path):
    move_to_other_file(path)


def with_missing_layer(path):
    with h5py.File(path, "a") as file:
        del file["conv1_conv"]


def with_duplicate_layer_name(path):
    with h5py.File(path, "a") as file:
        file.attrs["layer_names"] = np.append(file.attrs["layer_names"], b"conv1_conv")


def without_layer_names(path):
    with h5py.File(path, "a") as file:
        del file.attrs["layer_names"]


def as_keras_3_saves_weights(path):
    with h5py.File(path, "w") as file:
        file.create_group("layers/conv2d/vars")["0"] = np.zeros((7, 7, 3, 4), np.float32)


def with_invalid_layer_names(path):
    with h5py.File(path, "a") as file:
        file.attrs["layer_names"] = 3


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (with_external_link, "does not itself contain"),
        (with_external_group, "does not itself contain"),
        (with_soft_link, "does not itself contain"),
        (with_external_storage, "in another file"),
        (with_virtual_data, "in another file"),
        (with_huge_dataset, "claims more data than a file of its size can hold"),
        (with_many_hard_links, "claims more data than a file of its size can hold"),
        (with_integers, "not an array of floating-point numbers"),
        (with_group_instead_of_tensor, "not an array of floating-point numbers"),
        (with_missing_tensor, "does not itself contain"),
        (with_missing_layer, "does not itself contain /conv1_conv."),
        (with_duplicate_layer_name, "holds conv1_conv/bias twice"),
        (without_layer_names, "not a Keras file: it has no layer_names"),
        (as_keras_3_saves_weights, "written by Keras 3's save_weights"),
        (with_invalid_layer_names, "is corrupt or truncated"),
    ],
)
def test_malformed_hdf5_files_are_refused(tmp_path, change, part):
    path = write_keras_h5(tmp_path / "weights.h5", keras_tensors())
    change(path)
    assert part in refusal(path)


@pytest.mark.parametrize(
    "description",
    [
        "[]",
        '{"config": 3}',
        '{"config": {"layers": [3]}}',
        '{"config": {"layers": [{"class_name": "Conv2D", "config": {}}]}}',
        '{"config": {"layers": []}}',
        "{",
        '{"config": {"layers": [{"class_name": "Conv2D", "config": {"use_bias": true, "kernel_size": [1, 1], '
        '"strides": [1, 1]}}, {"class_name": "BatchNormalization", "config": {"epsilon": "small"}}]}}',
    ],
)
def test_invalid_model_configs_are_refused(tmp_path, description):
    path = write_keras_h5(tmp_path / "weights.h5", keras_tensors(), model_config=description)
    assert "model config" in refusal(path) or "corrupt" in refusal(path)


# ---------------------------------------------------------------------------------------------------------------------
# Variants


@pytest.mark.parametrize(
    ("family", "variant", "parts"),
    [
        ("keras", "resnet", ["There is no --variant 'resnet'.", "keras, keras-2016, keras-2016-unpadded"]),
        ("keras", "torchvision", ["--variant torchvision does not fit", "have keras names"]),
        ("keras", "keras-2016", ["--variant keras-2016 does not fit", "have keras names"]),
        ("keras-2016", "keras", ["--variant keras does not fit", "have keras-2016 names"]),
    ],
)
def test_wrong_variant_is_refused(tmp_path, capsys, family, variant, parts):
    path = write_keras_h5(tmp_path / "weights.h5", keras_tensors(family=family))
    is_one_error(try_to_train(capsys, tmp_path, path, "--variant", variant), 2, *parts)


def test_variant_is_refused_for_untrained_weights(tmp_path, capsys):
    for name in ("random", "random-w16"):
        result = try_to_train(capsys, tmp_path, name, "--variant", "keras")
        is_one_error(result, 2, "--variant keras is for pretrained weights", name)


def test_variant_is_refused_for_native_file(tmp_path, capsys, backbone_file):
    result = try_to_train(capsys, tmp_path, backbone_file, "--variant", "keras")
    is_one_error(result, 2, f"--variant keras does not apply to {backbone_file}")


# ---------------------------------------------------------------------------------------------------------------------
# Backbones in the project's own format


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    save_backbone(path, random_backbone(jax_key(), draw_shapes(10, seed=0)[0], NARROW, 32))
    return path


def jax_key():
    return jax.random.key(0)


def rewritten(backbone_file: Path, path: Path, metadata=None, **tensors) -> Path:
    """Copies a file with some metadata or tensors replaced, or removed if the new value is None."""
    with safetensors.safe_open(backbone_file, framework="numpy") as file:
        old = json.loads(file.metadata()[safetensors_file.KEY])
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    kept = {name: value for name, value in (kept | tensors).items() if value is not None}
    new = {name: value for name, value in (old | (metadata or {})).items() if value is not None}
    safetensors.numpy.save_file(kept, path, {safetensors_file.KEY: json.dumps(new)})
    return path


def test_corrupt_native_file_is_refused(tmp_path, backbone_file):
    content, path = backbone_file.read_bytes(), tmp_path / "x.safetensors"
    for at in np.random.default_rng(0).integers(0, len(content), 300):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        refusal(path)


def test_equal_backbones_make_equal_files(tmp_path, backbone_file):
    again = random_backbone(jax_key(), draw_shapes(10, seed=0)[0], NARROW, 32)
    digest = save_backbone(tmp_path / "again.safetensors", again)
    assert digest == again.sha256 == sha256_of_file(backbone_file) == sha256_of_file(tmp_path / "again.safetensors")


def test_strided_views_are_written_correctly(tmp_path, backbone_file):
    backbone = read_backbone(backbone_file)
    turned = jax.tree.map(lambda leaf: np.asarray(leaf)[..., ::-1], backbone.variables)
    save_backbone(tmp_path / "turned.safetensors", backbone.replace(variables=turned))
    jax.tree.map(np.testing.assert_array_equal, read_backbone(tmp_path / "turned.safetensors").variables, turned)


def test_half_precision_applies_to_kernels_only(tmp_path, backbone_file):
    whole = read_backbone(backbone_file)
    save_backbone(tmp_path / "half.safetensors", whole, half=True)
    leaves = flatten_dict(read_backbone(tmp_path / "half.safetensors").variables)
    for path, leaf in flatten_dict(whole.variables).items():
        assert leaves[path].dtype == np.float32
        kernel = path[-1] == "kernel"
        np.testing.assert_allclose(leaves[path], leaf, rtol=2**-10 if kernel else 0, atol=1e-7 if kernel else 0)


CONFIG = {
    "stage_sizes": [1, 1], "width": 4, "stride_in_1x1": True, "conv_bias": True, "bn_epsilon": 1e-5, "pool_padding": 1
}  # fmt: skip
PIXELS = {"name": "torch", "channels": "rgb", "scale": 255.0, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}


def test_rewritten_file_loads(tmp_path, backbone_file):
    assert read_backbone(rewritten(backbone_file, tmp_path / "x.safetensors")).config.width == 4
    bare = tmp_path / "bare.safetensors"
    safetensors.numpy.save_file({"params/stem_bn/scale": np.ones(4, np.float32)}, bare, {"format": "pt"})
    assert "was not written by this project" in refusal(bare)


@pytest.mark.parametrize(
    ("metadata", "part"),
    [
        ({"format": "backbone 7"}, "invalid metadata"),
        ({"format": None}, "invalid metadata"),
        ({"sha256": None}, "invalid metadata"),
        ({"sha256": "0"}, "checksum mismatch"),
        ({"config": None}, "invalid metadata"),
        ({"config": "{"}, "invalid metadata"),
        ({"config": "[1]"}, "invalid metadata"),
        ({"config": CONFIG | {"depth": 50}}, "invalid metadata"),
        ({"config": CONFIG | {"width": -4}}, "invalid metadata"),
        ({"config": CONFIG | {"width": "4"}}, "invalid metadata"),
        ({"config": CONFIG | {"stage_sizes": 5}}, "invalid metadata"),
        ({"config": CONFIG | {"stage_sizes": []}}, "invalid metadata"),
        ({"config": CONFIG | {"bn_epsilon": "x"}}, "invalid metadata"),
        ({"config": CONFIG | {"pool_padding": 7}}, "invalid metadata"),
        ({"config": CONFIG | {"width": 8}}, ", expected ("),
        ({"config": CONFIG | {"width": 10**12}}, ", expected ("),
        ({"config": CONFIG | {"conv_bias": False}}, "missing tensors: none; unexpected tensors: params/"),
        ({"config": CONFIG | {"stage_sizes": [1, 2]}}, "missing tensors: batch_stats/stage2_block2/bn1/mean"),
        ({"preprocessing": PIXELS | {"mean": [0.5]}}, "invalid metadata"),
        ({"preprocessing": PIXELS | {"std": [0.2, 0.2, 0]}}, "invalid metadata"),
        ({"preprocessing": PIXELS | {"scale": "x"}}, "invalid metadata"),
        ({"preprocessing": PIXELS | {"channels": "hsv"}}, "invalid metadata"),
        ({"image_size": "big"}, "invalid metadata"),
        ({"image_size": -32}, "invalid metadata"),
        ({"image_size": 1024000000}, "invalid metadata"),
    ],
)
def test_native_file_with_invalid_metadata_is_refused(tmp_path, backbone_file, metadata, part):
    assert part in refusal(rewritten(backbone_file, tmp_path / "x.safetensors", metadata))


def test_incompatible_image_size_is_refused(tmp_path, capsys, backbone_file):
    path = tmp_path / "x.safetensors"
    save_backbone(path, read_backbone(backbone_file).replace(image_size=100))
    is_one_error(try_to_train(capsys, tmp_path, path), 2, "100 pixels a side", "--image-size")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tensors", "part"),
    [
        ({"params/stem_bn/scale": None}, "missing tensors: params/stem_bn/scale"),
        ({"params/stem_bn/scales": np.ones(4, np.float32)}, "unexpected tensors: params/stem_bn/scales"),
        ({"params/stem_bn/scale": np.full(4, np.nan, np.float32)}, "non-finite"),
        ({"batch_stats/stem_bn/var": np.full(4, -1, np.float32)}, "negative variances"),
        ({"params/stem_bn/scale": np.ones(5, np.float32)}, "params/stem_bn/scale has shape (5,), expected (4,)"),
    ],
)
def test_native_file_with_mismatched_tensors_is_refused(tmp_path, backbone_file, tensors, part):
    assert part in refusal(rewritten(backbone_file, tmp_path / "x.safetensors", **tensors))


def test_failed_write_leaves_no_file(tmp_path, backbone_file):
    backbone = read_backbone(backbone_file)
    with full_disk(at=1000), pytest.raises(OSError, match="File too large"):
        save_backbone(tmp_path / "copy.safetensors", backbone)
    assert files_below(tmp_path) == []
