"""Tests of the synthetic data set: reproducible, balanced, and separable by outlines but not by colours or pixels."""

import numpy as np
import pytest

from cifar_jax.data.sources.shapes import CLASS_NAMES, LUMA_WEIGHTS, draw_shapes

NUM_TRAIN, NUM_TEST = 5000, 1000
NUM_CLASSES = len(CLASS_NAMES)


@pytest.fixture(scope="module")
def drawn():
    """Images of seed 0, enough to fit a classifier on the first ones and test it on the last."""
    return draw_shapes(NUM_TRAIN + NUM_TEST, seed=0)


def linear_accuracy(features, labels, ridge):
    """Computes the test accuracy of least squares on one-hot labels, fitted on all rows but the last NUM_TEST."""
    scaled = (features - features.mean(0)) / features.std(0)
    train, test = scaled[:-NUM_TEST], scaled[-NUM_TEST:]
    targets = np.eye(NUM_CLASSES, dtype=scaled.dtype)[labels] - 1 / NUM_CLASSES
    gram = train.T @ train + ridge * np.eye(train.shape[1], dtype=scaled.dtype)
    weights = np.linalg.solve(gram, train.T @ targets[:-NUM_TEST])
    return np.mean(np.argmax(test @ weights, axis=1) == labels[-NUM_TEST:])


def shape_masks(images):
    """Masks pixels whose luma is closer to the shape's than to the background's, estimated from the border."""
    luma = images @ LUMA_WEIGHTS
    frame = np.concatenate([luma[:, 0], luma[:, -1], luma[:, :, 0], luma[:, :, -1]], axis=1)
    difference = np.abs(luma - np.median(frame, axis=1)[:, None, None])
    return difference > 0.5 * np.quantile(difference, 0.95, axis=(1, 2), keepdims=True)


def outline_moments(masks):
    """Computes moments of each mask that are invariant to translation, scale and rotation."""
    rows, columns = np.mgrid[:32, :32]
    area = masks.sum((1, 2))[:, None, None]
    z = np.where(masks, columns + 1j * rows, 0)
    z = np.where(masks, z - z.sum((1, 2), keepdims=True) / area, 0) / np.sqrt(area)
    # z^k rotates k times as fast as the shape; the modulus of its mean is invariant.
    r2 = np.abs(z) ** 2
    terms = [r2, r2**2, *(z**k for k in range(2, 6)), *(r2 * z**k for k in (1, 3))]
    return np.stack([np.abs((term / area).sum((1, 2))) for term in terms], axis=1)


def test_image_shapes_dtypes_and_range(drawn):
    """Images are uint8 and labels int32, as in every data set of the package; few pixels are clipped."""
    images, labels = drawn
    assert images.shape == (NUM_TRAIN + NUM_TEST, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (NUM_TRAIN + NUM_TEST,)
    assert labels.dtype == np.int32
    assert images.min() < 10
    assert images.max() > 245
    assert np.mean((images == 0) | (images == 255)) < 0.05


@pytest.mark.parametrize("num_images", [1, 9, 10, 237])
def test_smaller_sets_are_prefixes_of_larger_ones(drawn, num_images):
    """Image i depends only on the seed and i, not on the number of images or on earlier draws."""
    images, labels = draw_shapes(num_images, seed=0)
    np.testing.assert_array_equal(images, drawn[0][:num_images])
    np.testing.assert_array_equal(labels, drawn[1][:num_images])


def test_no_image_is_repeated(drawn):
    """Blocks or seeds that shared a random stream would leak training images into the test set."""
    other_images, other_labels = draw_shapes(500, seed=1)
    pictures = np.concatenate([drawn[0][:500], other_images]).reshape(1000, -1)
    assert len(np.unique(pictures, axis=0)) == 1000
    orders = np.concatenate([drawn[1][:500], other_labels]).reshape(100, NUM_CLASSES)
    assert len(np.unique(orders, axis=0)) == 100


def test_every_block_of_ten_has_each_class_once(drawn):
    """So any number of images is balanced to within one."""
    blocks = np.sort(drawn[1].reshape(-1, NUM_CLASSES), axis=1)
    assert (blocks == np.arange(NUM_CLASSES)).all()


def test_known_images():
    """Published results refer to these images, so they must not change unnoticed.

    Mean colours are compared instead of bytes, as a different last bit on some processor would be no defect.
    """
    images, labels = draw_shapes(4, seed=0)
    assert [CLASS_NAMES[label] for label in labels] == ["cross", "crescent", "square", "heart"]
    reds, greens, blues = images.mean((1, 2)).T
    np.testing.assert_allclose(reds, [104.83, 99.69, 100.82, 201.13], atol=0.05)
    np.testing.assert_allclose(greens, [181.57, 37.86, 71.92, 151.30], atol=0.05)
    np.testing.assert_allclose(blues, [160.94, 48.10, 25.51, 189.02], atol=0.05)


@pytest.mark.parametrize(("num_images", "seed"), [(0, 0), (-1, 0), (1, -1)])
def test_rejects_invalid_count_and_seed(num_images, seed):
    """Otherwise an empty data set would fail much later."""
    with pytest.raises(ValueError, match=r"^(num_images|seed) must be at least [01], got -?[01]\.$"):
        draw_shapes(num_images, seed)


def test_shapes_are_large_whole_and_distinct_in_luma(drawn):
    """Luma alone segments the shape in every image: large, clear of the border, and as often light as dark."""
    images, _ = drawn
    masks = shape_masks(images)
    area = masks.mean((1, 2))
    assert area.min() > 0.08
    assert area.max() < 0.45
    assert not masks[:, [0, -1], :].any()
    assert not masks[:, :, [0, -1]].any()
    luma = images @ LUMA_WEIGHTS
    shape_luma = (luma * masks).sum((1, 2)) / masks.sum((1, 2))
    ground_luma = (luma * ~masks).sum((1, 2)) / (~masks).sum((1, 2))
    contrast = shape_luma - ground_luma
    assert np.abs(contrast).min() > 0.3 * 255
    assert 0.45 < np.mean(contrast > 0) < 0.55


def test_mean_colour_does_not_predict_the_class(drawn):
    """The nearest class mean of the mean colours is right about one time in ten."""
    colours, labels = drawn[0].mean((1, 2)), drawn[1]
    train, train_labels = colours[:-NUM_TEST], labels[:-NUM_TEST]
    means = np.stack([train[train_labels == label].mean(0) for label in range(NUM_CLASSES)])
    distances = np.linalg.norm(colours[-NUM_TEST:, None] - means, axis=-1)
    assert np.mean(np.argmin(distances, axis=1) == labels[-NUM_TEST:]) < 0.15


def test_pixels_do_not_predict_the_class_linearly(drawn):
    """Otherwise a good accuracy would say nothing about the backbone's features."""
    images, labels = drawn
    pixels = images.reshape(len(images), -1).astype(np.float32)
    assert linear_accuracy(pixels, labels, ridge=1e4) < 0.4


def test_outlines_predict_the_class(drawn):
    """Eight moments suffice, which would be impossible with wrong labels or two outlines equal under rotation."""
    images, labels = drawn[0][-3000:], drawn[1][-3000:]
    moments = np.log(outline_moments(shape_masks(images)) + 1e-3)
    assert linear_accuracy(moments, labels, ridge=1e-3) > 0.95
