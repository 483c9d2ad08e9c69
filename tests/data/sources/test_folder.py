"""Tests of folders of pictures as data sets: what is found, in which order, and what is refused."""

import os
import shutil
import struct
import threading
import zlib

import numpy as np
import pytest
from helpers import refusal, write_pictures_folder
from PIL import Image

from cifar_jax.data import load_splits
from cifar_jax.data.pictures import content_digests
from cifar_jax.data.resize import Resize
from cifar_jax.data.sources.folder import load_folder
from cifar_jax.errors import UserError

TWO = {"cats": 6, "dogs": 4}


def labels_of(part):
    return part.labels.tolist()


def names_of(part, root):
    return [os.path.relpath(name, root) for name in part.images.names]


# ---------------------------------------------------------------------------------------------------------------------
# What is found


def test_classes_are_the_sorted_names_of_the_folders(tmp_path):
    splits = load_folder(write_pictures_folder(tmp_path / "pets", {"dogs": 4, "Birds": 2, "cats": 6}))
    assert splits.class_names == ("Birds", "cats", "dogs")
    assert (splits.name, splits.version, splits.val) == ("pets", "", None)
    assert labels_of(splits.train) == [0] * 2 + [1] * 6 + [2] * 4 and not len(splits.test.labels)


@pytest.mark.parametrize(
    ("train", "test", "val"),
    [("train", "test", "val"), ("training_set", "test_set", "validation"), ("Train", "TEST", "valid")],
)
def test_folders_of_splits(tmp_path, train, test, val):
    for seed, (name, count) in enumerate(((train, 5), (test, 3), (val, 2))):
        write_pictures_folder(tmp_path / name, dict.fromkeys(TWO, count), seed=seed)
    splits = load_folder(tmp_path)
    assert [len(part.labels) for part in (splits.train, splits.test, splits.val)] == [10, 6, 4]
    assert all(name.startswith(str(tmp_path / val)) for name in splits.val.images.names)


def test_validation_images_are_the_test_images_where_there_are_no_others(tmp_path):
    write_pictures_folder(tmp_path / "train", TWO)
    write_pictures_folder(tmp_path / "val", TWO, seed=1)
    splits = load_splits(str(tmp_path))
    assert len(splits.test.labels) == 10 and splits.val is None
    assert any("validation images" in note for note in splits.notes)


def test_a_class_may_be_called_train(tmp_path):
    splits = load_folder(write_pictures_folder(tmp_path, {"bus": 2, "train": 3}))
    assert splits.class_names == ("bus", "train")


def test_pictures_at_any_depth_belong_to_a_class_and_other_files_are_counted(tmp_path):
    write_pictures_folder(tmp_path, TWO)
    write_pictures_folder(tmp_path / "cats", {"indoor": 2, ".hidden": 3}, seed=1)
    (tmp_path / "cats" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "README.txt").write_text("pets")
    Image.new("RGB", (9, 9)).save(tmp_path / "cats" / ".cache.png")
    splits = load_folder(tmp_path)
    assert labels_of(splits.train) == [0] * 8 + [1] * 4
    assert names_of(splits.train, tmp_path)[6:8] == ["cats/indoor/0.png", "cats/indoor/1.png"]
    assert splits.notes == ("4 other files ignored",)  # the hidden folder is one


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path):
    write_pictures_folder(tmp_path / "pets", TWO)
    elsewhere = write_pictures_folder(tmp_path / "elsewhere", {"more": 3}, seed=1) / "more"
    (tmp_path / "pets/cats/link.png").symlink_to(elsewhere / "0.png")
    (tmp_path / "pets/cats/more").symlink_to(elsewhere)
    (tmp_path / "pets/lions").symlink_to(elsewhere)
    splits = load_folder(tmp_path / "pets")
    assert splits.class_names == ("cats", "dogs") and labels_of(splits.train) == [0] * 7 + [1] * 4


def test_pipes_are_not_waited_for_and_broken_links_are_named(tmp_path):
    write_pictures_folder(tmp_path, TWO)
    os.mkfifo(tmp_path / "cats/pipe.png")
    assert load_folder(tmp_path).notes == ("1 other file ignored",)
    (tmp_path / "cats/link.png").symlink_to(tmp_path / "nowhere.png")
    assert "cats/link.png does not exist" in refusal(tmp_path)
    (tmp_path / "cats/loop.png").symlink_to("loop.png")
    assert len(load_folder(tmp_path, skip_unreadable=True).skipped) == 2


@pytest.mark.parametrize("name", ["with space", "Möwen", "[a-z]*", "a'b\"c", "100%"])
def test_any_name(tmp_path, name):
    splits = load_folder(write_pictures_folder(tmp_path, {name: 2, "other": 2}))
    images = splits.resized(Resize("upsample", 16)).train.images[:]
    assert name in splits.class_names and images.shape == (4, 16, 16, 3)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".webp", ".bmp", ".gif"])
def test_formats(tmp_path, suffix):
    splits = load_folder(write_pictures_folder(tmp_path, TWO, suffix=suffix))
    images = splits.resized(Resize("eval-transform", 32, 36)).train.images[np.array([0, 9])]
    assert images[0, ..., 0].mean() > 150 > images[0, ..., 1].mean()  # red cats
    assert images[1, ..., 1].mean() > 150 > images[1, ..., 0].mean()  # green dogs


def test_sizes_are_those_of_the_upright_pictures(tmp_path):
    write_pictures_folder(tmp_path, TWO)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "cats" / "0.jpg", exif=exif)
    splits = load_folder(tmp_path)
    row = names_of(splits.train, tmp_path).index("cats/0.jpg")
    assert splits.train.images.sizes[row].tolist() == [20, 30]
    assert splits.train.images.read(row).size == (20, 30)


# ---------------------------------------------------------------------------------------------------------------------
# Splits that are drawn


def test_a_share_of_every_class_is_held_out_for_testing(tmp_path):
    root = write_pictures_folder(tmp_path, {"many": 40, "some": 10, "two": 2, "one": 1})
    splits = load_splits(str(root), test_fraction=0.2)
    held = np.bincount(splits.test.labels, minlength=4).tolist()
    assert splits.class_names == ("many", "one", "some", "two")
    assert sum(held) == 11 and held[1] == 0 and held[3] == 1 and 7 <= held[0] <= 8 and held[2] == 2
    assert not {*splits.test.images.names} & {*splits.train.images.names}
    assert len(splits.train.labels) + len(splits.test.labels) == 53
    again, other = (load_splits(str(root), seed=seed).test.images.names for seed in (0, 1))
    assert again == splits.test.images.names != other
    assert any("--test-fraction" in note for note in splits.notes)


def test_test_fraction_is_refused_where_there_are_test_images(tmp_path):
    write_pictures_folder(tmp_path / "train", TWO)
    write_pictures_folder(tmp_path / "test", TWO, seed=1)
    with pytest.raises(UserError, match=r"--test-fraction 0\.3 .* leave it out"):
        load_splits(str(tmp_path), test_fraction=0.3)


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints


def test_digests_depend_on_contents_and_not_on_places_or_dates(tmp_path):
    root = write_pictures_folder(tmp_path / "pets", TWO)
    digests = load_folder(root).resized(Resize()).train.digests()
    root = root.rename(tmp_path / "animals")
    os.utime(root / "cats/0.png", (1, 1))
    assert load_folder(root).resized(Resize()).train.digests() == digests
    assert load_folder(root).resized(Resize("upsample", 16)).train.digests().images != digests.images
    shutil.copy(root / "cats/1.png", root / "cats/0.png")
    assert load_folder(root).resized(Resize()).train.digests().images != digests.images


def test_listing_reads_no_pixels_and_takes_seconds_for_many_files(tmp_path):
    root = write_pictures_folder(tmp_path, {"a": 1, "b": 1})
    for name in ("a", "b"):
        content = (root / name / "0.png").read_bytes()
        for i in range(1, 1000):
            (root / name / f"{i}.png").write_bytes(content + bytes(str(i), "ascii"))
    splits = load_folder(root)
    assert len(splits.train.labels) == 2000 and len({*map(bytes, splits.train.images.digests)}) == 2000


def test_the_same_bytes_in_another_shape_are_other_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 96, 192), np.uint8)
    shapes = (4, 96, 64, 3), (4, 64, 96, 3), (4, 48, 128, 3)
    digests = {content_digests(pixels.reshape(shape)).tobytes() for shape in shapes}
    assert len(digests) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_refuses_a_folder_without_class_folders(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "cat.png")
    assert "no folders of pictures. It has pictures" in refusal(tmp_path)
    (tmp_path / "cat.png").unlink()
    assert "no folders of pictures. --dataset takes a folder for each class" in refusal(tmp_path)


def test_refuses_a_class_whose_name_is_not_text(tmp_path):
    write_pictures_folder(tmp_path, TWO)
    os.rename(os.fsencode(tmp_path / "dogs"), os.fsencode(tmp_path) + b"/\xff\xfe")
    assert "is not readable text; rename it" in refusal(tmp_path)


def test_refuses_an_empty_class(tmp_path):
    write_pictures_folder(tmp_path, TWO | {"birds": 0})
    assert "class 'birds' has no pictures" in refusal(tmp_path)


def test_refuses_a_single_class(tmp_path):
    assert "a single class, 'cats'" in refusal(write_pictures_folder(tmp_path / "pets", {"cats": 3}))
    write_pictures_folder(tmp_path / "outer" / "pets", TWO)
    assert f"Did you mean --dataset {tmp_path / 'outer' / 'pets'}?" in refusal(tmp_path / "outer")


def test_refuses_other_classes_in_the_test_images(tmp_path, log_messages):
    write_pictures_folder(tmp_path / "train", TWO)
    write_pictures_folder(tmp_path / "test", {"cats": 2, "lions": 1}, seed=1)
    assert "pictures of lions" in refusal(tmp_path)
    shutil.rmtree(tmp_path / "test/lions")
    load_folder(tmp_path)
    assert any("no pictures of dogs" in message for message in log_messages)


def test_refuses_test_images_without_training_images(tmp_path):
    write_pictures_folder(tmp_path / "test", TWO)
    assert "no folder `train`" in refusal(tmp_path)


def test_names_a_file_that_is_no_picture_or_leaves_it_out(tmp_path, log_messages):
    write_pictures_folder(tmp_path, TWO)
    (tmp_path / "cats/2.png").write_text("no picture")
    (tmp_path / "dogs/0.png").write_bytes(b"")
    message = refusal(tmp_path)
    assert "cats/2.png is not a readable image" in message and "1 more" in message and "--skip-unreadable" in message
    whole = (tmp_path / "cats/1.png").read_bytes()
    (tmp_path / "cats/1.png").write_bytes(whole[: len(whole) // 2])  # whose header is whole
    splits = load_splits(str(tmp_path), skip_unreadable=True)
    assert len(splits.train.labels) + len(splits.test.labels) == 7
    assert any("3 unreadable files skipped" in note for note in splits.notes)
    assert any(all(name in m for name in ("cats/1.png", "cats/2.png", "dogs/0.png")) for m in log_messages)


def test_refuses_a_class_of_which_nothing_is_left(tmp_path):
    write_pictures_folder(tmp_path, {"cats": 3, "dogs": 1})
    (tmp_path / "dogs/0.png").write_text("no picture")
    assert "No picture of dogs" in refusal(tmp_path, skip_unreadable=True)


def test_names_a_truncated_picture_when_it_is_read(tmp_path):
    write_pictures_folder(tmp_path, TWO)
    whole = (tmp_path / "cats/1.png").read_bytes()
    (tmp_path / "cats/1.png").write_bytes(whole[: len(whole) // 2])
    images = load_folder(tmp_path).resized(Resize()).train.images
    assert images[:1].shape == (1, 32, 32, 3)
    with pytest.raises(UserError, match=r"cats/1\.png cannot be read as an image"):
        images[1]


def test_names_a_decompression_bomb(tmp_path):
    write_pictures_folder(tmp_path, TWO)
    header = b"IHDR" + struct.pack(">II", 12_000, 12_000) + b"\x08\x02\0\0\0"
    chunks = [struct.pack(">I", 13), header, struct.pack(">I", zlib.crc32(header)), struct.pack(">I", 0), b"IDAT"]
    (tmp_path / "cats/bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert "bomb.png has 12000x12000 pixels, more than the limit" in refusal(tmp_path)


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_names_a_picture_that_disappears_or_changes_after_it_was_listed(tmp_path, change):
    write_pictures_folder(tmp_path, TWO)
    images = load_folder(tmp_path).resized(Resize()).train.images
    if change == "removed":
        (tmp_path / "cats/1.png").unlink()
    else:
        shutil.copy(tmp_path / "cats/2.png", tmp_path / "cats/1.png")
    with pytest.raises(UserError, match=r"cats/1\.png (does not exist|has changed since the data set was listed)"):
        images[1]


@pytest.mark.parametrize("name", ["nowhere/", "./pets", "/no/such/place", "a.npz"])
def test_refuses_a_path_that_does_not_exist(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{name} does not exist"):
        load_splits(name)


def test_refuses_a_file_that_is_no_npz(tmp_path):
    (tmp_path / "pets.zip").write_bytes(b"PK")
    assert "not an .npz file" in refusal(tmp_path / "pets.zip")


def test_no_threads_are_left(tmp_path):
    before = threading.active_count()
    load_folder(write_pictures_folder(tmp_path, TWO))
    assert threading.active_count() == before
