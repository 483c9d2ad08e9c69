"""Tests of `evaluate`: a run's own test images, other labelled pictures, and what a person reads."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers import command, is_one_error, tiny_run, write_tfds
from photos import CLASSES, draw_folder, photo_run, quick_run
from PIL import Image

from cifar_jax import load_run
from cifar_jax.data.sources.shapes import draw_shapes

OTHER_CLASSES = {"square": "[square]", "cross": "Käfer"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on photos, which are resized by the weights' evaluation transform."""
    return photo_run(tmp_path_factory.mktemp("photos"), "cached")


@pytest.fixture(scope="module")
def upsampled(tmp_path_factory):
    """A run on squares of 16 pixels, which are upsampled."""
    return photo_run(tmp_path_factory.mktemp("squares"), "cached", (16, 16))


def scores(capsys, *arguments):
    result = command(capsys, "evaluate", *arguments, "--json")
    assert result.code == 0 and result.err == "", result
    return json.loads(result.out)


def test_own_test_images_and_a_copy_of_them_have_one_score(run, capsys, tmp_path):
    own = scores(capsys, run)
    assert set(own) == {
        *("run", "dataset", "split", "resize", "test_loss", "test_accuracy", "test_accuracy_interval_95", "num_test"),
        *("test_class_accuracy", "test_class_count"),
    }
    assert (own["split"], own["num_test"], set(own["test_class_count"].values())) == ("test", 21, {7})
    copy = shutil.copytree(run.parent / "data", tmp_path / "copy")
    divided, whole = scores(capsys, run, "--dataset", copy), scores(capsys, run, "--dataset", copy / "test")
    assert (divided["split"], whole["split"], divided["dataset"]) == ("test", "all", str(copy))
    (copy / "test").rename(copy / "val")
    renamed = scores(capsys, run, "--dataset", copy)
    assert renamed["split"] == "test"  # the pictures are those of the run
    for other in (divided, whole, renamed):
        assert {k: v for k, v in other.items() if k not in ("dataset", "split")} == {
            k: v for k, v in own.items() if k not in ("dataset", "split")
        }


def test_validation_images_are_scored_where_there_are_no_test_images(run, capsys, tmp_path):
    copy = shutil.copytree(run.parent / "data", tmp_path / "copy")
    (copy / "test").rename(copy / "val")
    name = next((copy / "val").iterdir())
    shutil.copy(next(name.iterdir()), name / "once-more.png")
    other = scores(capsys, run, "--dataset", copy)
    assert (other["split"], other["num_test"]) == ("val", 22)


def test_classes_are_matched_by_name_whatever_their_order(run, capsys, tmp_path):
    """Without one of the classes, the others have other labels than in the run."""
    folder = draw_folder(tmp_path / "other", 7, 1, OTHER_CLASSES)
    loaded, own, other = load_run(run), scores(capsys, run), scores(capsys, run, "--dataset", folder)
    assert loaded.class_names == ("Käfer", "[square]", "disc, filled")
    assert other["num_test"] == 14 and other["test_class_count"] == {"Käfer": 7, "[square]": 7, "disc, filled": 0}
    assert other["test_class_accuracy"] == own["test_class_accuracy"] | {"disc, filled": None}
    plain = command(capsys, "evaluate", run, "--dataset", folder).out
    assert re.search(r"^no images of +disc, filled$", plain, re.MULTILINE)
    assert [line.split("\t")[0] for line in plain.splitlines()[-2:]] == ["Käfer", "[square]"]

    # Exchanged names exchange what is right; a number before a name would make it another class.
    swapped = draw_folder(tmp_path / "swapped", 7, 1, {"square": "Käfer", "cross": "[square]"})
    assert scores(capsys, run, "--dataset", swapped)["test_accuracy"] == share_right(loaded, swapped)
    (swapped / "Käfer").rename(swapped / "1 Käfer")
    is_one_error(command(capsys, "evaluate", run, "--dataset", swapped), 2, "has images of 1 Käfer, which the run")


def share_right(run, folder):
    """The share of the pictures in folders of classes that are predicted as their folder's name."""
    paths = sorted(folder.glob("*/*.png"))
    names = run.predict(paths).class_names
    return pytest.approx(np.mean([path.parent.name == name for path, name in zip(paths, names, strict=True)]))


def test_a_single_class_can_be_scored(run, capsys, tmp_path):
    folder = draw_folder(tmp_path / "crosses", 7, 1, {"cross": "Käfer"})
    other = scores(capsys, run, "--dataset", folder)
    assert other["test_accuracy"] == scores(capsys, run)["test_class_accuracy"]["Käfer"] and other["num_test"] == 7


def test_classes_that_the_run_does_not_know_are_named(run, capsys, tmp_path):
    folder = draw_folder(tmp_path / "rings", 2, 1, CLASSES | {"ring": "rings", "triangle": "triangles"})
    is_one_error(
        command(capsys, "evaluate", run, "--dataset", folder),
        2,
        f"{folder} has images of rings, triangles, which the run in {run} does not know",
        "it knows Käfer, [square], disc, filled.",
    )


def test_pictures_of_another_size_are_reduced_to_those_of_the_run(upsampled, capsys, tmp_path):
    folder = draw_folder(tmp_path / "large", 7, 1, CLASSES, (100, 80))
    other = scores(capsys, upsampled, "--dataset", folder)
    assert other["resize"] == "100x80 pixels, reduced to 16x16 as the training images, upsampled 2x (nearest)"
    assert scores(capsys, upsampled)["resize"] == "upsampled 2x (nearest)"
    assert other["test_accuracy"] == share_right(load_run(upsampled), folder)


def test_arrays_in_an_npz_file_are_scored_by_a_run_on_another(capsys, tmp_path):
    """The other has bare numbers of classes too, but not all of them, and images of another size."""
    images, labels = draw_shapes(200, seed=0)
    arrays = {"train_images": images[:150], "train_labels": labels[:150]}
    np.savez(tmp_path / "one.npz", **arrays, test_images=images[150:], test_labels=labels[150:])
    run = quick_run(tmp_path, tmp_path / "one.npz", "--resize", "eval-transform")
    some = labels[150:] < 4
    large = images[150:][some].repeat(2, axis=1).repeat(2, axis=2)
    np.savez(tmp_path / "other.npz", train_images=large, train_labels=labels[150:][some])
    other = scores(capsys, run, "--dataset", tmp_path / "other.npz")
    found = load_run(run).predict(large)
    assert other["split"] == "all" and other["num_test"] == some.sum()
    assert other["test_accuracy"] == pytest.approx(np.mean(found.labels == labels[150:][some]))
    assert [name for name, count in other["test_class_count"].items() if count] == ["0", "1", "2", "3"]


@pytest.mark.slow  # draws 10,000 images
def test_synthetic_images_are_scored_and_a_tfds_set_with_other_classes_is_not(capsys, tmp_path, tmp_path_factory):
    run = tiny_run(tmp_path_factory).path
    other = scores(capsys, run, "--dataset", "shapes")
    assert (other["dataset"], other["split"], other["num_test"]) == ("shapes", "test", 10_000)
    write_tfds(tmp_path)
    result = command(capsys, "evaluate", run, "--dataset", "tiny", "--data-dir", tmp_path)
    is_one_error(result, 2, "tiny has images of class 0, class 1, class 2, class 3, class 4 and 5 more, which the run")


def test_what_a_person_reads(run, capsys):
    result, found = command(capsys, "evaluate", run), scores(capsys, run)
    low, high = (100 * bound for bound in found["test_accuracy_interval_95"])
    accuracy = f"{100 * found['test_accuracy']:.1f} % on 21 images, 95 % interval {low:.1f} to {high:.1f} %"
    assert result.out.splitlines() == [
        f"run       {run}",
        f"images    21 test images of {run.parent / 'data'}",
        "resize    shorter side to 37 (bilinear), centre crop of 32",
        f"accuracy  {accuracy}",
        f"loss      {found['test_loss']:.4g}",
        "",
        "class\taccuracy\timages",
        *(f"{name}\t{100 * value:.1f} %\t7" for name, value in found["test_class_accuracy"].items()),
    ]


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("--skip-unreadable", ["--skip-unreadable goes with --dataset"]),
        ("--label-key label", ["--label-key label goes with --dataset"]),
        ("--dataset nothing/here", ["nothing/here does not exist"]),
        ("--dataset shapes --label-key label", ["--label-key label names a label of a TFDS set, which shapes is not"]),
    ],
)
def test_invalid_arguments_are_refused(run, capsys, typed, parts):
    is_one_error(command(capsys, "evaluate", run, *typed.split()), 2, *parts)


def test_unreadable_files_can_be_left_out(run, capsys, tmp_path):
    copy = shutil.copytree(run.parent / "data" / "test", tmp_path / "copy")
    (copy / "Käfer" / "0.png").write_text("a letter")
    is_one_error(command(capsys, "evaluate", run, "--dataset", copy), 2, "0.png is not a readable image")
    result = command(capsys, "evaluate", run, "--dataset", copy, "--skip-unreadable")
    assert result.code == 0 and "on 20 images" in result.out and "Skipped 1 files" in result.err


def test_own_images_are_resized_as_they_were_recorded(run, capsys, tmp_path):
    """Not as the options would resize them now, which the defaults of another version may differ in."""
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"interpolation": "nearest"}))
    assert scores(capsys, copy) | {"run": ""} == scores(capsys, run) | {"run": ""}


def test_a_run_from_before_the_resize_was_recorded_is_one_of_upsampled_images(capsys, tmp_path):
    """Its images of 32 pixels give the same scores, and other pictures are reduced to 32."""
    run = photo_run(tmp_path, "cached", (32, 32))
    before = scores(capsys, run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary.pop("resize") == {"method": "upsample", "side": 32}
    (run / "summary.json").write_text(json.dumps(summary))
    assert scores(capsys, run) == before
    Image.new("RGB", (90, 70)).save(tmp_path / "large.png")
    assert load_run(run).predict([tmp_path / "large.png"]).errors == ("",)
