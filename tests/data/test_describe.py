"""Words about a data set, and the warnings of what may be wrong with it."""

import numpy as np
import pytest

from cifar_jax.data import Dataset
from cifar_jax.data.describe import class_warnings, class_words, range_words, shared_warning, split_words
from cifar_jax.data.pictures import Pictures, content_digest


def test_classes_are_named_if_there_are_few():
    assert class_words(("cats", "dogs")) == "2 classes (cats, dogs)"
    assert class_words([f"class number {n}" for n in range(1000)]) == "1,000 classes"


def test_counts_and_sizes_in_words():
    assert split_words({"training": 2500, "test": 12}) == "2,500 training, 12 test images"
    assert range_words(np.array([[32, 32], [32, 32]])) == "32x32 pixels"
    assert range_words(np.array([[500, 77], [101, 375]])) == "101x77 to 500x375 pixels"


@pytest.mark.parametrize(("smallest", "warns"), [(20, False), (19, True)])
def test_classes_are_imbalanced_over_ten_to_one(smallest, warns):
    labels, names = np.repeat([0, 1, 2], [smallest, 200, 50]), ("bird", "cat", "dog")
    expected = [
        f"The classes are imbalanced: 200 training images of cat, {smallest} of bird. Consider --class-weights "
        "balanced, and look at the scores of each class."
    ]
    assert class_warnings(labels, names) == expected * warns
    assert class_warnings(labels, names, weighted=True) == []


def test_classes_with_few_images_are_named_smallest_first():
    assert class_warnings(np.repeat([0, 1], [10, 10]), ("a", "b")) == []
    (warning,) = class_warnings(np.repeat([0, 2], [9, 3]), ("a", "b", "c"))
    assert warning == "Fewer than 10 training images of c (3), a (9); add some, or expect little accuracy there."
    (warning,) = class_warnings(np.repeat(np.arange(8), 5), tuple("abcdefgh"))
    assert "of a (5), b (5), c (5), d (5), e (5) and 3 more;" in warning


def pictures(contents, folder):
    digests = np.array([list(content_digest(content)) for content in contents], np.uint8)
    names = [f"{folder}/{number}.png" for number in range(len(contents))]
    images = Pictures(
        lambda row: pytest.fail("decoded"), names, digests, np.ones((len(names), 2), np.int32), np.arange(len(names))
    )
    return Dataset(images, np.zeros(len(names), np.int32))


def test_pictures_in_both_splits_are_named():
    train = pictures([b"a", b"b", b"c", b"d", b"e"], "train")
    assert shared_warning(train, pictures([b"x", b"y"], "test"), "test") == ""
    two = shared_warning(train, pictures([b"x", b"a", b"e"], "test"), "test")
    assert two.startswith("2 of 3 test images are identical to training images (test/1.png, test/2.png), so accuracy")
    four = shared_warning(train, pictures([b"a", b"b", b"c", b"d"], "held"), "held-out")
    assert "4 of 4 held-out images" in four and "(held/0.png, held/1.png, held/2.png, ...)" in four
