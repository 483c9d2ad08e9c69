"""Values that an option does not allow, and files of the wrong kind: each is one error, and no file is written."""

import itertools
import json
import re
import shutil
import signal
from dataclasses import fields

import numpy as np
import pytest
from helpers import TINY, command, files_below, is_one_error, is_refused, narrow_networks, tiny_run
from PIL import Image

from cifar_jax.cli.options import (
    ConvertOptions,
    EvaluateOptions,
    ExportOptions,
    FeaturesOptions,
    InfoOptions,
    PredictOptions,
    VerifyOptions,
)
from cifar_jax.config.option_groups import GROUP_OF

SECONDS = 60  # limit for a command that is refused
HUGE = 2**40  # bytes of a sparse file

NO_COUNT = ["0", "-1", "1.5", "four", "", "nan"]
NO_POSITIVE_NUMBER = ["0", "-0.1", "nan", "inf", "x", ""]
NO_SHARE = ["-0.1", "1", "nan", "inf", "x", ""]
NO_FLAG = ["maybe", "1"]
NOT_CACHED = "in --mode cached"

# Values that each option of `train` does not allow; None stands for the flag alone.
TRAIN = {
    "preset": ["imagenet", ""],
    "dataset": ["", " "],
    "data_dir": [],  # a path, as all without values: see below
    "weights": ["", " ", "no-such-network"],
    "variant": ["v3", ""],
    "image_size": [*NO_COUNT, "-32", "31", "4097", "1e9"],
    "resize": ["crop", ""],
    "interpolation": ["linear", "", "bicubic"],
    "test_fraction": [*NO_SHARE, "0", "0.5"],
    "label_key": ["label"],
    "skip_unreadable": [*NO_FLAG, None],
    "mode": ["eager", "", "CACHED"],
    "epochs": NO_COUNT,
    "batch_size": NO_COUNT,
    "learning_rate": NO_POSITIVE_NUMBER,
    "momentum": NO_SHARE,
    "nesterov": NO_FLAG,
    "weight_decay": ["-1", "nan", "inf", "x"],
    "schedule": ["linear", ""],
    "warmup_epochs": ["-1", "4", "1000", "nan", "x"],
    "label_smoothing": NO_SHARE,
    "class_weights": ["even", ""],
    "clip_norm": NO_POSITIVE_NUMBER,
    "augment": ["rotate", "flip", "random-resized-crop"],
    "freeze_stages": ["-1", "5", "x", "1"],
    "backbone_learning_rate": [*NO_POSITIVE_NUMBER, "0.1"],
    "bn_statistics": ["none", "frozen"],
    "bn_momentum": [*NO_SHARE, "0.5"],
    "zero_gamma": [*NO_FLAG, None],
    "micro_batch": [*NO_COUNT, "65", "8"],
    "remat": [*NO_FLAG, None],
    "hidden": ["0", "-8", "x", "1.5", "99999999"],
    "seed": ["-1", "x", "1.5", "2147483648"],
    "train_examples": [*NO_COUNT, "999999999"],
    "test_examples": [*NO_COUNT, "999999999"],
    "val_fraction": [*NO_SHARE, "0.000001", "0.999999"],
    "shuffle": NO_FLAG,
    "precision": ["float64", ""],
    "extract_batch_size": NO_COUNT,
    "feature_dtype": ["int8", ""],
    "devices": [*NO_COUNT, "99"],
    "cache_dir": [],
    "cache_limit": ["-1", "nan", "inf", "x"],
    "out": [],
    "config": [],
    "resume": NO_FLAG,
    "checkpoint_every": NO_COUNT,
    "keep_checkpoints": NO_COUNT,
    "overwrite": NO_FLAG,
    "profile": [],
    "progress": NO_FLAG,
    "deterministic": NO_FLAG,
    "debug": NO_FLAG,
}
COMMON = {"json": NO_FLAG, "debug": NO_FLAG}
WEIGHTS = ["", "no-such-network"]
SHAPES = ["shapes", "--weights", "random-w16", "--train-examples", "20", "--test-examples", "20", "--out", "NEW.npz"]
OF_TRAIN = ("image_size", "precision", "train_examples", "test_examples", "seed", "extract_batch_size")
OTHERS = {
    "evaluate": (
        EvaluateOptions,
        ["RUN"],
        COMMON
        | {"allow_incomplete": NO_FLAG, "weights": WEIGHTS, "skip_unreadable": [*NO_FLAG, None]}
        | {"dataset": ["", "no-such-set", "nowhere/pictures"], "label_key": ["", "label"]}
        | {"batch_size": [*NO_COUNT, "1025"]},
    ),
    "predict": (
        PredictOptions,
        ["RUN", "IMAGE"],
        COMMON
        | {"direct": NO_FLAG, "allow_incomplete": NO_FLAG, "weights": WEIGHTS}
        | {"csv": NO_FLAG, "top": ["0", "-1", "x", "1.5", ""], "batch_size": [*NO_COUNT, "1025"]},
    ),
    "export": (
        ExportOptions,
        ["RUN", "--format", "onnx", "--out", "NEW.onnx"],
        COMMON
        | {"overwrite": NO_FLAG, "allow_incomplete": NO_FLAG, "weights": WEIGHTS}
        | {"format": ["tflite", "", "ONNX"], "ort_web": ["", "dist"]},
    ),
    "info": (
        InfoOptions,
        ["shapes"],
        COMMON | {"clear": [*NO_FLAG, None], "seed": TRAIN["seed"], "label_key": ["fine"], "skip_unreadable": NO_FLAG},
    ),
    "convert": (
        ConvertOptions,
        ["WEIGHTS", "NEW.h5"],
        COMMON | {"overwrite": NO_FLAG, "to": ["onnx", ""], "variant": ["v3", ""]},
    ),
    "verify-weights": (VerifyOptions, ["WEIGHTS"], COMMON | {"against": ["jax", ""], "variant": ["v3", ""]}),
    "features": (
        FeaturesOptions,
        SHAPES,
        COMMON
        | {name: TRAIN[name] for name in OF_TRAIN}
        | {"weights": WEIGHTS, "variant": ["v3", "", "keras"], "overwrite": NO_FLAG, "skip_unreadable": NO_FLAG}
        | {"resize": ["crop", ""], "interpolation": ["cubic", "", "bicubic"], "label_key": ["", "label"]}
        | {"test_fraction": ["0", "1", "nan", "x", ""]},
    ),
}
# Options that name files or directories, tested in the second half of this file.
PATHS = {"data_dir", "cache_dir", "out", "config", "profile", "run", "sources", "src", "dst", "file", "sheet"}


@pytest.fixture(autouse=True)
def soon():
    """Ends a command that does not notice its wrong argument."""

    def late(*_):
        raise TimeoutError(f"The command ran for {SECONDS} seconds.")

    usual = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, usual)


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    narrow_networks(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tiny_run(tmp_path_factory).path


def typed(name, value):
    option = f"--{name.replace('_', '-')}"
    return [option] if value is None else [f"{option}={value}"]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in TRAIN.items() for value in values])
def test_options_of_train(tmp_path, capsys, name, value):
    preset = [] if name == "preset" else ["--preset", "demo"]
    result = command(capsys, "train", *preset, "--out", tmp_path / "out", *typed(name, value))
    is_refused(result)
    assert name.replace("_", "-") in result.err.replace("_", "-") or "flip" in str(value), result.err
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("verb", "name", "value"),
    [
        (verb, name, value)
        for verb, (_, _, table) in OTHERS.items()
        for name, values in table.items()
        for value in values
    ],
)
def test_options_of_other_commands(tmp_path, capsys, finished, verb, name, value):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "picture.png")
    places = {
        "RUN": finished,
        "IMAGE": tmp_path / "picture.png",
        "WEIGHTS": finished / "backbone.safetensors",
        "NEW.h5": tmp_path / "new.h5",
        "NEW.npz": tmp_path / "new.npz",
        "NEW.onnx": tmp_path / "new.onnx",
    }
    _, arguments, _ = OTHERS[verb]
    before = files_below(tmp_path)
    result = command(capsys, verb, *(places.get(argument, argument) for argument in arguments), *typed(name, value))
    is_refused(result)
    assert name.replace("_", "-") in result.err or str(value) in result.err, result.err
    assert files_below(tmp_path) == before


def test_no_option_is_left_out():
    assert set(TRAIN) == {"preset", *GROUP_OF}
    for options, _, table in OTHERS.values():
        names = {field.name for field in fields(options)}
        assert names - set(table) <= PATHS | {"topic"}, names - set(table)


# ---------------------------------------------------------------------------------------------------------------------
# File arguments


def missing(path):
    return path


def a_directory(path):
    path.mkdir()
    return path


def an_empty_file(path):
    path.touch()
    return path


def an_unreadable_file(path):
    """A file that even root cannot read: reading its first byte is an I/O error."""
    path.symlink_to("/proc/self/mem")
    return path


def a_text(path):
    path.write_text("Dear diary,\n" * 100)
    return path


def noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    return path


def a_huge_file(path):
    with open(path, "wb") as file:
        file.truncate(HUGE)
    return path


def a_link_to_itself(path):
    path.symlink_to(path)
    return path


KINDS = (missing, a_directory, an_empty_file, an_unreadable_file, a_text, noise, a_huge_file, a_link_to_itself)
# Commands by the name of their wrong file, FILE; RUN, IMAGE and WEIGHTS are good ones.
INPUTS = {
    "weights.h5": ["train", *TINY, "--weights", "FILE", "--out", "NEW"],
    "weights.safetensors": ["train", *TINY, "--weights", "FILE", "--out", "NEW"],
    "config.json": ["train", "--config", "FILE", "--out", "NEW"],
    "run": ["evaluate", "FILE"],
    "scored.safetensors": ["evaluate", "RUN", "--weights", "FILE"],
    "run ": ["predict", "FILE", "IMAGE"],
    "predicts.onnx": ["predict", "FILE", "IMAGE"],
    "scored.onnx": ["evaluate", "FILE"],
    "exported": ["export", "FILE", "--format", "onnx", "--out", "NEW.onnx"],
    "used.h5": ["predict", "RUN", "IMAGE", "--weights", "FILE"],
    "picture.jpg": ["features", "FILE", "--weights", "WEIGHTS", "--image-size", "32", "--out", "NEW.npz"],
    "extracted.pth": ["features", "IMAGE", "--weights", "FILE", "--out", "NEW.npz"],
    "source.pt": ["convert", "FILE", "NEW.safetensors"],
    "source.keras": ["convert", "FILE", "NEW.safetensors"],
    "source.bin": ["convert", "FILE", "NEW.safetensors"],
    "doubtful.weights.h5": ["verify-weights", "FILE"],
    "doubtful.pth": ["verify-weights", "FILE"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", INPUTS)
def test_files_that_are_read(tmp_path, capsys, finished, name, kind):
    file = kind(tmp_path / name.strip())
    picture = tmp_path.with_name(f"{tmp_path.name}.png")
    Image.new("RGB", (8, 8), "red").save(picture)
    places = {"FILE": file, "RUN": finished, "IMAGE": picture, "WEIGHTS": finished / "backbone.safetensors"}
    new = {f"NEW{suffix}": tmp_path / f"new{suffix}" for suffix in ("", ".npz", ".onnx", ".safetensors")}
    before = files_below(tmp_path)
    result = command(capsys, *((places | new).get(argument, argument) for argument in INPUTS[name]))
    is_one_error(result, 2, str(file))
    assert re.search(r"[;:]|\. \S", result.err.removeprefix("Error: "))  # what to do next, or what is wrong
    assert files_below(tmp_path) == before


# Commands by the name of a place, FILE, that they write to or look into.
PLACES = {
    "data": ["train", "--weights", "WEIGHTS", "--data-dir", "FILE", "--out", "NEW"],
    "scored": ["evaluate", "RUN OF CIFAR", "--data-dir", "FILE"],
    "out": ["train", *TINY, "--out", "FILE"],
    "trace": ["train", *TINY, "--profile", "FILE", "--out", "NEW"],
    "features.npz": ["features", "IMAGE", "--weights", "WEIGHTS", "--image-size", "32", "--out", "FILE"],
    "model.onnx": ["export", "RUN", "--format", "onnx", "--out", "FILE"],
    "model": ["export", "RUN", "--format", "stablehlo", "--out", "FILE"],
    "converted.safetensors": ["convert", "WEIGHTS", "FILE"],
}


# Places that a command may make or use.
FINE = {("out", missing), ("out", a_directory), ("trace", missing), ("trace", a_directory), ("model", a_directory)}


@pytest.mark.parametrize(("name", "kind"), [case for case in itertools.product(PLACES, KINDS) if case not in FINE])
def test_places(tmp_path, capsys, finished, name, kind):
    below = tmp_path / "no" / "such" / "directory" if kind is missing else tmp_path
    file = kind(below / name)
    picture = tmp_path.with_name(f"{tmp_path.name}.png")
    Image.new("RGB", (8, 8), "red").save(picture)
    of_cifar = shutil.copytree(finished, tmp_path.with_name(f"{tmp_path.name}.run"))
    config = json.loads((of_cifar / "config.json").read_text()) | {"preset": "cifar10", "dataset": "cifar10"}
    (of_cifar / "config.json").write_text(json.dumps(config))
    places = {"FILE": file, "RUN": finished, "RUN OF CIFAR": of_cifar, "IMAGE": picture, "NEW": tmp_path / "new"}
    places["WEIGHTS"] = finished / "backbone.safetensors"
    before = files_below(tmp_path)
    result = command(capsys, *(places.get(argument, argument) for argument in PLACES[name]))
    is_one_error(result, 2, str(file))
    assert files_below(tmp_path) == before
