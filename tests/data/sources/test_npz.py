"""Tests of .npz files as data sets, laid out as MedMNIST's."""

import pickle
import zipfile

import numpy as np
import pytest
from helpers import refusal

from cifar_jax.data import load_splits
from cifar_jax.data.dataset import Dataset
from cifar_jax.data.pictures import Pictures, resized
from cifar_jax.data.resize import Resize
from cifar_jax.data.sources.npz import load_npz

COUNTS = {"train": 24, "val": 8, "test": 12}


def arrays(side=28, channels=(3,), classes=4, counts=COUNTS):
    """Arrays as MedMNIST has them: uint8 images, and uint8 labels in a column."""
    rng = np.random.default_rng(0)
    return {
        f"{split}_{name}": values
        for split, count in counts.items()
        for name, values in (
            ("images", rng.integers(0, 256, (count, side, side, *channels), np.uint8)),
            ("labels", (np.arange(count) % classes).astype(np.uint8)[:, None]),
        )
    }


@pytest.fixture
def write(tmp_path):
    """Writes `blood.npz` of MedMNIST's arrays with changes, None for one that is left out, and returns its path."""

    def write_file(save=np.savez, changes=None, **shape):
        found = arrays(**shape) | (changes or {})
        save(tmp_path / "blood.npz", **{name: values for name, values in found.items() if values is not None})
        return tmp_path / "blood.npz"

    return write_file


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("side", [28, 224])
def test_rgb_images(write, save, side, log_messages):
    splits = load_splits(str(write(save, side=side)))
    expected = arrays(side)
    for split, part in splits.parts.items():
        np.testing.assert_array_equal(part.images, expected[f"{split}_images"])
        np.testing.assert_array_equal(part.labels, expected[f"{split}_labels"][:, 0])
        assert part.labels.dtype == np.int32
    assert (splits.class_names, splits.name, splits.version) == (("0", "1", "2", "3"), "blood", "")
    assert set(splits.parts) == {"train", "test", "val"} and splits.notes == () and log_messages == []


@pytest.mark.parametrize("channels", [(), (1,)])
@pytest.mark.parametrize("side", [28, 65, 224])
def test_grey_images_become_rgb(write, side, channels):
    splits = load_splits(str(write(side=side, channels=channels)))
    grey = arrays(side, channels)["train_images"].reshape(-1, side, side, 1)
    images = resized(splits.train.images, Resize("eval-transform", side, side))
    assert images.shape == (24, side, side, 3)
    np.testing.assert_array_equal(images[np.arange(24)], np.repeat(grey, 3, axis=3))
    # Large ones get their channels when they are read.
    assert isinstance(splits.train.images, Pictures) == (side > 64)
    some = splits.train.take(np.array([5, 3]))
    np.testing.assert_array_equal(
        resized(some.images, Resize("eval-transform", side, side))[0], np.repeat(grey[5], 3, axis=2)
    )
    assert splits.train.digests() == load_splits(str(write(side=side, channels=channels))).train.digests()
    other = Dataset(splits.train.images, splits.train.labels).take(np.arange(1, 24))
    assert other.digests().images != splits.train.digests().images


def without(*splits):
    return {f"{split}_{name}": None for split in splits for name in ("images", "labels")}


def test_without_test_images(write):
    path = write(changes=without("test"))
    splits = load_splits(str(path))
    assert splits.val is None and len(splits.test.labels) == COUNTS["val"]
    assert splits.notes == ("tested on its validation images, as it has no test images",)
    path = write(changes=without("test", "val"))
    splits = load_splits(str(path), test_fraction=0.25)
    assert (len(splits.train.labels), len(splits.test.labels)) == (18, 6)
    assert splits.notes == ("no test images of its own: 6 of 24 held out (--test-fraction)",)


def test_empty_splits_count_as_missing(write):
    empty = {"test_images": np.zeros((0, 28, 28, 3), np.uint8), "test_labels": np.zeros((0, 1), np.uint8)}
    assert len(load_splits(str(write(changes=empty))).test.labels) == COUNTS["val"]
    empty = {name.replace("test", "train"): values for name, values in empty.items()}
    assert "has no training images: its train_images are empty." in refusal(write(changes=empty))


def test_unused_class_numbers_are_named(write, log_messages):
    labels = np.array([0, 1, 5, 7] * 6, np.uint8)[:, None]
    splits = load_splits(str(write(changes={"train_labels": labels})))
    assert splits.class_names == tuple("01234567")
    assert log_messages == ["blood has no training images of the classes 2, 3, 4, 6."]


def test_classes_of_test_images_alone_are_named(write, log_messages):
    labels = np.array([0, 1, 4] * 4)
    assert len(load_splits(str(write(changes={"test_labels": labels}))).class_names) == 5
    assert log_messages == ["blood has no training images of class 4."]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"train_labels": None}, "lacks train_labels; it must have the arrays train_images and train_labels, and may"),
        (without("train"), "It has test_images, test_labels, val_images, val_labels."),
        ({"test_labels": None}, "has test_images, but lacks test_labels; it must have"),
        ({"val_images": None}, "has val_labels, but lacks val_images; it must have"),
        ({"train_labels": np.zeros((24, 14), np.uint8)}, "have 14 labels an image; only one class an image"),
        ({"train_labels": np.zeros(23, np.uint8)}, "has 24 train_images but 23 train_labels."),
        ({"test_labels": np.zeros((13, 1), np.uint8)}, "has 12 test_images but 13 test_labels."),
        ({"train_labels": np.zeros(24)}, "are float64 [24]; expected whole numbers [n] or [n, 1]."),
        ({"train_labels": np.array(["cat"] * 24)}, "are <U3 [24]; expected whole numbers"),
        ({"train_labels": np.full(24, -1)}, "are in -1..-1; expected class numbers from 0"),
        ({"train_labels": np.full(24, 2**40)}, "expected class numbers from 0, below 65,536."),
        ({f"{split}_labels": np.zeros(count, int) for split, count in COUNTS.items()}, "there is a single class"),
        ({"train_images": np.zeros((24, 28, 28, 3), np.float32)}, "from 0 to 255."),
        ({"train_images": np.zeros((24, 28, 28, 3), np.float32)}, "are float32 [24, 28, 28, 3]; expected uint8"),
        ({"train_images": np.zeros((24, 28, 28, 28), np.uint8)}, "are uint8 [24, 28, 28, 28]; expected uint8 [n, h"),
        ({"train_images": np.zeros((24, 784), np.uint8)}, "are uint8 [24, 784]; expected"),
        ({"train_images": np.zeros((24, 0, 28), np.uint8)}, "are uint8 [24, 0, 28]; expected"),
        ({"train_images": np.array([None] * 24)}, "has arrays of Python objects, which are not unpickled; save"),
        ({"test_labels": np.array(["a", 1] * 6, object)}, "has arrays of Python objects, which are not unpickled"),
    ],
)
def test_unsuitable_arrays_are_refused(write, changes, part):
    assert part in refusal(write(changes=changes))


class Bomb:
    def __reduce__(self):
        return print, ("unpickled",)


def test_pickles_are_not_run(tmp_path, write, capsys):
    refusal(write(changes={"train_images": np.array([Bomb()] * 24)}))
    (tmp_path / "blood.npz").write_bytes(pickle.dumps(Bomb()))
    assert "is not an .npz file, or is cut short" in refusal(tmp_path / "blood.npz")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda path: path.write_text("no zip"), "is not an .npz file, or is cut short"),
        (lambda path: path.write_bytes(b""), "is not an .npz file, or is cut short"),
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), "is not an .npz file, or is cut short"),
        (
            lambda path: np.save(path.with_suffix(".npy"), np.zeros(3)) or path.with_suffix(".npy").replace(path),
            "is not an .npz file, or is cut short",
        ),
        (lambda path: flip(path, 5000), "cannot be read as an .npz file ("),
        (lambda path: flip(path, 70), "cannot be read as an .npz file ("),
        (lambda path: zipfile.ZipFile(path, "w").writestr("notes.txt", "none"), "It has notes.txt."),
        (lambda path: zipfile.ZipFile(path, "w").close(), "It has no arrays at all."),
    ],
    ids=["text", "empty", "truncated", "npy", "flipped", "flipped header", "other zip", "empty zip"],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_corrupt_files_are_refused(write, save, damage, part):
    path = write(save)
    damage(path)
    assert part in refusal(path)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def test_options_of_other_kinds_are_refused(write):
    assert "--label-key x names a label of a TFDS set" in refusal(write(), label_key="x")
    assert "--skip-unreadable leaves out files of a folder" in refusal(write(), skip_unreadable=True)


def test_arrays_are_read_as_they_are(write):
    """Rows keep the order of the file, which TFDS sets do not."""
    splits = load_npz(write(channels=()))
    assert splits.train.labels.tolist() == [0, 1, 2, 3] * 6


def test_single_numbers_are_refused(tmp_path):
    np.savez(tmp_path / "numbers.npz", train_images=np.uint8(3), train_labels=np.uint8(1))
    assert "single numbers in place of train_images" in refusal(tmp_path / "numbers.npz")
