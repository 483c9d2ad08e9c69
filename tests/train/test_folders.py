"""Runs on small folders of pictures: the header, warnings, random crops that resume, and steps larger than the set."""

import jax
import numpy as np
import pytest
from helpers import FIELDS, Killed, Silent, kill_at, rows_of, summary_of
from PIL import Image

from cifar_jax import load_run
from cifar_jax.config import TrainConfig
from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.experiment import train


class Heard(Silent):
    """A reporter that keeps the header."""

    rows: dict[str, str]

    def header(self, rows):
        self.rows = rows


def draw_folder(root, **splits):
    """Draws pictures of 50 to 90 pixels: `split=[number of each class]`; returns the folder."""
    rng, number = np.random.default_rng(0), 0
    images, _ = draw_shapes(sum(map(sum, splits.values())), seed=0)
    for split, counts in splits.items():
        for name, count in zip(("ape", "bee", "cow"), counts, strict=False):
            (root / split / name).mkdir(parents=True)
            for _ in range(count):
                size = tuple(rng.integers(50, 90, 2).tolist())
                Image.fromarray(np.asarray(images[number])).resize(size).save(root / split / name / f"{number}.png")
                number += 1
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty training images and eight test images."""
    return draw_folder(tmp_path_factory.mktemp("data") / "animals", train=[10, 10], test=[4, 4])


def config(folder, out, **options):
    usual = {"epochs": 2, "hidden": (8,), "learning_rate": 0.1, "weights": "random-w16"}
    return TrainConfig(**usual | {"dataset": str(folder), "out": str(out), "cache_dir": str(out.parent)} | options)


def header_of(folder, out, **options):
    heard = Heard()
    train(config(folder, out, epochs=1, **options), heard, backbone=FIELDS)
    return heard.rows


def test_the_header_says_what_was_found_and_what_is_done_with_it(folder, tmp_path, narrow):
    (folder / "train" / "ape" / "notes.txt").touch()
    rows = header_of(folder, tmp_path / "run")
    assert rows["data"].startswith("animals: 2 classes (ape, bee), 20 training, 8 test images, 5")
    assert rows["data"].endswith(" pixels") and "val_ figures" not in rows
    assert rows["resize"] == "shorter side to 32 (bilinear), centre crop of 32"
    assert rows["validation"] == "test images, as in the notebook (hold some out with --val-fraction)"
    assert "ignored" in rows["notes"]
    assert list(rows)[:4] == ["data", "resize", "notes", "validation"]
    rows = header_of(folder, tmp_path / "held", val_fraction=0.25)
    assert "15 training, 5 held-out, 8 test images" in rows["data"]
    assert rows["validation"] == "held-out training images"
    rows = header_of("shapes", tmp_path / "shapes", train_examples=40, test_examples=20)
    assert rows["data"].startswith("shapes 1.0.0: 10 classes") and rows["data"].endswith("32x32 pixels")
    assert rows["resize"] == "as they are" and "notes" not in rows


def test_validation_images_of_its_own_are_named_so(tmp_path, narrow):
    root = draw_folder(tmp_path / "animals", train=[10, 10], test=[2, 2], val=[3, 3])
    rows = header_of(root, tmp_path / "run")
    assert "20 training, 6 validation, 4 test images" in rows["data"]
    assert rows["validation"] == "the data set's own validation images"


def test_uneven_and_small_classes_are_warned_of_once(tmp_path, narrow, log_messages):
    root = draw_folder(tmp_path / "animals", train=[44, 4, 12], test=[2, 2, 2])
    (root / "test" / "cow" / "again.png").write_bytes(next((root / "train" / "cow").iterdir()).read_bytes())
    header_of(root, tmp_path / "run")
    parts = "44 training images of ape, 4 of bee", "images of bee (4)", "test/cow/again.png"
    assert [sum(part in message for message in log_messages) for part in parts] == [1, 1, 1]
    log_messages.clear()
    header_of(root, tmp_path / "weighted", class_weights="balanced")
    assert [sum(part in message for message in log_messages) for part in parts] == [0, 1, 1]


@pytest.mark.parametrize("mode", ["cached", "live", "finetune"])
def test_a_step_larger_than_the_training_set_is_one_of_all_its_images(folder, tmp_path, narrow, mode):
    heard, rows, params = Heard(), {}, {}
    for batch_size in (20, 64):
        out = tmp_path / str(batch_size)
        train(config(folder, out, mode=mode, batch_size=batch_size), heard)
        rows[batch_size], params[batch_size] = rows_of(out), load_run(out).head_params
        summary = summary_of(out)
        assert (summary["status"], summary["num_train"], summary["num_test"]) == ("complete", 20, 8)
        assert f"batch {batch_size}" in heard.rows["training"] and "20 training" in heard.rows["data"]
    for one, other in zip(rows[64], rows[20], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), params[64], params[20])


def test_random_crops_resume_to_the_same_bits_within_an_epoch(folder, tmp_path, narrow):
    options = {"mode": "live", "batch_size": 8, "augment": ("random-resized-crop", "flip", "color-jitter")}
    options |= {"checkpoint_every": 1, "epochs": 3}
    whole = train(config(folder, tmp_path / "whole", **options), backbone=FIELDS)
    killed = config(folder, tmp_path / "killed", **options)
    with pytest.raises(Killed):
        train(killed, kill_at(2, 16), backbone=FIELDS)
    train(config(folder, tmp_path / "killed", **options, resume=True), backbone=FIELDS)
    assert rows_of(tmp_path / "killed") == rows_of(whole)
    runs = [load_run(tmp_path / name, backbone=FIELDS).head_params for name in ("whole", "killed")]
    jax.tree.map(np.testing.assert_array_equal, *runs)
    train(config(folder, tmp_path / "plain", **options | {"augment": ()}), backbone=FIELDS)
    assert rows_of(tmp_path / "plain")[0]["train_loss"] != rows_of(whole)[0]["train_loss"]


@pytest.mark.parametrize("mode", ["live", "finetune"])
def test_small_squares_are_cropped_in_the_step(tmp_path, narrow, mode):
    """Two runs agree to the bit."""
    options = {"mode": mode, "train_examples": 40, "test_examples": 20, "augment": ("random-resized-crop",)}
    runs = [train(config("shapes", tmp_path / name, **options), backbone=FIELDS) for name in ("one", "two")]
    assert rows_of(runs[0]) == rows_of(runs[1])


def test_an_augmentation_of_ones_own_is_given_the_images_of_the_evaluation(folder, tmp_path, narrow):
    seen = []

    def own(key, batch):
        seen.append(batch.inputs.shape)
        return batch

    options = {"mode": "live", "augment": ("random-resized-crop",), "batch_size": 20}
    same = [
        train(config(folder, tmp_path / "own", **options), backbone=FIELDS, augment=own),
        train(config(folder, tmp_path / "none", **options | {"augment": ()}), backbone=FIELDS),
    ]
    assert set(seen) == {(20, 32, 32, 3)} and rows_of(same[0]) == rows_of(same[1])
