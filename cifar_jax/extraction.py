"""Features of the data sets of a configuration: from the cache, or computed and kept there, with a bar."""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from cifar_jax.cache_contents import FEATURES, limit_features
from cifar_jax.config import TrainConfig
from cifar_jax.data import Dataset
from cifar_jax.errors import RunError
from cifar_jax.feature_cache import cached_features, features_key
from cifar_jax.features import make_extractor
from cifar_jax.files import cache_root
from cifar_jax.pretrained import Backbone
from cifar_jax.pretrained.registry import Progress, no_progress


def dataset_features(
    config: TrainConfig,
    backbone: Backbone,
    image_size: int,
    datasets: Mapping[str, Dataset],
    *,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress = no_progress,
    timed: Callable[[int], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Float32[np.ndarray, "n features"]]:
    """Features of data sets by name; afterwards the cache is brought down to `--cache-limit`.

    Args:
      config: says how they are extracted, and where and how they are kept.
      backbone: that extracts them.
      image_size: side in pixels that the images are upsampled to.
      datasets: by what they are called, such as `training images`.
      say: is called with each sentence that the user should see.
      progress: makes the bar that shows how far a data set is.
      timed: a context for each piece of work, given the number of its images.

    Raises:
      RunError: when the backbone or its features have values that cannot be, or all features are the same.
    """
    # Made when the first image needs it: where all features are kept, the network is not even put on the devices.
    make = functools.cache(
        partial(make_extractor, backbone, image_size, config.precision, config.extract_batch_size, say=say)
    )
    root, features, used = cache_root(config.cache_dir), {}, []
    about = {"backbone": backbone.source, "image_size": image_size, "precision": config.precision}

    def extract(
        images_u8: UInt8[np.ndarray, "n h w 3"], on_images: Callable[[int], None] = lambda _: None
    ) -> Float32[np.ndarray, "n features"]:
        with timed(len(images_u8)):
            return make()(images_u8, on_images)

    for name, dataset in datasets.items():
        key = features_key(backbone, image_size, config.precision, dataset.images, config.feature_dtype)
        with progress(f"Features of {name}", len(dataset.images)) as bar:
            features[name] = cached_features(
                root / FEATURES,
                key,
                dataset.images,
                extract,
                backbone.config.features,
                dtype=config.feature_dtype,
                about={"data": f"{config.dataset} {name}", **about},
                say=say,
                on_images=bar,
            )
        used.append(key[:32])
        _require_different(features[name], dataset.images, f"{backbone.source} gives the same features for all {name}")
    limit_features(root, config.cache_limit * 1e9, used, say)
    return features


def _require_different(
    features: Float32[np.ndarray, "n features"], images_u8: UInt8[np.ndarray, "n h w 3"], what: str
) -> None:
    # Row by row, as the second one already differs where all is well.
    if not _differ(features) and _differ(images_u8):
        raise RunError(f"{what}: it is dead, or its preprocessing does not fit; nothing was trained.")


def _differ(rows: np.ndarray) -> bool:
    return not all(np.array_equal(row, rows[0]) for row in rows)
