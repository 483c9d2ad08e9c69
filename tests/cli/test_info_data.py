"""`info` of a data set: what it prints, warns of and draws."""

import json

import numpy as np
import pytest
from helpers import command, is_one_error
from PIL import Image

from cifar_jax.data.sources.shapes import draw_shapes

COUNTS = {"circle": (44, 3), "ring": (4, 3), "square": (12, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of very different size; one test picture is a training picture too."""
    root, rng = tmp_path_factory.mktemp("data") / "figures", np.random.default_rng(0)
    images, _ = draw_shapes(80, seed=0)
    number = 0
    for name, counts in COUNTS.items():
        for split, count in zip(("train", "test"), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for _ in range(count):
                size = tuple(rng.integers(40, 90, 2).tolist())
                Image.fromarray(np.asarray(images[number])).resize(size).save(root / split / name / f"{number}.png")
                number += 1
    (root / "test" / "circle" / "copy.png").write_bytes((root / "train" / "circle" / "0.png").read_bytes())
    return root


def test_a_folder_is_described_with_counts_warnings_and_a_sheet(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = command(capsys, "info", folder)
    assert result.code == 0
    lines = dict(line.split("  ", 1) for line in result.out.split("\n\n")[0].splitlines())
    facts = {name: text.strip() for name, text in lines.items()}
    assert facts["data"] == "figures" and facts["classes"] == "3"
    assert facts["images"] == "60 training, 10 test images"
    assert facts["at 224 pixels"] == "shorter side to 256 (bilinear), centre crop of 224"
    table = [line.split("\t") for line in result.out.split("\n\n")[1].splitlines()]
    assert table == [["class", "training", "test"], ["circle", "44", "4"], ["ring", "4", "3"], ["square", "12", "3"]]
    shared, imbalanced, few = result.err.splitlines()
    assert shared.startswith("Warning: 1 of 10 test images are identical") and "test/circle/copy.png" in shared
    assert "44 training images of circle, 4 of ring" in imbalanced and "--class-weights balanced" in imbalanced
    assert few.startswith("Warning: Fewer than 10 training images of ring (4);")
    assert facts["contact sheet"] == "figures-contact-sheet.png, training images"
    with Image.open(tmp_path / "figures-contact-sheet.png") as sheet:
        assert sheet.width > 8 * 128 and 3 * 128 < sheet.height < 4 * 128


def test_json_has_the_counts_and_leaves_no_sheet_unless_asked_for(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    about = json.loads(command(capsys, "info", folder, "--json").out)
    assert about["name"] == "figures" and about["images"] == {"training": 60, "test": 10}
    assert about["classes"]["ring"] == {"training": 4, "test": 3} and len(about["warnings"]) == 3
    assert list(tmp_path.iterdir()) == []
    sheets = [tmp_path / f"{name}.png" for name in ("one", "same", "other")]
    for path, seed in zip(sheets, ("1", "1", "2"), strict=True):
        assert command(capsys, "info", folder, "--json", "--sheet", path, "--seed", seed).code == 0
    one, same, other = (path.read_bytes() for path in sheets)
    assert one == same != other


def test_many_classes_are_cut_to_the_largest_and_smallest(tmp_path, capsys):
    labels = np.repeat(np.arange(40), np.arange(11, 51))
    images = np.zeros((len(labels), 8, 8), np.uint8)
    file = tmp_path / "many.npz"
    np.savez(file, train_images=images, train_labels=labels, test_images=images[:40], test_labels=np.arange(40))
    result = command(capsys, "info", file, "--sheet", tmp_path / "sheet.png")
    rows = [line.split("\t") for line in result.out.split("\n\n")[1].splitlines()[1:]]
    assert [row[0] for row in rows] == ["39", "38", "37", "36", "35", "... 30 more", "4", "3", "2", "1", "0"]
    assert rows[0] == ["39", "50", "1"] and rows[5] == ["... 30 more", "", ""]


def test_what_is_neither_topic_nor_data_set_is_refused_with_the_topics(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    topics = "info takes all, environment, weights, data, devices, cache, or a data set: a folder of pictures"
    is_one_error(command(capsys, "info", "wieghts"), 2, "no topic or data set 'wieghts'. Did you mean weights?", topics)
    (tmp_path / "notes.txt").write_text("notes")
    is_one_error(command(capsys, "info", tmp_path / "notes.txt"), 2, "is a file, but not an .npz file", topics)
    (tmp_path / "empty").mkdir()
    is_one_error(command(capsys, "info", tmp_path / "empty"), 2, "has no folders of pictures")
    is_one_error(command(capsys, "info", "--sheet", "x.png"), 2, "--sheet goes with a data set")


def test_a_sheet_that_cannot_be_written_is_one_error(folder, tmp_path, capsys):
    missing = tmp_path / "none" / "sheet.png"
    is_one_error(command(capsys, "info", folder, "--sheet", missing), 2, str(missing), "name another file with --sheet")


def test_a_topic_wins_over_a_folder_of_the_same_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "devices").mkdir()
    monkeypatch.chdir(tmp_path)
    assert command(capsys, "info", "devices").out.splitlines()[0].startswith("device\t")
