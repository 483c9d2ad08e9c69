"""Tests of the features command, and of the traces of --profile."""

import io
import json
import os
import shutil
import sys

import jax
import numpy as np
import pytest
from helpers import NARROW, TINY, command, files_below, full_disk, is_one_error, is_refused, without_pictures
from photos import CLASSES, draw_folder
from PIL import Image

from cifar_jax.data import load_splits
from cifar_jax.data.resize import Resize
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
        "resize": '{"method": "upsample", "side": 32}',
        "image_size": 32,
        "precision": "float32",
    }
    about = json.loads(result.out)
    assert about["train_features"] == f"20 x {NARROW.features} float32"
    assert about["source"] == "data set shapes, 10 classes" and about["resize"] == "as they are"


def test_features_cached_by_training_are_reused(tmp_path, capsys, monkeypatch, weights):
    without_pictures(monkeypatch)
    data = ["--weights", weights, "--train-examples", "64", "--test-examples", "10", "--cache-dir", tmp_path / "cache"]
    train = ["--preset", "demo", *data, "--epochs", "1", "--hidden", "4", "--out", tmp_path / "run"]
    assert command(capsys, "train", *train).code == 0
    result = features(capsys, tmp_path / "features.npz", "shapes", *data)
    assert result.code == 0 and result.err.count("The features come from the cache") == 2
    assert f"64 x {NARROW.features} float32" in result.out


@pytest.mark.parametrize(
    ("options", "resize", "precision"),
    [
        ([], Resize("eval-transform", 32, 37, "bilinear"), "float32"),
        (["--image-size", "64", "--interpolation", "bicubic"], Resize("eval-transform", 64, 73, "bicubic"), "float32"),
        (["--precision", "bfloat16"], Resize("eval-transform", 32, 37, "bilinear"), "bfloat16"),
    ],
)
def test_features_of_image_files(tmp_path, capsys, weights, pictures, options, resize, precision):
    for suffix in (".npz", ".npy"):
        result = features(capsys, tmp_path / f"of{suffix}", *pictures, "--weights", weights, *options, "--json")
        assert result.code == 0, result
        about = json.loads(result.out)
        assert about["source"] == "3 image files" and about["resize"] == resize.words(resize.side)
    arrays = read(tmp_path / "of.npz")
    images = np.stack([read_image(path, resize) for path in pictures])
    expected = make_extractor(load_backbone(weights), resize.side, precision, num_images=len(images))(images)
    np.testing.assert_array_equal(arrays["features"], expected, strict=True)
    np.testing.assert_array_equal(np.load(tmp_path / "of.npy"), expected, strict=True)
    assert list(arrays["paths"]) == list(map(str, pictures)) and arrays["image_size"] == resize.side
    assert Resize.from_json(json.loads(str(arrays["resize"]))) == resize


def test_small_squares_of_one_size_are_upsampled_as_in_training(tmp_path, capsys, weights):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "small.png")
    assert features(capsys, tmp_path / "of.npy", tmp_path / "small.png", "--weights", weights).code == 0
    expected = make_extractor(load_backbone(weights), num_images=1)(image[None])
    np.testing.assert_array_equal(np.load(tmp_path / "of.npy"), expected)
    large = Image.fromarray(image).resize((20, 30))
    large.save(tmp_path / "large.png")
    arguments = [tmp_path / "small.png", tmp_path / "large.png", "--resize", "upsample", "--weights", weights]
    is_one_error(features(capsys, tmp_path / "no.npy", *arguments), 2, "--resize upsample repeats the pixels of square")


def test_image_files_are_named_as_for_predict(tmp_path, capsys, monkeypatch, weights, pictures):
    """By pattern, by folder at any depth, on standard input, and with any bytes in their names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    strange = os.fsdecode(b"photos/deep/caf\xe9.png")
    shutil.copy(pictures[2], strange)
    shutil.copy(pictures[1], "photos/1.png")
    sources = {"photos": ["photos/1.png", strange], "*.png": ["0.png", "1.png", "2.png"], "-": ["2.png", strange]}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"2.png\0photos/deep/caf\xe9.png\0")))
    for number, (source, found) in enumerate(sources.items()):
        out = f"{number}.npz"
        result = features(capsys, out, source, "--weights", weights)
        assert result.code == 0 and f"{len(found)} image files" in result.out, result
        assert list(read(out)["paths"]) == found
    np.testing.assert_allclose(read("0.npz")["features"], read("1.npz")["features"][1:], rtol=1e-4, atol=1e-6)


def test_a_folder_of_folders_is_a_data_set(tmp_path, capsys, weights):
    """As for `train`: its own test images, or a share of all, and validation images of its own."""
    draw_folder(tmp_path / "data" / "train", 6, 0)
    draw_folder(tmp_path / "data" / "test", 2, 1)
    draw_folder(tmp_path / "data" / "val", 3, 2)
    result = features(capsys, tmp_path / "of.npz", tmp_path / "data", "--weights", weights)
    assert result.code == 0 and f"data set {tmp_path / 'data'}, 3 classes" in result.out
    arrays = read(tmp_path / "of.npz")
    for split, num in (("train", 18), ("test", 6), ("val", 9)):
        assert len(arrays[f"{split}_features"]) == len(arrays[f"{split}_labels"]) == num
    assert list(arrays["class_names"]) == sorted(CLASSES.values())
    whole = tmp_path / "data" / "train"
    result = features(capsys, tmp_path / "whole.npz", whole, "--weights", weights, "--test-fraction", "0.5")
    assert result.code == 0 and "3 classes; no test images of its own: 9 of 18 held out" in result.out
    assert len(read(tmp_path / "whole.npz")["test_features"]) == 9
    shutil.copy(whole / "Käfer" / "0.png", whole)  # a picture beside the folders makes all of them a list
    result = features(capsys, tmp_path / "list.npz", whole, "--weights", weights)
    assert result.code == 0 and "19 image files" in result.out and len(read(tmp_path / "list.npz")["features"]) == 19


def test_unreadable_files_can_be_left_out(tmp_path, capsys, weights, pictures):
    pictures[1].write_text("a letter")
    out = tmp_path / "of.npz"
    result = features(capsys, out, *pictures, "--weights", weights)
    is_one_error(result, 2, "1.png is not a readable image", "--skip-unreadable leaves such files out")
    result = features(capsys, out, *pictures, "--weights", weights, "--skip-unreadable")
    assert result.code == 0 and f"Skipped 1 files that cannot be read: {pictures[1]}." in result.err
    assert list(read(out)["paths"]) == [str(pictures[0]), str(pictures[2])] and len(read(out)["features"]) == 2
    result = features(capsys, tmp_path / "none.npz", pictures[1], "--weights", weights, "--skip-unreadable")
    is_one_error(result, 2, "None of the 1 images can be read")


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
        ("picture.png --test-fraction 0.5", ["--test-fraction 0.5 applies to a data set", "picture.png is a list"]),
        ("*.png --train-examples 2", ["--train-examples 2 applies to a data set"]),
        ("shapes --image-size 16", ["--image-size must be between 32 and 4096, got 16."]),
        (
            "shapes --train-examples 20 --test-examples 10 --resize upsample --image-size 33",
            ["--image-size 33 is not a multiple of their 32 pixels"],
        ),
        ("empty", ["empty is a directory without image files, at any depth"]),
        ("shapes --train-examples 0", ["--train-examples must be at least 1, got 0."]),
        ("shapes --precision float16", ["--precision", "float16"]),
        ("nothing.png", ["nothing.png does not exist"]),
        ("./nothing", ["./nothing does not exist"]),
        ("nothing.npz", ["nothing.npz does not exist"]),
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
    (tmp_path / "empty").mkdir()
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
