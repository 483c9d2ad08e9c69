"""Tests of `predict`: pictures as people name them, rows as people read them, and the same answers as `evaluate`."""

import csv
import io
import json
import logging
import os
import re
import shutil
import sys
from collections import Counter

import jax
import numpy as np
import pytest
from helpers import command, is_one_error
from photos import CLASSES, photo_run
from PIL import Image
from rich.console import Console

from cifar_jax import load_run
from cifar_jax.cli.console import ConsoleReporter
from cifar_jax.cli.predictions import print_predictions
from cifar_jax.cli.trained import predict as predict_command
from cifar_jax.runs.predict import Prediction

NAMES = sorted(CLASSES.values())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on photos, which are resized by the weights' evaluation transform."""
    return photo_run(tmp_path_factory.mktemp("photos"), "cached")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Paths of 300 pictures in folders of folders, of which numbers 7 and 255 are broken."""
    root = tmp_path_factory.mktemp("many")
    paths = [root / f"{number % 3}" / f"{number % 2}" / f"{number:03}.png" for number in range(300)]
    rng = np.random.default_rng(0)
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (int(rng.integers(20, 60)), int(rng.integers(20, 60)), 3)
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(path)
        if number in (7, 255):
            path.write_bytes(path.read_bytes()[:100])
    return sorted(paths, key=lambda path: (str(path.parent), path.name))


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder of pictures with all kinds of names, as the current directory; returns their paths, sorted."""
    names = [
        *("a b.png", "a [1].png", "café.png", "photos/1.jpg", "photos/deep/deeper/2.JPG", "photos/deep/3 .webp"),
        os.fsdecode(b"caf\xe9.png"),
    ]
    for number, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (number * 30, 0, 0)).save(path)
    for name in (".hidden.png", "photos/.hidden/4.png", "photos/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / names[0], tmp_path / name)
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    shutil.copy(tmp_path / names[0], elsewhere / "linked.png")
    (tmp_path / "photos" / "link").symlink_to(elsewhere)
    monkeypatch.chdir(tmp_path)
    return sorted(names, key=os.path.split)


def rows(result):
    return [json.loads(line) for line in result.out.splitlines()]


def paths_of(capsys, run, *sources):
    result = command(capsys, "predict", run, *sources, "--json")
    assert result.code == 0 and result.err == "", result
    return [row["path"] for row in rows(result)]


def on_stdin(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_300_files_of_which_two_are_broken(run, capsys, many, caplog):
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        result = command(capsys, "predict", run, many[0].parents[2], "--csv")
    is_one_error(result, 1, "2 of 300 images could not be read")
    header, *table = csv.reader(io.StringIO(result.out))
    assert header == ["path", "label", "probability", "error", *NAMES]
    assert [row[0] for row in table] == list(map(str, many))
    broken = {row[0][-7:-4]: row for row in table if row[3]}
    assert set(broken) == {"007", "255"}
    assert all(row[3].startswith("cannot be read as an image") for row in broken.values())
    assert all(row[1:3] == ["", ""] and row[4:] == [""] * 3 for row in broken.values())

    # Each function was compiled once, for whatever number of files and errors.
    compiled = Counter(re.findall(r"Compiling jit\((\w+)\)", caplog.text))
    assert compiled["features_of"] == compiled["probabilities_of"] == 1, compiled

    # The library gives the same, digit by digit.
    found = load_run(run).predict(many)
    assert found.probabilities.dtype == np.float32 and found.labels.dtype == np.int32
    printed = np.array([[np.float32(cell or "nan") for cell in row[4:]] for row in table], np.float32)
    np.testing.assert_array_equal(printed, found.probabilities)
    assert [row[1] for row in table] == list(found.class_names) and [row[3] for row in table] == list(found.errors)
    assert [NAMES[label] if label >= 0 else "" for label in found.labels] == list(found.class_names)
    np.testing.assert_allclose(np.nansum(found.probabilities, axis=1)[found.labels >= 0], 1, rtol=1e-5)

    # JSON has the same values under the same names.
    as_json = rows(command(capsys, "predict", run, *many, "--json"))
    for row, cells in zip(as_json, table, strict=True):
        assert list(row) == ["path", "label", "probability", "error", "probabilities"]
        assert [row["path"], row["label"] or "", row["error"] or ""] == [cells[0], cells[1], cells[3]]
        if row["error"]:
            assert row["probability"] is row["probabilities"] is None
        else:
            assert row["probabilities"] == dict(zip(NAMES, map(float, cells[4:]), strict=True))
            assert row["probability"] == float(cells[2]) == max(row["probabilities"].values())


@pytest.mark.parametrize("mode", ["cached", "live", pytest.param("finetune", marks=pytest.mark.slow)])
def test_predictions_have_the_accuracy_that_evaluate_reports(run, capsys, tmp_path, mode):
    made = run if mode == "cached" else photo_run(tmp_path, mode)
    check_same_accuracy(made, capsys)


def test_predictions_have_the_accuracy_of_a_run_on_upsampled_images(capsys, tmp_path):
    made = photo_run(tmp_path, "cached", (16, 16))
    assert load_run(made).resize.to_json() == {"method": "upsample", "side": 16}
    check_same_accuracy(made, capsys)


def check_same_accuracy(run, capsys):
    scores = json.loads(command(capsys, "evaluate", run, "--json").out)
    summary = json.loads((run / "summary.json").read_text())
    assert scores["test_accuracy"] == summary["val_accuracy"] and scores["num_test"] == 21
    assert scores["test_loss"] == pytest.approx(summary["val_loss"], rel=1e-4)
    result = command(capsys, "predict", run, run.parent / "data" / "test", "--csv")
    found = [row["label"] == row["path"].split(os.sep)[-2] for row in csv.DictReader(io.StringIO(result.out))]
    assert result.code == 0 and len(found) == 21 and sum(found) / 21 == scores["test_accuracy"]
    assert 0.4 < scores["test_accuracy"] < 1  # neither of which a single answer for all would give


def test_folders_stand_for_the_pictures_at_any_depth(run, capsys, pictures):
    assert paths_of(capsys, run, ".") == [f"./{name}" for name in pictures]
    below = ["photos/1.jpg", "photos/deep/3 .webp", "photos/deep/deeper/2.JPG"]
    assert paths_of(capsys, run, "photos", "a b.png") == [*below, "a b.png"]
    assert paths_of(capsys, run, "photos/link") == ["photos/link/linked.png"]  # named, it is followed
    os.mkdir("empty")
    is_one_error(command(capsys, "predict", run, "empty"), 2, "empty is a directory without image files, at any depth")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.png", ["a [1].png", "a b.png", "café.png", "caf\udce9.png"]),
        ("photos/*.jpg", ["photos/1.jpg"]),
        ("photos/*", ["photos/1.jpg", "photos/deep/3 .webp", "photos/deep/deeper/2.JPG"]),
        ("photos/**/*.JPG", ["photos/deep/deeper/2.JPG"]),
        ("**/[12].*", ["photos/1.jpg", "photos/deep/deeper/2.JPG"]),
        ("photos/**", ["photos/1.jpg", "photos/deep/3 .webp", "photos/deep/deeper/2.JPG"]),
        ("a [1].png", ["a [1].png"]),  # the file, although the pattern means `a 1.png`
        ("a [[]1].p?g", ["a [1].png"]),
        (".h*", [".hidden.png"]),
        ("photos/.hidden/*", ["photos/.hidden/4.png"]),
    ],
)
def test_patterns(run, capsys, pictures, pattern, found):
    assert paths_of(capsys, run, pattern) == found
    assert paths_of(capsys, run, os.path.abspath(pattern)) == list(map(os.path.abspath, found))


def test_a_pattern_in_a_folder_with_brackets_in_its_name(run, capsys, pictures):
    os.rename("photos", "photos [2020]")
    assert paths_of(capsys, run, "photos [2020]/*.jpg") == ["photos [2020]/1.jpg"]


@pytest.mark.parametrize("pattern", ["nothing/*.png", "*.bmp", "photos/*.txt", "a**b", "[", "nothing [1].png"])
def test_a_pattern_without_a_match_is_a_file_that_does_not_exist(run, capsys, pictures, pattern):
    result = command(capsys, "predict", run, pattern, "a b.png", "--json")
    assert result.code == 1 and [row["error"] for row in rows(result)] == ["does not exist", None]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\0"])
def test_paths_on_standard_input(run, capsys, monkeypatch, pictures, end):
    """Names stand for themselves there, and folders for the pictures below."""
    listed = [b"a [1].png", b"a b.png", "café.png".encode(), b"caf\xe9.png", b"photos", b"*.png"]
    on_stdin(monkeypatch, end.join(listed) + end)
    result = command(capsys, "predict", run, "-", "photos/1.jpg", "--json")
    below = ["photos/1.jpg", "photos/deep/3 .webp", "photos/deep/deeper/2.JPG"]
    names = ["a [1].png", "a b.png", "café.png", "caf\udce9.png", *below, "*.png", "photos/1.jpg"]
    assert [row["path"] for row in rows(result)] == names
    assert result.code == 1 and [row["path"] for row in rows(result) if row["error"]] == ["*.png"]


def test_names_with_a_line_break_are_separated_by_nul(run, capsys, monkeypatch, pictures):
    os.rename("a b.png", "a\nb.png")
    on_stdin(monkeypatch, b"a\nb.png\0a [1].png")
    assert [row["path"] for row in rows(command(capsys, "predict", run, "-", "--json"))] == ["a\nb.png", "a [1].png"]


def test_an_empty_list_is_refused(run, capsys, monkeypatch):
    on_stdin(monkeypatch, b"\n")
    is_one_error(command(capsys, "predict", run, "-"), 2, "nothing came from there")


def test_csv_quotes_names_and_stays_readable_as_utf8(run, capsys, tmp_path, pictures):
    os.rename("a b.png", 'a "b",\nc.png')
    result = command(capsys, "predict", run, *(name for name in os.listdir() if name.endswith("png")), "--csv")
    found = list(csv.DictReader(io.StringIO(result.out.encode().decode())))
    names = {row["path"] for row in found}
    assert result.code == 0 and {'a "b",\nc.png', "café.png", r"caf\udce9.png", "a [1].png"} < names
    assert set(found[0]) == {"path", "label", "probability", "error", *NAMES}


def test_number_of_classes_in_a_row(run, capsys, pictures):
    for top, shown in (("1", 1), ("2", 2), ("9", 3)):
        result = command(capsys, "predict", run, "a b.png", "--top", top)
        assert result.code == 0 and sum(name in result.out for name in NAMES) == shown
    two = command(capsys, "predict", run, "a b.png", "--top", "2").out
    (row,) = rows(command(capsys, "predict", run, "a b.png", "--json"))
    best, second = sorted(row["probabilities"].items(), key=lambda item: -item[1])[:2]
    assert two == f"a b.png  {best[0]} {best[1]:.3f}  {second[0]} {second[1]:.3f}\n"


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        (["--csv", "--json"], ["--csv and --json ask for two formats; leave one of them out."]),
        (["--top", "0"], ["--top must be at least 1, got 0."]),
        (["--direct"], ["--direct leaves out the reduction", "shorter side to 37 (bilinear), centre crop of 32"]),
    ],
)
def test_options_that_contradict_are_refused(run, capsys, pictures, typed, parts):
    result = command(capsys, "predict", run, "a b.png", *typed)
    is_one_error(result, 2, *parts)
    assert result.out == ""


def test_the_hint_has_the_command_that_was_typed(run, capsys, monkeypatch, pictures):
    for name, program in (("/usr/bin/cifar-jax", "cifar-jax"), ("cifar_jax/__main__.py", "python -m cifar_jax")):
        monkeypatch.setattr(sys, "argv", [name])
        result = command(capsys, "predict", "a b.png", run)
        is_one_error(result, 2, "comes before the images", f"`{program} predict {run} 'a b.png'`")


@pytest.mark.parametrize("shown", ["rows and bar", "bar"])
def test_a_bar_on_the_terminal_leaves_the_rows_alone(run, capsys, many, shown):
    """With standard output in a file the bar goes on; where the rows are shown too, it makes place for them."""
    good = [str(path) for path in many if path.name not in ("007.png", "255.png")]
    plain = command(capsys, "predict", run, *good).out
    out = Console(force_terminal=shown == "rows and bar", width=80, soft_wrap=True, highlight=False)
    err = Console(stderr=True, force_terminal=True, width=80)
    assert predict_command([str(run), *good], ConsoleReporter(out, err)) == 0
    found = capsys.readouterr()
    assert found.out == plain
    counted = re.findall(r"Predicting.*?(\d+)/298", found.err)
    assert counted[0] == "0" and (counted[-1] == "298") == (shown == "bar"), counted
    assert not any(path in found.err for path in good)


def test_a_class_named_like_a_column_has_a_column_of_its_own(capsys):
    prediction = Prediction("a.png", (("error", 0.75), ("ok", 0.25)), "", np.array([0.75, 0.25], np.float32))
    print_predictions(lambda _: (one for one in [prediction]), ["error", "ok"], "csv", ConsoleReporter())
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row == {
        **{"path": "a.png", "label": "error", "probability": "0.75", "error": ""},
        **{"class error": "0.75", "ok": "0.25"},
    }
