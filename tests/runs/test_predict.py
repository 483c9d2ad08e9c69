"""The command `predict`: a row for every image, in order, whatever is wrong with some of them."""

import json
import os
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import command, is_one_error, tiny_run
from PIL import Image

from cifar_jax import Head, head_logits, load_run
from cifar_jax.runs.directory import SUMMARY
from cifar_jax.runs.predict import predict_files, predict_probs


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory).path


@pytest.fixture
def pictures(tmp_path):
    """Seven pictures of noise."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = [folder / f"{number}.{ending}" for number, ending in enumerate(["png", "PNG", "jpg", "webp"] + ["bmp"] * 3)]
    for seed, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    return paths


def test_bad_images_have_a_row_with_the_reason(run, capsys, tmp_path, pictures):
    text, cut, missing = tmp_path / "notes.png", tmp_path / "cut.png", tmp_path / "missing.png"
    text.write_text("a letter")
    cut.write_bytes(pictures[0].read_bytes()[:200])
    paths = [missing, pictures[0], text, pictures[2], cut]
    result = command(capsys, "predict", run, *paths, "--json")
    is_one_error(result, 1, "3 of 5 images could not be read")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert [(row["error"] or "")[:23] for row in rows] == [
        "does not exist", "", "is not a readable image", "", "cannot be read as an im"
    ]  # fmt: skip
    alone = json.loads(command(capsys, "predict", run, pictures[2], "--json").out)
    assert rows[3]["path"] == alone["path"]
    assert rows[3]["probabilities"] == pytest.approx(alone["probabilities"], rel=1e-5)
    plain = command(capsys, "predict", run, *paths)
    lines = plain.out.splitlines()
    assert plain.code == 1 and len(lines) == 5 and lines[0] == f"{missing}  error: does not exist"
    only = command(capsys, "predict", run, missing)
    assert only.out == f"{missing}  error: does not exist\n"
    is_one_error(only, 1, "1 of 1 images")


def test_a_directory_stands_for_the_pictures_in_it(run, capsys, tmp_path, pictures):
    folder = pictures[0].parent
    for name in ("notes.txt", ".hidden.png", "no ending"):
        (folder / name).write_text("a letter")
    result = command(capsys, "predict", run, folder, pictures[0], "--json")
    found = [json.loads(line)["path"] for line in result.out.splitlines()]
    assert result.code == 0 and found == [*map(str, pictures), str(pictures[0])]


def test_the_run_comes_first(run, capsys, pictures):
    result = command(capsys, "predict", pictures[0], run)
    is_one_error(result, 2, "comes before the images", f"`python -m cifar_jax predict {run} {pictures[0]}`")
    result = command(capsys, "predict", *pictures, run)
    is_one_error(result, 2, f"predict {run} {' '.join(map(str, pictures[:3]))} ...`")


class Recording(list):
    """A list that counts how many of its items were asked for."""

    asked = 0

    def __getitem__(self, index):
        self.asked += 1
        return super().__getitem__(index)


def test_files_are_read_a_few_batches_ahead(run, pictures):
    """So the memory does not grow with their number: 10,000 paths of which a fraction is opened for the first rows."""
    loaded, paths = load_run(run), Recording([pictures[0].with_name("missing.png"), *pictures * 1500])
    found = predict_files(loaded, paths)
    first = next(found)
    assert first.error == "does not exist" and first.top == () and np.isnan(first.probabilities).all()
    assert 0 < paths.asked < 3000
    second = next(found)
    found.close()
    (alone,) = predict_files(loaded, iter(pictures[:1]))
    assert (second.path, second.error, [name for name, _ in second.top]) == (
        str(pictures[0]), "", [name for name, _ in alone.top]
    )  # fmt: skip
    np.testing.assert_allclose(second.probabilities, alone.probabilities, rtol=1e-4)


def test_paths_and_pixels_give_the_same(run, pictures):
    """As files of a format without loss, as a list of arrays of any size, and as one array."""
    loaded = load_run(run)
    lossless = [path for path in pictures if path.suffix in (".png", ".PNG", ".bmp")]
    arrays = [np.asarray(Image.open(path)) for path in lossless]
    of_files = loaded.predict(lossless)
    for images in (arrays, np.stack(arrays), jnp.stack(arrays), iter(arrays), map(str, lossless)):
        of_pixels = loaded.predict(images)
        np.testing.assert_array_equal(of_pixels.probabilities, of_files.probabilities)
        assert of_pixels.class_names == of_files.class_names and of_pixels.errors == ("",) * len(arrays)
    assert of_files.probabilities.shape == (len(arrays), 10) and of_files.probabilities.dtype == np.float32
    np.testing.assert_array_equal(of_files.labels, of_files.probabilities.argmax(axis=1).astype(np.int32), strict=True)
    assert of_files.class_names == tuple(loaded.class_names[label] for label in of_files.labels)
    one = loaded.predict(lossless[0])  # a path alone
    np.testing.assert_allclose(one.probabilities, of_files.probabilities[:1], rtol=1e-4)
    other_size = np.asarray(Image.open(lossless[0]).resize((50, 90)))
    assert len(loaded.predict([arrays[0], other_size]).labels) == 2


def test_images_of_the_training_size_are_taken_as_they_are(run, shapes):
    loaded, images = load_run(run), np.asarray(shapes.images[:5])
    np.testing.assert_allclose(
        loaded.predict(images).probabilities, predict_probs(loaded.backbone, loaded.head_params, images), rtol=1e-4
    )


def test_a_file_that_cannot_be_read_has_a_row(run, pictures):
    found = load_run(run).predict([pictures[0], "missing.png", pictures[1]])
    assert found.errors == ("", "does not exist", "") and found.labels[1] == -1 and found.class_names[1] == ""
    assert np.isnan(found.probabilities[1]).all() and np.isfinite(found.probabilities[[0, 2]]).all()


def test_nothing_to_predict_gives_nothing(run):
    for nothing in ([], np.zeros((0, 32, 32, 3), np.uint8)):
        found = load_run(run).predict(nothing)
        assert found.probabilities.shape == (0, 10) and found.labels.shape == (0,)
        assert found.class_names == found.errors == ()


@pytest.mark.parametrize(
    ("pictures", "reason"),
    [
        (np.zeros((2, 32, 32, 3), np.float32), "got float32.*pass pixels in 0..255"),
        (np.zeros((32, 32, 3), np.uint8), "add a batch axis"),
        ([np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)], r"picture 1 must be .* got uint8 \[32, 32\]"),
    ],
)
def test_pixels_of_another_kind_are_refused(run, pictures, reason):
    with pytest.raises(ValueError, match=reason):
        load_run(run).predict(pictures)


def test_a_head_whose_logits_have_no_defaults_predicts(run, pictures, shapes):
    loaded, seen = load_run(run), []

    def logits(params, features, *, train, key):
        seen.append((train, key))
        return head_logits(params, features)

    strict = replace(loaded, head=Head(loaded.head.init, logits, "strict"))
    (one,), (other,) = (predict_files(each, pictures[:1]) for each in (strict, loaded))
    assert one.top == other.top and len(one.top) == 3
    arguments = (loaded.backbone, loaded.head_params, shapes.images[:2])
    np.testing.assert_array_equal(predict_probs(*arguments, logits_fn=logits), predict_probs(*arguments))
    assert seen == [(False, None)] * 2


def test_names_with_control_characters_are_escaped(run, capsys, tmp_path, pictures):
    evil = tmp_path / "two\nlines\x1b[31m.png"
    shutil.copy(pictures[0], evil)
    hostile = shutil.copytree(run, tmp_path / "run")
    summary = json.loads((hostile / SUMMARY).read_text())
    summary["dataset"]["class_names"] = [f"\x1b]0;{n}\x07Käfer" for n in range(10)]
    (hostile / SUMMARY).write_text(json.dumps(summary))
    result = command(capsys, "predict", hostile, evil)
    assert result.code == 0 and result.out.count("\n") == 1 and "\x1b" not in result.out and "\x07" not in result.out
    assert result.out.startswith(rf"{tmp_path}{os.sep}two\nlines\x1b[31m.png  \x1b]0;") and "Käfer 0." in result.out
    scores = command(capsys, "evaluate", hostile)
    assert scores.code == 0 and "\x1b" not in scores.out and r"\x1b]0;3\x07Käfer" in scores.out


def test_backbones_and_runs_are_shown_in_one_line(run):
    loaded = load_run(run)
    assert repr(loaded.backbone) == (
        f"Backbone({loaded.backbone.source}: a ResNet with (1, 1) blocks of width 4, 2,596 parameters, "
        "torch preprocessing, 32x32)"
    )
    accuracy = loaded.summary["val_accuracy"]
    names = ", ".join(loaded.class_names)
    assert repr(loaded) == (
        f"Run({run}: complete, accuracy {accuracy:.4f}, 10 classes ({names}), head 32-8-10, {loaded.backbone!r})"
    )
