"""Features of the data sets of a configuration: from the cache, or computed and kept there, with a bar."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from cifar_jax.config import TrainConfig
from cifar_jax.data import Dataset
from cifar_jax.errors import RunError
from cifar_jax.features.cache import cached_features, features_key, num_absent
from cifar_jax.features.extractor import make_extractor
from cifar_jax.features.time_estimate import Forecast, faster_ways
from cifar_jax.files import cache_root
from cifar_jax.pretrained import AnyBackbone
from cifar_jax.runtime.caches import FEATURES, limit_features
from cifar_jax.runtime.progress import Reporter, Silent


class Extracted(NamedTuple):
    """Features by data set, and what of them was computed."""

    features: dict[str, Float32[np.ndarray, "n features"]]
    num_images: int  # that went through the backbone
    seconds: float  # that this took


def dataset_features(
    config: TrainConfig,
    backbone: AnyBackbone,
    image_size: int,
    datasets: Mapping[str, Dataset],
    *,
    digests: Mapping[str, str] | None = None,
    reporter: Reporter | None = None,
    started: float | None = None,
) -> Extracted:
    """Features of data sets by name; afterwards the cache is brought down to `--cache-limit`.

    Args:
      config: says how they are extracted, and where and how they are kept.
      backbone: that extracts them.
      image_size: side in pixels that the images are upsampled to.
      datasets: by what they are called, such as `training images`.
      digests: SHA-256 of the images of each, if they are known.
      reporter: shown a bar for each data set.
      started: when the job began, by `time.perf_counter`, for a forecast of when extraction ends; now if None.

    Raises:
      RunError: when the backbone or its features have values that cannot be, or all features are the same.
    """
    root, features = cache_root(config.run.cache_dir), {}
    how = f"{image_size} pixels, {config.backbone.precision}, kept in {config.backbone.feature_dtype}"
    digests = digests or {name: data.digests().images for name, data in datasets.items()}
    keys = {
        name: features_key(
            backbone, image_size, config.backbone.precision, digests[name], config.backbone.feature_dtype
        )
        for name in datasets
    }
    absent = sum(num_absent(root / FEATURES / keys[name], len(data.images)) for name, data in datasets.items())
    faster = faster_ways(config, backbone, image_size)
    bars = Forecast(absent, started, faster, "Extracting the features").watch(reporter or Silent())
    made, num_images, seconds = None, 0, 0.0

    def extractor(
        images_u8: UInt8[np.ndarray, "n h w 3"], on_images: Callable[[int], None] | None = None
    ) -> Float32[np.ndarray, "n features"]:
        nonlocal made, num_images, seconds
        start = time.perf_counter()
        # Made for the first image that needs it: where all features are kept, the network is not put on the devices.
        made = made or make_extractor(
            backbone, image_size, config.backbone.precision, config.backbone.extract_batch_size
        )
        found = made(images_u8, on_images)
        num_images, seconds = num_images + len(images_u8), seconds + time.perf_counter() - start
        return found

    for name, dataset in datasets.items():
        with bars.progress(f"Features of {name}", len(dataset.images), compiles=True) as bar:
            features[name] = cached_features(
                root / FEATURES / keys[name],
                dataset.images,
                extractor,
                backbone.num_features,
                dtype=config.backbone.feature_dtype,
                about={"what": f"features of {config.data.dataset} {name}, {how}", "backbone": backbone.source},
                on_images=bar,
            )
        _require_different(features[name], dataset.images, f"{backbone.source} gives the same features for all {name}")
    limit_features(root, config.run.cache_limit * 1e9, list(keys.values()))
    return Extracted(features, num_images, seconds)


def _require_different(
    features: Float32[np.ndarray, "n features"], images_u8: UInt8[np.ndarray, "n h w 3"], what: str
) -> None:
    # Row by row, as the second one already differs where all is well.
    if not _differ(features) and _differ(images_u8):
        raise RunError(f"{what}: it is dead, or its preprocessing does not fit; nothing was trained.")


def _differ(rows: np.ndarray) -> bool:
    return not all(np.array_equal(row, rows[0]) for row in rows)
