"""`verify-weights`: reports and exit codes for intact files and for files with a single problem."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from helpers import NARROW_TORCH, command, is_refused, keras_tensors, torch_tensors, write_keras_h5
from torch_files import write_torch

from cifar_jax import UserError, load_backbone, save_backbone
from cifar_jax.files import sha256_of_file
from cifar_jax.pretrained import reference_libraries, registry
from cifar_jax.pretrained.verify import verify

pytestmark = pytest.mark.usefixtures("narrow_resnet")


def keras_file(path, change=lambda tensors: None):
    tensors = keras_tensors() | {"probs/kernel": np.ones((32, 5), np.float32), "probs/bias": np.ones(5, np.float32)}
    change(tensors)
    return write_keras_h5(path / "weights.h5", tensors)


def torch_file(path, change=lambda tensors: None):
    tensors = torch_tensors(NARROW_TORCH)
    change(tensors)
    return write_torch(path / "weights.pth", tensors)


def our_file(path):
    save_backbone(path / "ours.safetensors", load_backbone(torch_file(path)))
    return path / "ours.safetensors"


@pytest.mark.parametrize("make", [keras_file, torch_file, our_file])
def test_intact_file_has_no_problems(tmp_path, make):
    path = make(tmp_path)
    found = verify(path)
    assert found.problems == [] and {row.fate for row in found.tensors} == {"used", "ignored"}
    filled = [row.role for row in found.tensors if row.fate == "used"]
    assert sorted(filled) == sorted("/".join(path) for path in flatten_dict(load_backbone(path).variables))
    assert found.about["sha256"] == sha256_of_file(path) and found.about["registry"] == "not in it"
    assert found.fingerprint["std"] > 0 and len(found.fingerprint["first"]) == 6


def test_rows_describe_each_tensor(tmp_path):
    rows = {row.name: row for row in verify(torch_file(tmp_path)).tensors}
    kernel = torch_tensors(NARROW_TORCH)["layer2.0.conv2.weight"]
    row = rows["layer2.0.conv2.weight"]
    assert (row.shape, row.fate, row.role) == (kernel.shape, "used", "params/stage2_block1/conv2/kernel")
    assert np.allclose([row.mean, row.std, row.low, row.high], [f(kernel) for f in (np.mean, np.std, np.min, np.max)])
    assert (rows["fc.weight"].fate, rows["fc.weight"].role) == ("ignored", "the classifier")
    assert rows["bn1.num_batches_tracked"].role == "number of training steps"


def test_about_describes_the_variant(tmp_path):
    about = verify(keras_file(tmp_path)).about
    assert about["variant"] == "keras (by its tensor names)" and about["BatchNorm epsilon"] == "1.001e-05"
    assert about["stride"].startswith("in the first 1x1") and about["conv bias"] == "yes"
    assert about["preprocessing"].startswith("caffe: BGR / 1, minus 103.939 116.779 123.68")
    assert about["classifier"] == "5 classes, kept and not used" and about["assumed"] == "nothing"
    assert about["photos"] == "shorter side to 256 (bilinear), centre crop of 224"
    about = verify(torch_file(tmp_path)).about
    assert about["stride"].startswith("in the 3x3") and "3x3 convolutions and ImageNet's mean" in about["assumed"]


def set_value(name, value):
    def change(tensors):
        tensors[name] = np.array(tensors[name])
        tensors[name].flat[0] = value

    return change


def fill(name, value):
    return lambda tensors: tensors.update({name: np.full_like(tensors[name], value)})


def crop_kernel(tensors):
    tensors["conv1.weight"] = tensors["conv1.weight"][:, :, :5, :5].copy()


@pytest.mark.parametrize(
    ("change", "name", "problem"),
    [
        (set_value("layer1.0.conv1.weight", np.nan), "layer1.0.conv1.weight", "non-finite values"),
        (set_value("fc.weight", np.inf), "fc.weight", "non-finite values"),
        (set_value("layer1.0.bn1.running_var", -1.0), "layer1.0.bn1.running_var", "negative variances"),
        (fill("layer1.0.bn1.running_var", 0), "layer1.0.bn1.running_var", "all zeros"),
        (fill("layer2.0.conv3.weight", 0), "layer2.0.conv3.weight", "all zeros"),
        (fill("layer2.0.conv3.weight", 3), "layer2.0.conv3.weight", "all values equal"),
        (crop_kernel, "conv1.weight", "shape (4, 3, 5, 5), expected (4, 3, 7, 7)"),
        (lambda tensors: tensors.pop("bn1.bias"), "bn1.bias", "missing"),
        (lambda tensors: tensors.update(more=np.ones(3, np.float32)), "more", "unexpected tensor"),
    ],
)
def test_problem_is_reported_with_its_tensor(tmp_path, change, name, problem):
    found = verify(torch_file(tmp_path, change))
    assert {row.name: row.problem for row in found.tensors if row.problem} == {name: problem}
    assert found.problems == [f"{name}: {problem}."]


def test_zero_bias_is_no_problem(tmp_path):
    assert verify(torch_file(tmp_path, fill("bn1.bias", 0))).problems == []


def test_dead_network_is_reported(tmp_path):
    """Each tensor looks fine on its own, but all features are equal."""
    found = verify(torch_file(tmp_path, fill("layer2.0.bn3.bias", -1e6)))
    assert found.problems == ["The network is dead: all synthetic images have the same features."]


def test_modified_copy_of_known_file_is_reported(tmp_path):
    path = keras_file(tmp_path)
    entry = replace(registry.entries()["keras-resnet50"], size=path.stat().st_size)
    (problem,) = verify(path, known={entry.name: entry}).problems
    assert f"{path} has the size of {entry.name} but not its checksum {entry.digest}" in problem
    entry = replace(entry, digest=f"sha256:{sha256_of_file(path)}", variant="keras")
    found = verify(path, known={entry.name: entry})
    assert found.problems == [] and found.about["registry"] == f"{entry.name} ({entry.digest}), MIT"
    assert found.about["variant"] == "keras (by its hash)"


def test_modified_native_file_is_reported(tmp_path):
    path = our_file(tmp_path)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    tensors["params/stem_bn/scale"][0] += 1
    safetensors.numpy.save_file(tensors, path, metadata)
    (problem,) = verify(path).problems
    assert problem == f"{path} is corrupt (checksum mismatch). Get a fresh copy of the file."


def test_shipped_backbone_has_no_problems(capsys):
    result = command(capsys, "verify-weights", "demo", "--json")
    about = json.loads(result.out)
    assert result.code == 0 and about["holds"] and about["problems"] == []
    assert about["about"]["photos"] == "shorter side to 73 (bilinear), centre crop of 64"
    assert about["about"]["registry"].startswith("demo (sha256:")
    assert {row["fate"] for row in about["tensors"]} == {"used"} and len(about["tensors"]) == 265
    # Measured when the file was exported; changes only with the network's code or the file.
    assert about["fingerprint"]["norm"] == pytest.approx(47.316932, rel=1e-4)
    assert about["fingerprint"]["first"][:2] == pytest.approx([0.31727821, 2.46355486], rel=1e-4)


def test_json_has_no_nan(tmp_path, capsys):
    path = torch_file(tmp_path, set_value("layer1.0.conv1.weight", np.nan))
    result = command(capsys, "verify-weights", path, "--json")
    about = json.loads(result.out, parse_constant=lambda name: pytest.fail(name))
    assert result.code == 1 and not about["holds"] and about["fingerprint"] == {}


def test_human_readable_table(tmp_path, capsys):
    result = command(capsys, "verify-weights", keras_file(tmp_path))
    assert result.code == 0 and result.out.splitlines()[-1] == "verdict  no problems"
    assert "probs/kernel\t32x5\tignored\tthe classifier\t1\t0\t1\t1" in result.out.splitlines()
    result = command(capsys, "verify-weights", torch_file(tmp_path, lambda tensors: tensors.pop("bn1.bias")))
    assert result.code == 1 and "Traceback" not in result.err
    assert result.out.splitlines()[-2:] == ["verdict  1 problems", "  bn1.bias: missing."]


@pytest.mark.parametrize("arguments", [["nowhere.h5"], ["random"], ["demo", "--against", "caffe"], []])
def test_invalid_arguments_are_refused(capsys, arguments):
    is_refused(command(capsys, "verify-weights", *arguments))


# ---------------------------------------------------------------------------------------------------------------------
# Against a reference library; tests/parity runs the real ones


def test_difference_from_reference_is_reported(tmp_path):
    path = torch_file(tmp_path)

    def fake_library(parsed, backbone, images):
        ours = reference_libraries.our_outputs(backbone, images)
        return ours | {"stage2": ours["stage2"] * np.float32(1.001), "logits": np.zeros(3)}

    found = verify(path, against="timm", runners={"timm": fake_library})
    assert found.differences["stage1"] == found.differences["pooled"] == 0
    assert found.differences["stage2"] == pytest.approx(1e-3, rel=0.01) and found.differences["logits"] == np.inf
    assert found.problems == [
        "stage2 differs from that of timm by 0.001, more than 1e-05.",
        "logits differs from that of timm by inf, more than 1e-05.",
    ]


def test_missing_reference_library_is_reported(tmp_path, monkeypatch):
    for name in ("torch", "keras"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    for make, library, needs in ((torch_file, "torchvision", "torch and torchvision"), (keras_file, "keras", "keras")):
        with pytest.raises(UserError, match=f"--against needs {needs}, which cannot be imported"):
            verify(make(tmp_path), against=library)


def test_network_unknown_to_the_reference_library_is_refused(tmp_path):
    """The check comes before the import, so it works even if the library is not installed."""
    of_2016 = write_keras_h5(tmp_path / "2016.h5", keras_tensors(family="keras-2016"))
    for path, library in (
        (of_2016, "keras"),
        (keras_file(tmp_path), "timm"),
        (torch_file(tmp_path), "keras"),
    ):
        with pytest.raises(UserError, match=f"{library} has no network that matches {path}"):
            verify(path, against=library)
