"""The command `predict`: a row for every image, in order, whatever is wrong with some of them."""

import json
import os
import shutil
from dataclasses import replace

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
    assert [row.get("error", "")[:23] for row in rows] == [
        "does not exist", "", "is not a readable image", "", "cannot be read as an im"
    ]  # fmt: skip
    assert [set(row) for row in rows] == [{"path", "top" if "top" in row else "error"} for row in rows]
    alone = json.loads(command(capsys, "predict", run, pictures[2], "--json").out)
    assert rows[3]["path"] == alone["path"] and rows[3]["top"] == pytest.approx(alone["top"], rel=1e-5)
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
    (folder / "deeper").mkdir()
    result = command(capsys, "predict", run, folder, pictures[0], "--json")
    found = [json.loads(line)["path"] for line in result.out.splitlines()]
    assert result.code == 0 and found == [*map(str, pictures), str(pictures[0])]
    is_one_error(command(capsys, "predict", run, folder / "deeper"), 2, f"{folder / 'deeper'} is a directory without")


def test_the_run_comes_first(run, capsys, pictures):
    result = command(capsys, "predict", pictures[0], run)
    is_one_error(result, 2, "comes before the images", f"`python -m cifar_jax predict {run} {pictures[0]}`")
    result = command(capsys, "predict", *pictures, run)
    is_one_error(result, 2, f"predict {run} {' '.join(map(str, pictures[:3]))} ...`")


class Recording(list):
    """A list that records the slices taken of it."""

    def __init__(self, *items):
        super().__init__(*items)
        self.taken = []

    def __getitem__(self, index):
        self.taken.append((index.start, index.stop))
        return super().__getitem__(index)


def test_files_are_read_a_few_at_a_time_and_that_changes_nothing(run, pictures):
    paths = Recording([pictures[0].with_name("missing.png"), *pictures])
    found = predict_files(load_run(run), paths, at_once=3)
    first = next(found)
    assert first.error == "does not exist" and set(paths.taken) == {(0, 3)}
    whole = list(predict_files(load_run(run), paths))
    for one, other in zip([first, *found], whole, strict=True):
        assert (one.path, one.error, [name for name, _ in one.top]) == (
            other.path, other.error, [name for name, _ in other.top]
        )  # fmt: skip
        np.testing.assert_allclose([p for _, p in one.top], [p for _, p in other.top], rtol=1e-4)


def test_a_head_whose_logits_have_no_defaults_predicts(run, pictures, shapes):
    loaded, seen = load_run(run), []

    def logits(params, features, *, train, key):
        seen.append((train, key))
        return head_logits(params, features)

    strict = replace(loaded, head=Head(loaded.head.init, logits, "strict"))
    assert list(predict_files(strict, pictures[:1])) == list(predict_files(loaded, pictures[:1]))
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
