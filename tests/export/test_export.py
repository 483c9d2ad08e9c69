"""Tests of `export`: a run as ONNX and StableHLO gives the run's probabilities, in clean processes too."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from helpers import FIELDS, ROOT, SMALL_JOB, command, files_below, full_disk, is_one_error, is_tyros_error, tiny_run
from photos import photo_run

from cifar_jax import FunctionBackbone, TrainConfig, UserError, export_run, flax_head, load_exported, load_run
from cifar_jax.errors import RunError
from cifar_jax.experiment import train
from cifar_jax.export import write
from cifar_jax.export.stablehlo import promised_until
from cifar_jax.export.trained_model import drawn_images, trained_model

pytestmark = pytest.mark.usefixtures("quick_compile")
SUFFIX = {"onnx": ".onnx", "stablehlo": ""}
FORMATS = list(SUFFIX)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A run on photos, which are resized by the weights' evaluation transform."""
    return photo_run(tmp_path_factory.mktemp("photos"), "cached")


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    """A run of each kind: photos, small squares upsampled, all layers."""
    squares = photo_run(tmp_path_factory.mktemp("squares"), "live", (16, 16), "--epochs", "1")
    layers = photo_run(tmp_path_factory.mktemp("layers"), "finetune", (48, 40), "--epochs", "1")
    return {"photos": photos, "squares": squares, "layers": layers}


@pytest.fixture(scope="module", params=["photos", "squares", "layers"])
def run(request, runs):
    return load_run(runs[request.param])


@pytest.fixture(scope="module")
def exported(photos, tmp_path_factory):
    """The run on photos in each format, by format."""
    root, run = tmp_path_factory.mktemp("exported"), load_run(photos)
    for form, suffix in SUFFIX.items():
        export_run(run, form, root / f"model{suffix}")
    return {form: root / f"model{suffix}" for form, suffix in SUFFIX.items()}


def probabilities_of(run, images):
    return np.concatenate([probs for _, probs in run.probabilities(images)])


@pytest.mark.parametrize("form", FORMATS)
def test_exports_give_the_probabilities_of_the_run(run, form, tmp_path):
    out = tmp_path / f"model{SUFFIX[form]}"
    about = export_run(run, form, out)
    assert float(about["checked"].split()[4]) < 1e-6
    model, images = load_exported(out), drawn_images(run.resize, 5)
    expected = probabilities_of(run, images)
    for size in (None, 2, 5):
        found = model(images, size)
        np.testing.assert_allclose(found["probabilities"], expected, atol=1e-5)
        assert found["features"].shape == (5, run.backbone.num_features)
    assert np.ptp(expected, axis=0).max() > 1e-3  # the images are told apart
    assert model.class_names == run.class_names and model.resize == run.resize
    assert files_below(tmp_path)[0].startswith("model")


ONNX_ALONE = """
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
class_names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
probabilities, features = session.run(None, {"image": np.load(sys.argv[2])})
"""
STABLEHLO_ALONE = """
import json, sys
import jax, numpy as np, safetensors.numpy
directory = sys.argv[1]
program = jax.export.deserialize(bytearray(open(f"{directory}/model.stablehlo", "rb").read()))
weights = safetensors.numpy.load_file(f"{directory}/weights.safetensors")
probabilities = jax.jit(program.call)(weights, np.load(sys.argv[2]))["probabilities"]
class_names = json.load(open(f"{directory}/metadata.json"))["class_names"]
"""
SAVED = """
assert "cifar_jax" not in sys.modules
np.savez(sys.argv[3], probabilities=probabilities, class_names=class_names)
"""


@pytest.mark.parametrize(("form", "script"), [("onnx", ONNX_ALONE), ("stablehlo", STABLEHLO_ALONE)])
def test_their_own_libraries_load_them_without_this_project(photos, exported, form, script, tmp_path):
    run = load_run(photos)
    np.save(tmp_path / "images.npy", drawn_images(run.resize, 5))
    arguments = [exported[form], tmp_path / "images.npy", tmp_path / "found.npz"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-I", "-c", script + SAVED, *arguments], cwd=tmp_path, env=clean, check=True)
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_allclose(found["probabilities"], probabilities_of(run, drawn_images(run.resize, 5)), atol=1e-5)
    assert tuple(found["class_names"]) == run.class_names


def test_the_facts_travel_along_and_no_path_does(photos, exported):
    run = load_run(photos)
    metadata = {one.key: json.loads(one.value) for one in onnx.load(exported["onnx"]).metadata_props}
    beside = json.loads((exported["stablehlo"] / "metadata.json").read_text())
    about = beside.pop("stablehlo")
    assert metadata == beside == json.loads(json.dumps(trained_model(run).about))
    assert (metadata["class_names"], metadata["resize"]) == (list(run.class_names), run.resize.to_json())
    assert metadata["scores"]["accuracy"] == run.summary["val_accuracy"] and metadata["scores"]["num"] == 21
    assert metadata["data"]["dataset"] == "data" and metadata["status"] == "complete"
    program = (exported["stablehlo"] / "model.stablehlo").read_bytes()
    for path in (str(photos.parent), str(ROOT), sys.prefix):
        assert path not in json.dumps(metadata) and path.encode() not in program
    assert about["platforms"] == ["cpu", "cuda", "tpu"] and about["jaxlib"] == jax.lib.__version__
    weights = trained_model(replace(run, head_params=jax.tree.map(lambda leaf: leaf + 1, run.head_params)))
    assert weights.about["run_sha256"] != metadata["run_sha256"]


def test_the_program_is_for_all_platforms(exported):
    content = bytearray((exported["stablehlo"] / "model.stablehlo").read_bytes())
    program = jax.export.deserialize(content)
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert len(content) < 200_000  # the weights lie beside it


@pytest.mark.parametrize(
    ("version", "until"), [("0.10.2", date(2026, 12, 17)), ("0.10.0", date(2026, 10, 16)), ("9.9.9", None)]
)
def test_jax_promises_six_months(version, until):
    assert promised_until(version) == until


class Head(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        return nn.Dense(10)(nn.Dropout(0.5, deterministic=not train)(nn.tanh(nn.Dense(8)(x))))


def means(variables, images):
    """Means of quarters of images, and a layer behind them, for a batch of any size."""
    x = images.astype(jnp.float32).reshape(images.shape[0], 2, 16, 2, 16, 3).mean(axis=(2, 4))
    return jnp.tanh((x.reshape(images.shape[0], 12) / 127.5 - 1) @ variables)


def test_functions_are_for_stablehlo_alone(tmp_path, narrow):
    head = flax_head(Head())
    backbone = FunctionBackbone(means, np.random.default_rng(0).normal(size=(12, 16)).astype(np.float32), "means")
    config = TrainConfig(**SMALL_JOB | {"epochs": 1}, out=str(tmp_path / "run"))
    run = load_run(train(config, backbone=backbone, head=head), backbone=backbone, head=head)
    export_run(run, "stablehlo", tmp_path / "model")
    images = drawn_images(run.resize, 5)
    found = load_exported(tmp_path / "model")(images)
    np.testing.assert_allclose(found["probabilities"], probabilities_of(run, images), atol=1e-6)
    with pytest.raises(UserError, match="'means' is a function, which --format onnx cannot express; use --format st"):
        export_run(run, "onnx", tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"take its size from images\.shape\[0\], not from len\(images\)"):
        export_run(replace(run, backbone=FIELDS), "stablehlo", tmp_path / "other")
    assert not (tmp_path / "model.onnx").exists() and not (tmp_path / "other").exists()


@pytest.mark.parametrize("form", FORMATS)
def test_predict_and_evaluate_take_exports(photos, exported, form, capsys):
    pictures = photos.parent / "data" / "test"
    expected = command(capsys, "predict", photos, pictures, "--csv")
    assert expected.code == 0
    for size in ((), ("--batch-size", "2"), ("--batch-size", "100")):
        found = command(capsys, "predict", exported[form], pictures, "--csv", *size)
        assert found.code == 0 and found.err == ""
        for ours, theirs in zip(found.out.splitlines()[1:], expected.out.splitlines()[1:], strict=True):
            assert ours.split(".png")[0] == theirs.split(".png")[0]
            a, b = (np.array([float(x) for x in line.rsplit(",", 3)[1:]]) for line in (ours, theirs))
            np.testing.assert_allclose(a, b, atol=1e-5)
    own = json.loads(command(capsys, "evaluate", photos, "--json").out)
    moved = json.loads(
        command(
            capsys, "evaluate", exported[form], "--dataset", photos.parent / "data", "--json", "--batch-size", "4"
        ).out
    )
    assert own.pop("run") == str(photos)
    assert moved == own | {
        "model": str(exported[form]),
        "dataset": str(photos.parent / "data"),
        "test_loss": pytest.approx(own["test_loss"], rel=1e-4),
    }
    is_one_error(
        command(capsys, "evaluate", exported[form]), 2, "does not say where the pictures of data are", "--dataset"
    )


def test_an_export_of_a_named_set_knows_its_test_images(tmp_path_factory, capsys, tmp_path):
    run = tiny_run(tmp_path_factory).path
    assert command(capsys, "export", run, "--format", "onnx", "--out", tmp_path / "m.onnx").code == 0
    own, found = (json.loads(command(capsys, "evaluate", which, "--json").out) for which in (run, tmp_path / "m.onnx"))
    assert found["test_accuracy"] == own["test_accuracy"] and found["num_test"] == own["num_test"] == 20


def test_options_of_runs_are_refused_for_exports(exported, capsys):
    picture = ("photo.png",)
    path = exported["onnx"]
    is_one_error(command(capsys, "predict", path, *picture, "--direct"), 2, "--direct does not go with an exported")
    is_one_error(command(capsys, "predict", path, *picture, "--weights", "w"), 2, "--weights w goes with a run")
    is_one_error(command(capsys, "evaluate", path, "--allow-incomplete"), 2, "--allow-incomplete goes with a run")
    for size in ("0", "-1", "5000"):
        is_one_error(command(capsys, "predict", path, *picture, "--batch-size", size), 2, "--batch-size must be 1 to")


def broken(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "text":
        path.write_text("no model")
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["truncated", "text", "empty"])
@pytest.mark.parametrize(
    "name", ["model.onnx", "model/model.stablehlo", "model/weights.safetensors", "model/metadata.json"]
)
def test_damaged_exports_are_one_sentence(exported, name, how, capsys, tmp_path):
    source = exported["onnx" if name == "model.onnx" else "stablehlo"]
    copy = tmp_path / source.name
    for file in [source] if source.is_file() else source.iterdir():
        target = tmp_path / file.relative_to(source.parent)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    broken(tmp_path / name, how)
    is_one_error(command(capsys, "predict", copy, "photo.png"), 2, str(copy))


def test_foreign_files_are_refused(exported, capsys, tmp_path):
    model = onnx.load(exported["onnx"])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    is_one_error(command(capsys, "predict", tmp_path / "foreign.onnx", "a.png"), 2, "does not say what it is")
    (tmp_path / "model.keras").write_bytes(b"PK")
    is_one_error(
        command(capsys, "predict", tmp_path / "model.keras", "a.png"),
        2,
        "is not a run, an .onnx file or a",
    )
    is_one_error(command(capsys, "predict", tmp_path / "gone.onnx", "a.png"), 2, "gone.onnx does not exist")
    with pytest.raises(UserError, match="formats are for their own libraries"):
        load_exported(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"class_names": "abc"},
        {"class_names": ["a", "a", "b"]},
        {"class_names": ["a", "b"]},
        {"resize": {"method": "crop", "side": 32}},
        {"resize": {"method": "eval-transform", "side": 32, "shorter": 0}},
        {"resize": {"method": "eval-transform", "side": 64, "shorter": 73}},
        {"resize": {"method": "upsample", "side": "32"}},
        {"image_size": None},
        {"data": {}},
    ],
    ids=str,
)
def test_facts_that_do_not_fit_the_graph_are_refused(exported, capsys, tmp_path, changes):
    model = onnx.load(exported["onnx"])
    facts = {one.key: one.value for one in model.metadata_props} | {k: json.dumps(v) for k, v in changes.items()}
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, tmp_path / "model.onnx")
    is_one_error(command(capsys, "predict", tmp_path / "model.onnx", "a.png"), 2, "does not say what it is")


def test_a_path_in_the_place_of_a_name_is_not_read(exported, capsys, tmp_path, photos):
    model = onnx.load(exported["onnx"])
    data = {"kind": "tfds", "dataset": str(photos.parent / "data"), "test_sha256": ""}
    facts = {one.key: one.value for one in model.metadata_props} | {"data": json.dumps(data)}
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, tmp_path / "model.onnx")
    is_one_error(command(capsys, "evaluate", tmp_path / "model.onnx"), 2, "does not say where the pictures of")


def test_pictures_that_may_be_of_the_training_are_warned_of(exported, photos, capsys):
    train = photos.parent / "data" / "train"
    found = command(capsys, "evaluate", exported["onnx"], "--dataset", train, "--json")
    assert found.code == 0 and "does not say which pictures it was trained on" in found.err


def test_weights_with_a_wrong_bit_are_refused(exported, capsys, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for file in exported["stablehlo"].iterdir():
        content = bytearray(file.read_bytes())
        if file.name == "weights.safetensors":
            content[-9] ^= 64
        (copy / file.name).write_bytes(content)
    is_one_error(command(capsys, "predict", copy, "a.png"), 2, "checksum mismatch in weights.safetensors")
    (copy / "weights.safetensors").unlink()
    is_one_error(command(capsys, "predict", copy, "a.png"), 2, "lacks weights.safetensors")


def test_images_of_another_size_are_refused(exported):
    model = load_exported(exported["onnx"])
    with pytest.raises(ValueError, match="images must be 32x32, got 16x16"):
        model(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="not scaled to 0"):
        model(np.zeros((1, 32, 32, 3), np.float32))
    assert model(np.zeros((0, 32, 32, 3), np.uint8))["probabilities"].shape == (0, 3)
    assert model.predict([np.zeros((20, 50, 3), np.uint8)]).probabilities.shape == (1, 3)


def test_bad_targets_are_refused_before_any_work(photos, capsys, tmp_path):
    def export(form, out, *more):
        return command(capsys, "export", photos, "--format", form, "--out", tmp_path / out, *more)

    is_one_error(export("onnx", "model"), 2, "--out must be a file name that ends in .onnx")
    is_one_error(export("stablehlo", "model.onnx"), 2, "--out is a directory for --format stablehlo")
    is_one_error(export("onnx", "no/model.onnx"), 2, "Create", "or choose another path")
    (tmp_path / "here.onnx").write_text("mine")
    is_one_error(export("onnx", "here.onnx"), 2, "already exists. Pass --overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    is_one_error(export("stablehlo", "mine"), 2, "is not a directory that `export` wrote")
    is_one_error(export("stablehlo", "mine", "--overwrite"), 2, "is not a directory that `export` wrote")
    is_tyros_error(export("tflite", "model.tflite"), "onnx")
    assert files_below(tmp_path) == ["here.onnx", "mine", "mine/thesis.txt"]
    is_one_error(export("onnx", ".onnx"), 2, "--out must be a file name that ends in .onnx")
    (tmp_path / "model").mkdir()  # empty, as one makes it first
    assert export("stablehlo", "model").code == 0 and export("stablehlo", "model", "--overwrite").code == 0
    is_one_error(export("stablehlo", "model"), 2, "already exists. Pass --overwrite")
    assert export("onnx", "here.onnx", "--overwrite").code == 0
    assert [name for name in files_below(tmp_path) if "/" not in name] == ["here.onnx", "mine", "model"]
    is_one_error(
        command(capsys, "export", tmp_path, "--format", "onnx", "--out", tmp_path / "m.onnx"), 2, "config.json"
    )


def test_what_somebody_added_or_changed_is_not_replaced(photos, tmp_path, monkeypatch):
    run, out = load_run(photos), tmp_path / "model"
    export_run(run, "pytorch", out)
    sums = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=out, capture_output=True, text=True)
    assert sums.returncode == 0 and sums.stdout.count("OK") == 3
    (out / "notes.txt").write_text("mine")
    with (out / "model.py").open("a") as file:
        file.write("# mine too")
    (out / ".git").mkdir()
    with pytest.raises(UserError, match=r"has changed since it was exported \(\.git, model\.py, notes\.txt\)"):
        export_run(run, "pytorch", out, overwrite=True)
    (out / "notes.txt").unlink()
    (out / ".git").rmdir()
    (out / "model.py").write_bytes((Path(write.__file__).parent / "templates" / "model.py").read_bytes())
    monkeypatch.chdir(out)
    export_run(run, "pytorch", ".", overwrite=True)
    assert files_below(tmp_path) == ["model", *(f"model/{name}" for name in sorted(os.listdir(out)))]


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_leaves_nothing(photos, form, capsys, tmp_path):
    run = load_run(photos)
    with full_disk(at=5000), pytest.raises(RunError, match="free disk space or choose another --out"):
        export_run(run, form, tmp_path / f"model{SUFFIX[form]}")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_that_is_not_the_run_is_not_kept(photos, form, tmp_path):
    run = load_run(photos)
    without_numbers = jax.tree.map(lambda leaf: leaf * np.nan, run.head_params)
    with pytest.raises(RunError, match="gives probabilities that are not finite; nothing was exported"):
        export_run(replace(run, head_params=without_numbers), form, tmp_path / f"model{SUFFIX[form]}")
    assert files_below(tmp_path) == []


def test_incomplete_runs_need_a_flag(photos, capsys, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for file in photos.rglob("*"):
        target = copy / file.relative_to(photos)
        target.mkdir(exist_ok=True) if file.is_dir() else target.write_bytes(file.read_bytes())
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
    arguments = ("export", copy, "--format", "onnx", "--out", tmp_path / "m.onnx")
    is_one_error(command(capsys, *arguments), 2, "incomplete", "--allow-incomplete")
    assert command(capsys, *arguments, "--allow-incomplete").code == 0
    picture = next((photos.parent / "data" / "test").rglob("*.png"))
    found = command(capsys, "predict", tmp_path / "m.onnx", picture)
    assert found.code == 0 and "was exported from an incomplete run (interrupted)" in found.err
    is_one_error(command(capsys, "export", tmp_path / "m.onnx", "--format", "hub", "--out", "x"), 2, "run directory")
    with pytest.raises(UserError, match="no format 'tflite'"):
        export_run(load_run(photos), "tflite", tmp_path / "x")


def test_a_missing_runtime_is_named_and_the_export_is_written(photos, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    about = export_run(load_run(photos), "onnx", tmp_path / "model.onnx")
    assert about["checked"] == "not at all, as onnxruntime is not installed"
    with pytest.raises(
        UserError, match=r"needs the package onnxruntime; install it with `pip install 'cifar-jax\[onnx"
    ):
        load_exported(tmp_path / "model.onnx")
