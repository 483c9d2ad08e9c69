"""TFDS sets that tests prepare, of pictures of shapes, and checks of what is read of them."""

import io
from pathlib import Path

import numpy as np
import pytest
from helpers import quiet_tensorflow
from PIL import Image

from cifar_jax.data.pictures import Pictures
from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.errors import UserError

FORMATS = ("tfrecord", "array_record")


def drawn(count, seed=0):
    """Pictures of shapes, 32 x 32 pixels, as Pillow has them."""
    return [Image.fromarray(image) for image in draw_shapes(count, seed)[0]]


def of_many_sizes(count, seed=0):
    return [image.resize((70 + 5 * i, 90 - 2 * i)) for i, image in enumerate(drawn(count, seed))]


def encoded(image, file_format="PNG"):
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


def examples(images, labels=None, file_format="PNG", **more):
    """Examples with an image, a label, three classes in turn if not given, and further features."""
    labels = [i % 3 for i in range(len(images))] if labels is None else labels
    columns = {"image": [encoded(image, file_format) for image in images], "label": labels} | more
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def without(key, rows):
    """The examples without one of their features."""
    return [{name: value for name, value in row.items() if name != key} for row in rows]


def prepare(root, splits, file_format="tfrecord", name="tiny", config=None, version="1.0.0", features=None, **shape):
    """Prepares a set below `root` with TFDS and returns its directory; `features` makes more of them, or others."""
    with quiet_tensorflow() as (_, tfds):
        kinds = {
            "image": tfds.features.Image(**shape),
            "label": tfds.features.ClassLabel(names=["circle", "square", "triangle"]),
        } | (features(tfds) if callable(features) else {})
        builder = tfds.dataset_builders.AdhocBuilder(
            name=name,
            config=config,
            version=version,
            file_format=file_format,
            features=tfds.features.FeaturesDict(
                {key: kind for key, kind in kinds.items() if key in next(iter(splits.values()))[0]}
            ),
            split_datasets={split: list(enumerate(found)) for split, found in splits.items()},
            data_dir=root,
        )
        builder.download_and_prepare()
    return Path(builder.data_dir)


def refusal(load, *arguments, **options):
    with pytest.raises(UserError) as caught:
        load(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message, message
    return message


def pixels_of(images):
    """The pixels of each image, decoded."""
    if isinstance(images, Pictures):
        return [np.asarray(images.read(row)) for row in images.rows]
    return list(images)


def same_examples(dataset, written, labels):
    """Asserts that a data set has these pictures with these labels, in whatever order TFDS wrote them."""
    expected = [(np.asarray(image).tobytes(), label) for image, label in zip(written, labels, strict=True)]
    found = [
        (image.tobytes(), int(label)) for image, label in zip(pixels_of(dataset.images), dataset.labels, strict=True)
    ]
    assert sorted(found) == sorted(expected)
