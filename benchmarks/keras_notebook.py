"""The peer Keras: `predict` of its frozen ResNet50, and the job of the notebook that this project replaces."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

BATCH_SIZE = 64  # the notebook's


def make_predict(weights: Path, image_size: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """Pixels to features by `predict`: preprocessed as arrays, as the notebook does, upsampled in the model."""
    keras = _keras()
    inputs, features = _frozen_base(keras, weights, image_size)
    model = keras.Model(inputs, features)

    def extractor(images_u8: np.ndarray, batch_size: int) -> np.ndarray:
        return model.predict(_preprocessed(keras, images_u8), batch_size=batch_size, verbose=0)

    return extractor


def make_notebook(
    weights: Path,
    image_size: int,
    train_u8: np.ndarray,
    train_labels: np.ndarray,
    val_u8: np.ndarray,
    val_labels: np.ndarray,
) -> Callable[[], dict[str, float]]:
    """The notebook's three calls on the images given, each of which gives its seconds: `fit`, `evaluate`, `predict`.

    `fit` is one epoch with validation. All have run once on return, so that nothing is compiled when they are timed.
    """
    keras = _keras()
    inputs, x = _frozen_base(keras, weights, image_size)
    for width in (1024, 512):
        x = keras.layers.Dense(width, "relu")(x)
    model = keras.Model(inputs, keras.layers.Dense(10, "softmax")(x))
    model.compile(optimizer="SGD", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    train, val = (_preprocessed(keras, images) for images in (train_u8, val_u8))
    how = {"batch_size": BATCH_SIZE, "verbose": 0}
    fit = partial(model.fit, train, train_labels, validation_data=(val, val_labels), epochs=1, **how)
    calls = {
        "fit": fit,
        "evaluate": partial(model.evaluate, val, val_labels, **how),
        "predict": partial(model.predict, val, **how),
    }

    def job() -> dict[str, float]:
        return {name: _seconds(call) for name, call in calls.items()}

    job()
    return job


def _keras() -> Any:
    import keras

    keras.utils.set_random_seed(0)
    return keras


def _frozen_base(keras: Any, weights: Path, image_size: int) -> tuple[Any, Any]:
    """Input and features of the frozen network."""
    base = keras.applications.ResNet50(weights=None, include_top=False, input_shape=(image_size, image_size, 3))
    base.load_weights(weights)
    base.trainable = False
    inputs = keras.layers.Input((32, 32, 3))
    x = base(keras.layers.UpSampling2D(image_size // 32)(inputs))
    return inputs, keras.layers.GlobalAveragePooling2D()(x)


def _preprocessed(keras: Any, images_u8: np.ndarray) -> np.ndarray:
    return np.asarray(keras.applications.resnet50.preprocess_input(images_u8.astype(np.float32)))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
