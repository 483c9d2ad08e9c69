"""Tests of the splits and the labels that a TFDS set may have. The sets are prepared by the tests."""

import numpy as np
import pytest
from helpers import files_below
from tfds_sets import FORMATS, drawn, examples, of_many_sizes, prepare, refusal, same_examples, without

# ---------------------------------------------------------------------------------------------------------------------
# Splits


@pytest.mark.parametrize("file_format", FORMATS)
def test_validation_images_are_the_test_images_where_there_are_no_others(root, load, file_format):
    train, val = drawn(12), drawn(6, 1)
    prepare(root, {"train": examples(train), "validation": examples(val)}, file_format, shape=(32, 32, 3))
    splits = load()
    same_examples(splits.train, train, [0, 1, 2] * 4)
    same_examples(splits.test, val, [0, 1, 2] * 2)
    assert splits.val is None and splits.class_names == ("circle", "square", "triangle")
    assert splits.notes == ("tested on its validation images, as it has no test images",)
    assert "is tested on its validation images" in refusal(load, test_fraction=0.5)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("draw", [drawn, of_many_sizes])
def test_validation_images_beside_test_images(root, load, file_format, draw):
    images = {"train": draw(12), "validation": draw(6, 1), "test": draw(9, 2)}
    shape = {"shape": (32, 32, 3)} if draw is drawn else {}
    prepare(root, {split: examples(part) for split, part in images.items()}, file_format, **shape)
    splits = load()
    for part, split in ((splits.train, "train"), (splits.val, "validation"), (splits.test, "test")):
        same_examples(part, images[split], [0, 1, 2] * (len(part.labels) // 3))
    assert splits.notes == ()


@pytest.mark.parametrize("has_val", [True, False])
def test_unlabelled_test_images_are_not_used(root, load, has_val):
    parts = {"train": examples(drawn(30)), "test": examples(drawn(6, 1), [-1] * 6)}
    prepare(root, parts | ({"validation": examples(drawn(9, 2))} if has_val else {}), shape=(32, 32, 3))
    splits = load()
    assert splits.notes[0] == "the test images have no labels and are not used"
    if has_val:
        same_examples(splits.test, drawn(9, 2), [0, 1, 2] * 3)
        assert "validation images" in splits.notes[1]
    else:
        assert (len(splits.train.labels), len(splits.test.labels)) == (24, 6)
        assert "6 of 30 held out (--test-fraction)" in splits.notes[1]
    assert splits.train.labels.min() == splits.test.labels.min() == 0


@pytest.mark.parametrize("draw", [drawn, of_many_sizes])
def test_images_without_a_label_are_left_out(root, load, draw):
    images = draw(12)
    labels = [-1 if i in (3, 7) else i % 3 for i in range(12)]
    shape = {"shape": (32, 32, 3)} if draw is drawn else {}
    prepare(root, {"train": examples(images, labels), "test": examples(draw(6, 1))}, **shape)
    splits = load()
    same_examples(
        splits.train, *zip(*((image, i) for image, i in zip(images, labels, strict=True) if i >= 0), strict=True)
    )
    assert splits.notes == ("2 of 12 train images left out, as they have no label",)


def test_training_images_without_labels_are_refused(root, load):
    at = prepare(root, {"train": examples(drawn(6), [-1] * 6), "test": examples(drawn(6, 1))})
    assert refusal(load) == f"The training images of the data set in {at} have no labels; give another --dataset."


def test_other_splits_are_ignored_and_logged(root, load, log_messages):
    parts = {"train": 9, "test": 6, "extra": 3, "unsupervised": 3}
    prepare(root, {name: examples(drawn(count)) for name, count in parts.items()}, shape=(32, 32, 3))
    splits = load()
    assert (len(splits.train.labels), len(splits.test.labels), splits.val) == (9, 6, None)
    assert log_messages == ["tiny has further splits, which are not used: extra, unsupervised."]


def test_a_set_without_training_images_is_refused(root, load):
    at = prepare(root, {"test": examples(drawn(6)), "extra": examples(drawn(3))})
    assert f"The data set in {at} cannot be used: it has no train split, but extra, test;" in refusal(load)


def test_classes_without_training_images_are_named(root, load, log_messages):
    prepare(root, {"train": examples(drawn(6), [0, 2] * 3), "test": examples(drawn(6))}, shape=(32, 32, 3))
    load()
    assert log_messages == ["tiny has no training images of class square."]


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def with_colours(tfds):
    return {
        "colour": tfds.features.ClassLabel(names=["red", "blue"]),
        "number": tfds.features.Scalar(np.int64),
        "colours": tfds.features.Sequence(tfds.features.ClassLabel(num_classes=4)),
    }


def coloured(images):
    count = len(images)
    more = {"colour": [i // 2 % 2 for i in range(count)], "number": list(range(count)), "colours": [[0, 1]] * count}
    return examples(images, **more)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("draw", [drawn, of_many_sizes])
def test_one_of_several_labels_is_chosen(root, load, file_format, draw, no_tensorflow):
    train, test = draw(12), draw(6, 1)
    shape = {"shape": (32, 32, 3)} if draw is drawn else {}
    at = prepare(root, {"train": coloured(train), "test": coloured(test)}, file_format, features=with_colours, **shape)
    wrong = refusal(load, label_key="number")
    assert wrong == f"--label-key number: the data set in {at} has no such class; it has colour and label."
    splits = load()
    assert splits.class_names == ("circle", "square", "triangle") and splits.notes == ()
    same_examples(splits.train, train, [i % 3 for i in range(12)])
    no_tensorflow()  # the other label is already in the cache
    splits = load(label_key="colour")
    assert splits.class_names == ("red", "blue") and splits.notes == ("classes are those of colour",)
    same_examples(splits.train, train, [i // 2 % 2 for i in range(12)])
    same_examples(splits.test, test, [i // 2 % 2 for i in range(6)])


def test_the_only_class_is_the_label_whatever_it_is_called(root, load):
    rows = without("label", coloured(drawn(8)))
    prepare(root, {"train": rows, "test": rows}, features=with_colours, shape=(32, 32, 3))
    splits = load()
    same_examples(splits.train, drawn(8), [0, 0, 1, 1] * 2)
    assert splits.class_names == ("red", "blue") and splits.notes == ("classes are those of colour",)


def test_several_labels_of_which_none_is_called_label(root, load, tmp_path):
    rows = [row | {"shade": 0} for row in without("label", coloured(drawn(8)))]

    def features(tfds):
        return with_colours(tfds) | {"shade": tfds.features.ClassLabel(names=["dark", "light"])}

    at = prepare(root, {"train": rows, "test": rows}, features=features)
    assert refusal(load) == f"The data set in {at} has several labels, colour and shade; choose one by --label-key."
    assert files_below(tmp_path / "cache") == []
    assert load(label_key="shade").class_names == ("dark", "light")


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        (without("label", without("colour", coloured(drawn(6)))), "it has no label that is one class an image"),
        (
            without("image", coloured(drawn(6))),
            "it has no image (its features are colour: ClassLabel, ",
        ),
    ],
    ids=["no class", "no image"],
)
def test_sets_without_an_image_or_a_class_are_refused(root, load, rows, part):
    at = prepare(root, {"train": rows, "test": rows}, features=with_colours)
    message = refusal(load)
    assert message.startswith(f"The data set in {at} cannot be used: ") and part in message
    assert message.endswith("; give another --dataset.")


def test_a_single_class_is_refused(root, load):
    rows = examples(drawn(4), [0] * 4)
    at = prepare(root, {"train": rows}, features=lambda tfds: {"label": tfds.features.ClassLabel(names=["all"])})
    assert refusal(load) == f"The data set in {at} has a single class, 'all': there is nothing to tell apart."


def test_labels_of_a_folder_cannot_be_chosen(load, tmp_path):
    (tmp_path / "pictures").mkdir()
    assert "--label-key x names a label of a TFDS set" in refusal(load, tmp_path / "pictures", label_key="x")
