"""The resize of pictures: which one is chosen, its lengths and margins, its words, and extremely long pictures."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_jax.data.resize import Resize, centre_crop, choose_resize, resized_centre, shorter_side_to
from cifar_jax.errors import UserError
from cifar_jax.models.preprocess import INTERPOLATIONS, EvalTransform

ROOT = Path(__file__).resolve().parents[2]
V2 = EvalTransform(232, 224, "bicubic")


def squares(side, num=3):
    """Sizes of pictures."""
    return np.full((num, 2), side, np.int32)


def choose(method="auto", sizes=None, image_size=224, interpolation="auto", transform=EvalTransform()):  # noqa: B008
    return choose_resize(method, interpolation, squares(32) if sizes is None else sizes, image_size, transform)


def picture(width, height, seed=0):
    """Smooth colours with some noise, as photos have."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9 + channel) * np.cos(y / 7 - channel) for channel in range(3)]
    pixels = 128 + 90 * np.stack(waves, -1) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# The choice


@pytest.mark.parametrize(
    ("side", "image_size", "upsamples"),
    [
        (32, 224, True),
        (32, 32, True),
        (32, 100, False),
        (28, 224, True),
        (28, 84, True),
        (28, 96, False),
        (64, 64, True),
        (64, 192, True),
        (64, 224, False),
        (64, 32, False),  # larger than the network's input
        (65, 65, False),
        (65, 130, False),
        (96, 96, False),
        (96, 192, False),
        (224, 224, False),
    ],
)
def test_auto_upsamples_small_squares_by_whole_factors(side, image_size, upsamples):
    resize = choose(sizes=squares(side), image_size=image_size)
    if upsamples:
        assert resize == Resize("upsample", side)
    else:
        assert resize == Resize("eval-transform", image_size, round(image_size / 0.875), "bilinear")


@pytest.mark.parametrize("sizes", [[(32, 32), (33, 33)], [(32, 64), (32, 64)], [(32, 64), (64, 32)]])
def test_auto_does_not_upsample_other_than_squares_of_one_size(sizes):
    assert choose(sizes=np.array(sizes, np.int32), image_size=64).method == "eval-transform"


def test_upsample_may_be_asked_for_above_the_limit_of_auto():
    assert choose("upsample", squares(96), 192) == Resize("upsample", 96)
    assert choose("upsample", squares(224), 224) == Resize("upsample", 224)


def test_eval_transform_may_be_asked_for_below_it():
    assert choose("eval-transform", transform=V2) == Resize("eval-transform", 224, 232, "bicubic")


@pytest.mark.parametrize(
    ("sizes", "image_size", "part"),
    [
        (squares(32), 100, "--image-size 100 is not a multiple of their 32 pixels"),
        (squares(64), 32, "--image-size 32 is not a multiple of their 64 pixels"),
        (np.array([(64, 32)] * 2), 64, "they are 64x32 pixels"),
        (np.array([(100, 350), (300, 80)]), 64, "they are 100 to 300 pixels wide and 80 to 350 high"),
    ],
)
def test_impossible_upsample_is_refused(sizes, image_size, part):
    with pytest.raises(UserError, match=part) as caught:
        choose("upsample", sizes, image_size)
    assert "--resize eval-transform" in str(caught.value)


@pytest.mark.parametrize("method", ["auto", "upsample"])
def test_interpolation_of_upsampled_pictures_is_refused(method):
    with pytest.raises(UserError, match="--interpolation bicubic applies to --resize eval-transform, but"):
        choose(method, interpolation="bicubic")


def test_interpolation_replaces_that_of_the_weights():
    assert choose("eval-transform", interpolation="box", transform=V2).interpolation == "box"
    assert choose(sizes=squares(300), interpolation="lanczos").interpolation == "lanczos"


@pytest.mark.parametrize("side", [28, 32, 64])
def test_pictures_as_large_as_a_functions_input_stay_as_they_are(side):
    """A function of images has no transform of its own."""
    resize = choose(sizes=squares(side), image_size=side)
    image = picture(side, side)
    assert resize.words(side) == "as they are"
    np.testing.assert_array_equal(resize(image), np.asarray(image))


# ---------------------------------------------------------------------------------------------------------------------
# The transform


@pytest.mark.parametrize(
    ("transform", "image_size", "shorter"),
    [
        (EvalTransform(), 224, 256),
        (EvalTransform(), 64, 73),
        (EvalTransform(), 96, 110),
        (EvalTransform(), 128, 146),
        (EvalTransform(), 32, 37),
        (EvalTransform(), 4096, 4681),
        (V2, 224, 232),
        (V2, 112, 116),
        (EvalTransform(235, 224, "bicubic"), 160, 168),
        (EvalTransform(224, 224), 100, 100),
    ],
)
def test_shorter_side_is_in_proportion_to_the_crop(transform, image_size, shorter):
    assert transform.shorter_side(image_size) == shorter >= image_size
    assert transform.at(image_size) == EvalTransform(shorter, image_size, transform.interpolation)
    assert transform.at(transform.side) == transform


@pytest.mark.parametrize("values", [(100, 224), (0, 0), (256, 224, "cubic"), (3600, 224), (256.0, 224), (256, None)])
def test_invalid_transforms_are_refused(values):
    with pytest.raises(ValueError, match="invalid evaluation transform"):
        EvalTransform(*values)


@pytest.mark.parametrize(
    ("resize", "image_size", "words"),
    [
        (Resize("upsample", 32), 224, "upsampled 7x (nearest)"),
        (Resize("upsample", 32), 32, "as they are"),
        (Resize("eval-transform", 96, 110, "bicubic"), 96, "shorter side to 110 (bicubic), centre crop of 96"),
    ],
)
def test_resize_is_described_and_restored(resize, image_size, words):
    assert resize.words(image_size) == words
    assert Resize.from_json(resize.to_json()) == resize


def test_transform_is_described_in_the_same_words():
    assert V2.words() == choose("eval-transform", transform=V2).words(224)


@pytest.mark.parametrize(
    ("size", "side", "box"),
    [
        ((10, 5), 5, (2, 0)),  # of margins 5 and 0; a half is rounded to the even number
        ((12, 5), 5, (4, 0)),
        ((5, 8), 5, (0, 2)),
        ((7, 9), 3, (2, 3)),
    ],
)
def test_centre_crop_rounds_odd_margins_as_torchvision(size, side, box):
    image, (left, top) = picture(*size), box
    np.testing.assert_array_equal(
        np.asarray(centre_crop(image, side)), np.asarray(image)[top : top + side, left : left + side]
    )


@pytest.mark.parametrize("margin", range(8))
@pytest.mark.parametrize("side", [31, 32])
def test_upsample_takes_the_largest_centred_square(side, margin):
    """For prediction, where a picture may have any size: an odd margin is smaller at the top and the left."""
    for size in ((side + margin, side), (side, side + margin)):
        image = picture(*size)
        left, top = ((length - side) // 2 for length in size)
        square = np.asarray(image)[top : top + side, left : left + side]
        np.testing.assert_array_equal(Resize("upsample", side)(image), square)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (300, 2), (64, 73), (73, 64), (4000, 130)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_any_picture_becomes_a_square(size, interpolation):
    found = Resize("eval-transform", 64, 73, interpolation)(picture(*size))
    assert found.shape == (64, 64, 3) and found.dtype == np.uint8
    assert np.ptp(found) > 0 or size == (1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Extremely long pictures


@pytest.mark.parametrize("size", [(30, 1200), (1200, 30), (100, 4100), (35, 1121), (1121, 35)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "hamming", "lanczos"])
def test_centre_alone_looks_as_cropped_from_the_whole(size, interpolation):
    image = picture(*size)
    whole = np.asarray(centre_crop(shorter_side_to(image, 73, interpolation), 64), int)
    centre = np.asarray(resized_centre(image, 73, 64, interpolation), int)
    assert np.abs(centre - whole).max() <= 2 and (centre == whole).mean() > 0.6


MEASURE = """
import resource
from PIL import Image
from cifar_jax.data.resize import Resize
def used(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resize = Resize("eval-transform", 224, 256, "bilinear")
resize(Image.new("RGB", (500, 375)))
before = used()
for size in ((1, 5000), (5000, 1), (2, 65000), (65000, 2)):
    assert resize(Image.new("RGB", size, "red")).tolist() == [[[255, 0, 0]] * 224] * 224
print((used() - before) // 1024)
"""


def test_extremely_long_pictures_take_little_memory():
    """Resized as a whole, one of 1x5000 pixels would take a gigabyte. Peaks are of a process, so it has its own."""
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20  # MB
