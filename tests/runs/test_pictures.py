"""Runs on folders of pictures: all modes, the same bits after a kill, features kept by content, bad pictures named."""

import json
import os
import shutil
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from helpers import FIELDS, Killed, Silent, flip_bit, kill_at, rows_of, summary_of, write_pictures_folder
from PIL import Image

from cifar_jax import load_run
from cifar_jax.config import TrainConfig
from cifar_jax.errors import UserError
from cifar_jax.experiment import train
from cifar_jax.runs.predict import predict_files
from cifar_jax.runs.scores import evaluate_run

COUNTS = {"cats": 30, "dogs": 20}
MODES = {
    "cached": {"val_fraction": 0.25, "batch_size": 8},
    "live": {"mode": "live", "augment": ("flip", "crop"), "batch_size": 16},
    "finetune": {"mode": "finetune", "augment": ("flip", "crop", "cutout"), "momentum": 0.9, "batch_size": 16},
}

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return write_pictures_folder(tmp_path_factory.mktemp("data") / "pets", COUNTS)


def run_job(out, pets, mode="cached", reporter=None, **more):
    usual = {
        **{"dataset": str(pets), "epochs": 3, "hidden": (8,), "learning_rate": 0.1, "out": str(out)},
        "cache_dir": str(out.parent / "cache"),
    }
    return train(TrainConfig(**usual | MODES[mode] | more), reporter, backbone=FIELDS)


class KillInExtraction(Silent):
    """Ends a run like kill -9 when some features of the training images are there."""

    @contextmanager
    def progress(self, description, total, compiles=False):
        def update(done):
            if description.startswith("Features") and done >= 16:
                raise Killed

        yield update


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, pets):
    """A finished run of a mode, made once."""
    root = tmp_path_factory.mktemp("undisturbed")
    return lambda mode: root / mode if (root / mode).exists() else run_job(root / mode, pets, mode)


def assert_same_bits(a, b):
    assert rows_of(a) == rows_of(b)
    heads = [load_run(run, backbone=FIELDS).head_params for run in (a, b)]
    for x, y in zip(*map(jax.tree.leaves, heads), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("mode", MODES)
def test_learns_colours_in_every_mode_and_remembers_the_resize(undisturbed, mode):
    run = undisturbed(mode)
    summary = summary_of(run)
    resize = {"method": "eval-transform", "side": 32, "shorter": 32, "interpolation": "bilinear"}
    assert summary["resize"] == resize and load_run(run, backbone=FIELDS).resize.to_json() == resize
    assert summary["val_accuracy"] == 1.0  # red cats and green dogs
    assert (summary["num_train"] + summary["num_test"] + summary["num_val"]) == (50 if mode == "cached" else 60)
    assert json.loads((run / "config.json").read_text())["test_fraction"] == 0.2


@pytest.mark.parametrize(
    ("mode", "reporter", "every"),
    [
        ("cached", KillInExtraction(), None),
        ("cached", kill_at(2), None),
        ("live", kill_at(2, 16), 1),
        ("finetune", kill_at(2, 32), 1),
        ("finetune", kill_at(1), None),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, pets, undisturbed, mode, reporter, every):
    with pytest.raises(Killed):
        run_job(tmp_path / "run", pets, mode, reporter, checkpoint_every=every)
    # Its files may have moved and been touched in the meantime: their contents count.
    moved = shutil.copytree(pets, tmp_path / "moved")
    for path in moved.rglob("*.png"):
        os.utime(path, (1, 1))
    # Test images are drawn from the same order of names.
    run_job(tmp_path / "run", moved, mode, resume=True)
    assert_same_bits(tmp_path / "run", undisturbed(mode))


def test_a_changed_picture_is_noticed_when_a_run_is_resumed(tmp_path, pets):
    changing = shutil.copytree(pets, tmp_path / "pets")
    with pytest.raises(Killed):
        run_job(tmp_path / "run", changing, reporter=kill_at(1))
    shutil.copy(changing / "cats/1.png", changing / "cats/0.png")
    with pytest.raises(UserError, match=r"its .* images have changed"):
        run_job(tmp_path / "run", changing, resume=True)


def test_features_are_kept_by_content(tmp_path, pets, log_messages):
    root = shutil.copytree(pets, tmp_path / "pets")
    extracted = []
    for change in ("none", "name", "date", "picture"):
        if change == "name":
            root = root.rename(tmp_path / "animals")
        if change == "date":
            os.utime(root / "cats/0.png", (1, 1))
        if change == "picture":
            picture = Image.open(root / "dogs/3.png")
            picture.putpixel((0, 0), (1, 2, 3))
            picture.save(root / "dogs/3.png")
        run_job(tmp_path / f"run-{change}", root, epochs=1)
        extracted.append(summary_of(tmp_path / f"run-{change}")["images_per_second"] is not None)
    assert extracted == [True, False, False, True]


def test_a_corrupt_chunk_of_features_is_computed_again(tmp_path, pets, undisturbed, log_messages):
    run_job(tmp_path / "one", pets, epochs=1)
    for chunk in (tmp_path / "cache/features").rglob("c/0/0"):
        flip_bit(chunk)
    run_job(tmp_path / "two", pets)
    assert any("corrupt" in message for message in log_messages)
    assert_same_bits(tmp_path / "two", undisturbed("cached"))


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_that_breaks_during_a_run_is_named(tmp_path, pets, mode):
    root = shutil.copytree(pets, tmp_path / "pets")

    class Breaks(Silent):
        def header(self, rows):
            for path in root.rglob("*.png"):
                path.write_bytes(b"broken")

    with pytest.raises(UserError, match=r"pets/\w+/\d+\.png has changed since the data set was listed"):
        run_job(tmp_path / "run", root, mode, Breaks())


def test_evaluation_and_prediction_agree(tmp_path, pets, undisturbed):
    run = load_run(undisturbed("cached"), backbone=FIELDS)
    scores = evaluate_run(run.path, backbone=FIELDS)
    assert scores["test_accuracy"] == 1.0
    top = [prediction.top[0][0] for prediction in predict_files(run, [pets / "cats/0.png", pets / "dogs/0.png"])]
    assert top == ["cats", "dogs"]


def test_unreadable_files_are_left_out_and_listed(tmp_path, pets):
    root = shutil.copytree(pets, tmp_path / "pets")
    (root / "cats/0.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"cats/0\.png .* --skip-unreadable"):
        run_job(tmp_path / "run", root)
    run_job(tmp_path / "run", root, skip_unreadable=True, epochs=1)
    summary = summary_of(tmp_path / "run")
    assert summary["num_train"] + summary["num_val"] + summary["num_test"] == 49
    assert summary["dataset"]["skipped"] == [str(root / "cats/0.png")]


def test_an_npz_file_trains(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = (rng.integers(0, 60, (60, 28, 28)) + 90 * labels[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "tones.npz", train_images=images, train_labels=labels[:, None].astype(np.uint8))
    run_job(tmp_path / "run", tmp_path / "tones.npz", batch_size=8)
    summary = summary_of(tmp_path / "run")
    assert summary["dataset"]["class_names"] == ["0", "1", "2"] and summary["resize"]["method"] == "eval-transform"
    assert summary["val_accuracy"] > 0.5


def test_pictures_that_moved_are_still_the_run_s_own(tmp_path, pets, undisturbed):
    moved = shutil.copytree(pets, tmp_path / "moved")
    own = evaluate_run(undisturbed("cached"), backbone=FIELDS)
    there = evaluate_run(undisturbed("cached"), dataset=str(moved), backbone=FIELDS)
    assert (there["split"], there["num_test"]) == ("test", 10) and there["test_loss"] == own["test_loss"]


def test_scoring_on_training_images_is_warned_of(tmp_path, pets, undisturbed, log_messages):
    more = shutil.copytree(pets, tmp_path / "more")
    shutil.copy(more / "cats/1.png", more / "cats/more.png")
    scores = evaluate_run(undisturbed("cached"), dataset=str(more), backbone=FIELDS)
    assert (scores["split"], scores["num_test"]) == ("all", 51)
    assert any("scored images are identical to training images" in message for message in log_messages)


def test_a_run_that_failed_before_it_trained_may_be_replaced(tmp_path, pets):
    root = shutil.copytree(pets, tmp_path / "pets")
    whole = (root / "cats/3.png").read_bytes()
    (root / "cats/3.png").write_bytes(whole[:-60])
    with pytest.raises(UserError, match=r"cats/3\.png cannot be read .* --skip-unreadable"):
        run_job(tmp_path / "run", root)
    run_job(tmp_path / "run", root, skip_unreadable=True)
    with pytest.raises(UserError, match="already holds a run"):
        run_job(tmp_path / "run", root, skip_unreadable=True)
