"""Tests of the features command, and of the traces of --profile."""

import json

import jax
import numpy as np
import pytest
from helpers import NARROW, TINY, command, files_below, full_disk, is_one_error, is_refused, without_pictures
from PIL import Image

from cifar_jax.data import load_splits
from cifar_jax.data.sources.images import read_image
from cifar_jax.features.extractor import make_extractor
from cifar_jax.pretrained import load_backbone, random_backbone, save_backbone
from cifar_jax.runtime.profiling import profiled

SHAPES = ("shapes", "--train-examples", "20", "--test-examples", "10")


@pytest.fixture(scope="module")
def weights(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("weights") / "narrow.safetensors"
    save_backbone(path, random_backbone(jax.random.key(0), shapes.images[:64], NARROW, 32))
    return path


@pytest.fixture
def pictures(tmp_path):
    rng, paths = np.random.default_rng(0), []
    for number in range(3):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(paths[-1])
    return paths


def features(capsys, out, *arguments):
    return command(capsys, "features", *arguments, "--out", out)


def read(path):
    with np.load(path) as file:  # fails on pickled arrays
        return {name: file[name] for name in file.files}


def test_features_of_a_data_set(tmp_path, capsys, weights):
    out = tmp_path / "features.npz"
    result = features(capsys, out, *SHAPES, "--weights", weights, "--json")
    assert result.code == 0 and result.err == ""
    splits, backbone = load_splits("shapes", train_examples=20, test_examples=10), load_backbone(weights)
    arrays, extractor = read(out), make_extractor(backbone)
    for split in ("train", "test"):
        images, labels = getattr(splits, split)
        np.testing.assert_array_equal(arrays.pop(f"{split}_features"), extractor(images), strict=True)
        np.testing.assert_array_equal(arrays.pop(f"{split}_labels"), labels, strict=True)
    assert tuple(arrays.pop("class_names")) == splits.class_names
    assert json.loads(str(arrays.pop("preprocessing")))["mean"] == list(backbone.preprocessing.mean)
    assert {name: array.item() for name, array in arrays.items()} == {
        "backbone_sha256": backbone.sha256,
        "backbone_source": str(weights),
        "image_size": 32,
        "precision": "float32",
    }
    assert json.loads(result.out)["train_features"] == f"20 x {NARROW.features} float32"


def test_features_cached_by_training_are_reused(tmp_path, capsys, monkeypatch, weights):
    without_pictures(monkeypatch)
    data = ["--weights", weights, "--train-examples", "64", "--test-examples", "10", "--cache-dir", tmp_path / "cache"]
    train = ["--preset", "demo", *data, "--epochs", "1", "--hidden", "4", "--out", tmp_path / "run"]
    assert command(capsys, "train", *train).code == 0
    result = features(capsys, tmp_path / "features.npz", "shapes", *data)
    assert result.code == 0 and result.err.count("The features come from the cache") == 2
    assert f"64 x {NARROW.features} float32" in result.out


@pytest.mark.parametrize(
    ("options", "side", "size", "precision"),
    [
        (["--image-size", "64"], 32, 64, "float32"),
        (["--image-size", "64", "--direct"], 64, 64, "float32"),
        (["--precision", "bfloat16"], 32, 32, "bfloat16"),
    ],
)
def test_features_of_image_files(tmp_path, capsys, weights, pictures, options, side, size, precision):
    for suffix in (".npz", ".npy"):
        result = features(capsys, tmp_path / f"of{suffix}", *pictures, "--weights", weights, *options)
        assert result.code == 0 and result.err == "", result
    arrays = read(tmp_path / "of.npz")
    images = np.stack([read_image(path, side) for path in pictures])
    expected = make_extractor(load_backbone(weights), size, precision, num_images=len(images))(images)
    np.testing.assert_array_equal(arrays["features"], expected, strict=True)
    np.testing.assert_array_equal(np.load(tmp_path / "of.npy"), expected, strict=True)
    assert list(arrays["paths"]) == list(map(str, pictures)) and arrays["image_size"] == size


def test_an_untrained_network_can_be_asked_for(tmp_path, capsys, narrow):
    result = features(capsys, tmp_path / "of.npz", *SHAPES, "--weights", "random-w16", "--image-size", "32")
    assert result.code == 0 and "UNTRAINED" in result.err
    assert read(tmp_path / "of.npz")["train_features"].std(0).max() > 1e-3


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("", ["features needs a data set or images"]),
        ("shapes --out of.txt", ["--out must end in .npz or .npy, got of.txt."]),
        ("shapes --out of.npy", ["--out must end in .npz for a data set"]),
        ("shapes --out nowhere/of.npz", ["nowhere/of.npz is in a directory that does not exist"]),
        ("shapes --out there.npz", ["already exists", "--overwrite"]),
        ("shapes --direct", ["--direct applies to image files"]),
        ("shapes --image-size 33", ["--image-size must be a multiple of 32"]),
        ("shapes --train-examples 0", ["--train-examples must be at least 1, got 0."]),
        ("shapes --precision float16", ["--precision", "float16"]),
        ("nothing.png", ["nothing.png does not exist"]),
        ("broken.png", ["broken.png is not a readable image"]),
        ("picture.png --weights random", ["--weights random needs a data set to calibrate on"]),
        ("picture.png --weights nothing.h5", ["nothing.h5"]),
        ("shapes --profile there.npz/trace", ["--profile there.npz/trace cannot be created"]),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, capsys, monkeypatch, weights, pictures, typed, parts):
    monkeypatch.chdir(tmp_path)
    pictures[0].rename("picture.png")
    for name in ("there.npz", "broken.png"):
        (tmp_path / name).write_text("notes")
    arguments = typed.split()
    arguments += ["--weights", str(weights)] if "--weights" not in arguments else []
    arguments += ["--out", "of.npz"] if "--out" not in arguments else []
    before = files_below(tmp_path)
    is_refused(command(capsys, "features", *arguments), *parts)
    assert files_below(tmp_path) == before and (tmp_path / "there.npz").read_text() == "notes"


def test_full_disk_leaves_no_file(tmp_path, capsys, weights, pictures):
    before = files_below(tmp_path)
    with full_disk(at=100):
        result = features(capsys, tmp_path / "of.npz", *pictures, "--weights", weights)
    is_one_error(result, 1, "of.npz cannot be written", "free disk space")
    assert files_below(tmp_path) == before


def test_overwrite_replaces_an_existing_file(tmp_path, capsys, weights, pictures):
    (tmp_path / "of.npz").write_text("notes")
    assert features(capsys, tmp_path / "of.npz", *pictures, "--weights", weights, "--overwrite").code == 0
    assert len(read(tmp_path / "of.npz")["features"]) == 3


def traces(directory):
    return [path for path in directory.rglob("*.xplane.pb") if path.stat().st_size > 1000]


def test_profile_writes_a_trace(tmp_path, capsys, weights, pictures):
    trace = tmp_path / "trace"
    result = features(capsys, tmp_path / "of.npz", *pictures, "--weights", weights, "--profile", trace)
    assert result.code == 0 and len(traces(trace)) == 1
    assert result.err.startswith(f"Profiler trace written to {trace}")
    assert b"jit_" in traces(trace)[0].read_bytes()  # contains the compiled functions


@pytest.mark.slow
def test_profile_of_training(tmp_path, capsys, narrow):
    trace = tmp_path / "trace"
    result = command(capsys, "train", *TINY, "--epochs", "1", "--out", tmp_path / "run", "--profile", trace)
    assert result.code == 0 and f"Profiler trace written to {trace}" in result.err and len(traces(trace)) == 1


def test_traces_within_one_second_are_each_logged(tmp_path, caplog):
    for _ in range(3):  # at least two of three end within the same second
        with caplog.at_level("INFO"), profiled(str(tmp_path)):
            pass
    assert caplog.text.count("Profiler trace written to") == 3
