"""Random crops of pictures while they are decoded: what they show, and what they depend on."""

import numpy as np
import pytest
from PIL import Image

from cifar_jax.data.crops import RandomCrops
from cifar_jax.data.pictures import Resized
from cifar_jax.data.pipeline import batch_reader
from cifar_jax.data.resize import Resize
from cifar_jax.data.sources.folder import load_folder
from cifar_jax.train.from_config import cropped_when_read

RESIZE = Resize("eval-transform", 32, 36, "bicubic")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Pictures of which each pixel tells its place: red is the column, green the row."""
    root = tmp_path_factory.mktemp("pictures")
    for number, (width, height) in enumerate([(100, 80), (60, 200), (120, 120), (90, 91)]):
        path = root / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0], pixels[..., 1], pixels[..., 2] = np.arange(width), np.arange(height)[:, None], number
        Image.fromarray(pixels).save(path)
    return Resized(load_folder(root).train.images, RESIZE)


def crops_of(images, seed=3):
    return RandomCrops(images.source, images.resize, seed)


def test_each_image_is_its_rectangle_of_the_whole_picture(images):
    cut = crops_of(images)
    assert cut.shape == images.shape == (4, 32, 32, 3)
    for row, (top, left, height, width) in enumerate(cut.boxes.tolist()):
        picture = images.picture(row)
        assert 0 <= top <= picture.height - height and 0 <= left <= picture.width - width
        part = picture.crop((left, top, left + width, top + height)).resize((32, 32), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(cut[row], np.asarray(part))


def test_an_epoch_has_its_own_rectangles_whatever_came_before(images):
    cut = crops_of(images)
    np.testing.assert_array_equal(cut.of_epoch(2).boxes, cut.of_epoch(1).of_epoch(2).boxes)
    np.testing.assert_array_equal(cut.of_epoch(0).boxes, cut.boxes)
    assert (cut.of_epoch(1).boxes != cut.boxes).any(axis=1).all()
    assert (crops_of(images, 4).boxes != cut.boxes).any()


def test_batches_are_read_as_their_epoch_crops_them(images):
    """From the middle of an epoch too, as a resumed run begins."""
    cut, rows = crops_of(images), [np.array([3, 1]), np.array([0, 2])]
    read = batch_reader(cut, lambda epoch: rows)
    for epoch, step in ((1, 1), (0, 0), (0, 1), (1, 0), (1, 1)):
        np.testing.assert_array_equal(read(epoch, step), cut.of_epoch(epoch)[rows[step]])


def test_images_of_the_evaluation_are_the_same_in_all_epochs(images):
    read = batch_reader(images, lambda epoch: [np.arange(4)])
    np.testing.assert_array_equal(read(0, 0), read(1, 0))


def test_pictures_are_cropped_when_read_and_small_squares_in_the_step(images):
    names = ("random-resized-crop", "flip")
    cut, left = cropped_when_read(images, names, 0)
    assert left == ("flip",) and (cut[np.arange(4)] != images[np.arange(4)]).any(axis=(1, 2, 3)).all()
    assert cropped_when_read(images, ("flip",), 0) == (images, ("flip",))
    small = np.zeros((4, 32, 32, 3), np.uint8)
    assert cropped_when_read(small, names, 0) == (small, names)
    repeated = Resized(images.source, Resize("upsample", 32))
    assert cropped_when_read(repeated, names, 0) == (repeated, names)
