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
from cifar_jax.feature_store import num_absent
from cifar_jax.features import Extractor, make_extractor
from cifar_jax.files import cache_root
from cifar_jax.pretrained import Backbone
from cifar_jax.reporter import Progress, Silent

NO_BARS = Silent().progress


def dataset_features(
    config: TrainConfig,
    backbone: Backbone,
    image_size: int,
    datasets: Mapping[str, Dataset],
    *,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress = NO_BARS,
    timed: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    on_batch: Callable[[int], None] = lambda _: None,
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
      on_batch: is called after each batch with the number of images that are left, those of other data sets included.

    Raises:
      RunError: when the backbone or its features have values that cannot be, or all features are the same.
    """
    # Made when the first image needs it: where all features are kept, the network is not even put on the devices.
    make = functools.cache(
        partial(
            make_extractor, backbone, image_size, config.backbone.precision, config.backbone.extract_batch_size, say=say
        )
    )
    root, features = cache_root(config.run.cache_dir), {}
    about = {"backbone": backbone.source, "image_size": image_size, "precision": config.backbone.precision}
    how = (config.backbone.precision, config.backbone.feature_dtype)
    keys = {name: features_key(backbone, image_size, how[0], data.images, how[1]) for name, data in datasets.items()}
    absent = {name: num_absent(root / FEATURES / keys[name][:32], len(datasets[name].images)) for name in datasets}
    for name, dataset in datasets.items():
        del absent[name]
        with progress(f"Features of {name}", len(dataset.images), compiles=True) as bar:
            features[name] = cached_features(
                root / FEATURES,
                keys[name],
                dataset.images,
                partial(_extract, make, bar, timed),
                backbone.config.features,
                dtype=config.backbone.feature_dtype,
                about={"data": f"{config.data.dataset} {name}", **about},
                say=say,
                on_images=partial(_tell, bar, on_batch, len(dataset.images) + sum(absent.values())),
            )
        _require_different(features[name], dataset.images, f"{backbone.source} gives the same features for all {name}")
    limit_features(root, config.run.cache_limit * 1e9, [key[:32] for key in keys.values()], say)
    return features


def _extract(
    make: "functools._lru_cache_wrapper[Extractor]",
    bar: Callable[[int], None],
    timed: Callable[[int], AbstractContextManager[Any]],
    images_u8: UInt8[np.ndarray, "n h w 3"],
    on_images: Callable[[int], None] = lambda _: None,
) -> Float32[np.ndarray, "n features"]:
    if not make.cache_info().currsize:
        bar(0)  # the first batch is compiled; the bar says so
    with timed(len(images_u8)):
        return make()(images_u8, on_images)


def _tell(bar: Callable[[int], None], on_batch: Callable[[int], None], num: int, done: int) -> None:
    bar(done)
    on_batch(num - done)


def _require_different(
    features: Float32[np.ndarray, "n features"], images_u8: UInt8[np.ndarray, "n h w 3"], what: str
) -> None:
    # Row by row, as the second one already differs where all is well.
    if not _differ(features) and _differ(images_u8):
        raise RunError(f"{what}: it is dead, or its preprocessing does not fit; nothing was trained.")


def _differ(rows: np.ndarray) -> bool:
    return not all(np.array_equal(row, rows[0]) for row in rows)
