"""Tests of the images that a TFDS set may have, and of the names by which sets are found."""

import numpy as np
import pytest
from helpers import files_below, quiet_tensorflow
from PIL import Image
from tfds_sets import (
    FORMATS,
    drawn,
    encoded,
    examples,
    of_many_sizes,
    pixels_of,
    prepare,
    refusal,
    same_examples,
    without,
)

from cifar_jax.data.pictures import Pictures
from cifar_jax.data.sources.tfds import find_prepared
from cifar_jax.errors import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("file_format", FORMATS)
def test_pictures_of_any_size_stay_encoded(root, load, file_format, no_tensorflow):
    train, test = of_many_sizes(20), of_many_sizes(6, 1)
    at = prepare(root, {"train": examples(train), "test": examples(test)}, file_format)
    first = load()
    no_tensorflow()
    second = load()
    for splits in (first, second):
        assert isinstance(splits.train.images, Pictures)
        same_examples(splits.train, train, [i % 3 for i in range(20)])
        same_examples(splits.test, test, [0, 1, 2] * 2)
        images = splits.train.images
        assert [tuple(size) for size in images.sizes] == [images.read(row).size for row in images.rows]
    assert first.train.digests() == second.train.digests() and first.test.digests() == second.test.digests()
    some = second.train.images.take(np.array([7, 2]))
    assert list(some.names) == [f"Image {row} of the train images of {at}" for row in (7, 2)]
    assert some.take(slice(1, 2)).names[0] == some.names[1]
    assert (np.asarray(some.read(some.rows[0])) == np.asarray(images.read(7))).all()


def test_both_formats_give_the_same_examples(tmp_path, load):
    images = [image.resize((40, 40)) for image in drawn(12)]
    rows = {"train": examples(images, file_format="JPEG"), "test": examples(images[:3])}
    for shape in ((40, 40, 3), (None, None, 3)):
        ways = [prepare(tmp_path / kind / str(shape[0]), rows, kind, shape=shape) for kind in FORMATS]
        one, other = (load(at) for at in ways)
        assert one.train.digests() == other.train.digests() and one.test.digests() == other.test.digests()
        assert isinstance(one.train.images, Pictures) == (shape[0] is None)


@pytest.mark.parametrize("side", [32, 64, 65])
def test_images_of_one_small_size_become_arrays(root, load, side):
    images = [image.resize((side, side)) for image in drawn(6)]
    prepare(root, {"train": examples(images), "test": examples(images)}, shape=(side, side, 3))
    splits = load()
    assert isinstance(splits.train.images, np.ndarray) == (side <= 64)
    same_examples(splits.train, images, [0, 1, 2] * 2)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("shape", [(32, 32, 1), (None, None, 1)])
def test_grey_images_become_rgb(root, load, file_format, shape):
    grey = [image.convert("L") for image in drawn(6)]
    prepare(root, {"train": examples(grey), "test": examples(grey)}, file_format, shape=shape)
    splits = load()
    same_examples(splits.train, [image.convert("RGB") for image in grey], [0, 1, 2] * 2)


@pytest.mark.parametrize("shape", [(32, 32, 4), (None, None, 4)])
def test_transparent_parts_become_white(root, load, shape):
    images = drawn(6)
    for image in images:
        image.putalpha(Image.new("L", image.size, 0))
    prepare(root, {"train": examples(images), "test": examples(images)}, shape=shape)
    same_examples(load().train, [Image.new("RGB", (32, 32), "white")] * 6, [0, 1, 2] * 2)


def test_the_only_image_is_used_whatever_it_is_called(root, load):
    rows = without("image", [row | {"photo": row["image"]} for row in examples(drawn(6))])
    prepare(
        root, {"train": rows, "test": rows}, features=lambda tfds: {"photo": tfds.features.Image(shape=(32, 32, 3))}
    )
    same_examples(load().train, drawn(6), [0, 1, 2] * 2)


def test_several_images_of_which_none_is_called_image(root, load):
    rows = without("image", [row | {"left": row["image"], "right": row["image"]} for row in examples(drawn(6))])
    prepare(root, {"train": rows}, features=lambda tfds: dict.fromkeys(("left", "right"), tfds.features.Image()))
    assert "it has several images, left and right, and none called image" in refusal(load)


def test_float_images_are_refused(root, load):
    rows = [{"image": np.zeros((8, 8, 1), np.float32), "label": 0}]
    prepare(root, {"train": rows}, shape=(8, 8, 1), dtype=np.float32)
    assert "its images are float32; whole numbers are needed" in refusal(load)


def test_images_of_another_size_than_declared_are_refused(root, load):
    rows = examples(drawn(6))
    rows[3]["image"] = encoded(Image.new("RGB", (31, 32)))
    prepare(root, {"train": rows, "test": rows[:2]}, shape=(32, 32, 3))
    assert "has 31x32 pixels instead of 32x32; delete it and prepare it again." in refusal(load)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("shape", [(32, 32, 3), (None, None, 3)])
def test_what_is_no_image_is_refused(root, load, file_format, shape, tmp_path):
    rows = examples(drawn(6))
    rows[3]["image"] = b"no image"
    at = prepare(root, {"train": rows, "test": rows[:2]}, file_format, shape=shape)
    message = refusal(load)
    assert f"of the train images of {at} is not a readable image; prepare the data set again." in message
    assert files_below(tmp_path / "cache") in ([], ["data"])


def test_a_corrupt_picture_is_named_when_it_is_read(root, load):
    rows = examples(of_many_sizes(6))
    rows[3]["image"] = rows[3]["image"][:-200]
    at = prepare(root, {"train": rows, "test": rows[:2]})
    with pytest.raises(
        UserError, match=rf"^Image \d of the train images of {at} cannot be read as an image \(.*again\.$"
    ):
        pixels_of(load().train.images)


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_configurations_and_versions_by_name(root, load):
    for config, version, count in (("a", "1.0.0", 3), ("a", "1.2.0", 6), ("b", "1.0.0", 9)):
        rows = {"train": examples(drawn(count)), "test": examples(drawn(3))}
        prepare(root, rows, config=config, version=version, shape=(32, 32, 3))
    for name, expected in {
        "tiny/a": ("tiny/a", "1.2.0", 6),
        "tiny/a:1.0.0": ("tiny/a", "1.0.0", 3),
        "tiny/a:1.*.*": ("tiny/a", "1.2.0", 6),
        "tiny/b": ("tiny/b", "1.0.0", 9),
        root / "tiny" / "a": ("tiny/a", "1.2.0", 6),
        root / "tiny" / "a" / "1.0.0": ("tiny/a", "1.0.0", 3),
    }.items():
        splits = load(name)
        assert (splits.name, splits.version, len(splits.train.labels)) == expected
    assert find_prepared("tiny/a:2.0.0", str(root)) is None
    assert refusal(load) == f"tiny in {root} has the configurations tiny/a, tiny/b; name one of them as --dataset."
    assert "tiny/a, tiny/b; name one, as --dataset " in refusal(load, root)
    assert refusal(load, root / "tiny") == (
        f"{root / 'tiny'} holds prepared TFDS sets: a, b; name one, as --dataset {root / 'tiny' / 'a'}."
    )


def test_a_set_is_cached_once_by_name_and_by_directory(root, load, tmp_path):
    at = prepare(root, {"train": examples(drawn(6)), "test": examples(drawn(3))}, shape=(32, 32, 3))
    assert load().train.digests() == load(at).train.digests() == load(at.parent).train.digests()
    (kept,) = (tmp_path / "cache" / "data").iterdir()
    assert kept.name.startswith("tiny-1.0.0-")


# The real builders of TFDS without a network: their features and classes come from its code. `mock_data` replaces what
# reads files, so it cannot stand behind a loader of prepared sets; it makes the examples, which are prepared here.
REAL = {
    "beans": (("train", "validation", "test"), 3, (500, 500)),
    "oxford_flowers102": (("train", "test", "validation"), 102, None),
    "cifar100": (("train", "test"), 100, (32, 32)),
}


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", REAL)
def test_features_of_well_known_sets(root, load, name, file_format):
    names, num_classes, size = REAL[name]
    with quiet_tensorflow() as (_, tfds):
        with tfds.testing.mock_data(num_examples=3, policy=tfds.testing.MockPolicy.USE_CODE):
            real = tfds.builder(name)
            rows = {split: list(real.as_dataset(split=split).as_numpy_iterator()) for split in names}
        builder = tfds.dataset_builders.AdhocBuilder(
            name=name,
            version=str(real.version),
            file_format=file_format,
            features=real.info.features,
            split_datasets={split: list(enumerate(found)) for split, found in rows.items()},
            data_dir=root,
        )
        builder.download_and_prepare()
    splits = load(name)
    assert (splits.name, splits.version, len(splits.class_names)) == (name, str(real.version), num_classes)
    for part, split in ((splits.train, "train"), (splits.test, "test"), (splits.val, "validation")):
        if part is None:
            assert split not in names
            continue
        images = [Image.fromarray(row["image"]) for row in rows[split]]
        assert size is None or {image.size for image in images} == {size}
        if name != "beans":  # its images are JPEG, which loses something
            same_examples(part, images, [row["label"] for row in rows[split]])
    if name == "cifar100":
        assert isinstance(splits.train.images, np.ndarray)
        assert len(load(name, label_key="coarse_label").class_names) == 20
