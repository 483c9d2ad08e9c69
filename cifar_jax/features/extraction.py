"""Features of a configuration's data sets, read from the cache or extracted and stored there, with a progress bar."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import PIL
from jaxtyping import Float32

from cifar_jax.config import TrainConfig
from cifar_jax.data import Dataset
from cifar_jax.data.pictures import Images, content_digests
from cifar_jax.errors import RunError
from cifar_jax.features.cache import cached_features, features_key, num_absent
from cifar_jax.features.extractor import Extractor, Rows, make_extractor
from cifar_jax.features.time_estimate import Forecast, faster_ways
from cifar_jax.files import cache_root
from cifar_jax.pretrained import AnyBackbone
from cifar_jax.runtime.caches import FEATURES, limit_features
from cifar_jax.runtime.progress import Reporter, Silent
from cifar_jax.runtime.timing import Clock


class Extracted(NamedTuple):
    """Features by data set, and the amount and time of extraction."""

    features: dict[str, Float32[np.ndarray, "n features"]]
    num_images: int  # images that passed through the backbone, i.e. were not cached
    seconds: float  # time that they took, once the backbone was compiled
    compile_seconds: float  # time that it took to prepare and compile the backbone, and to run a first batch


def dataset_features(
    config: TrainConfig,
    backbone: AnyBackbone,
    image_size: int,
    datasets: Mapping[str, Dataset],
    *,
    digests: Mapping[str, str] | None = None,
    reporter: Reporter | None = None,
    clock: Clock | None = None,
) -> Extracted:
    """Reads or extracts the features of data sets by name, then reduces the cache to `--cache-limit`.

    Args:
      config: defines the extraction and the cache.
      backbone: the backbone that extracts the features.
      image_size: side in pixels that the images are upsampled to.
      datasets: data sets by human-readable name, such as `training images`.
      digests: SHA-256 of the images of each data set, if known.
      reporter: shows a progress bar for each data set.
      clock: the clock of the job, for the time estimate; one that starts now if None.

    Raises:
      RunError: if the backbone or its features are not finite, or all features are equal.
    """
    root, features = cache_root(config.run.cache_dir), {}
    how = f"{image_size} pixels, {config.backbone.precision}, kept in {config.backbone.feature_dtype}"
    digests = digests or {name: data.digests().images for name, data in datasets.items()}
    keys = {
        name: features_key(
            backbone,
            image_size,
            config.backbone.precision,
            digests[name],
            config.backbone.feature_dtype,
            decoder="" if isinstance(dataset.images, np.ndarray) else f"Pillow {PIL.__version__}",
        )
        for name, dataset in datasets.items()
    }
    absent = {name: num_absent(root / FEATURES / keys[name], len(data.images)) for name, data in datasets.items()}
    faster = faster_ways(config, backbone, image_size)
    clock = clock or Clock()
    bars = Forecast(sum(absent.values()), clock, faster, "Extracting the features").watch(reporter or Silent())
    num_images, stopwatch = 0, Clock()
    largest = max(len(data.images) for data in datasets.values())

    @functools.cache
    def extractor() -> Extractor:
        precision, batch_size = config.backbone.precision, config.backbone.extract_batch_size
        with stopwatch("compilation"):
            made = make_extractor(backbone, image_size, precision, batch_size, num_images=largest)
            made.warm_up(next(iter(datasets.values())).images.shape[1:])
        return made

    def stream(images_u8: Images, pieces: Sequence[slice]) -> Iterator[Rows]:
        nonlocal num_images
        made = extractor()
        with stopwatch("extraction"):
            yield from made.stream(images_u8, pieces)
        num_images += sum(piece.stop - piece.start for piece in pieces)

    for name, dataset in datasets.items():
        with bars.progress(f"Features of {name}", len(dataset.images), compiles=True) as bar:
            if absent[name]:  # else the network need not be put on the devices, unless the cache is corrupt
                extractor()
            features[name] = cached_features(
                root / FEATURES / keys[name],
                dataset.images,
                stream,
                backbone.num_features,
                dtype=config.backbone.feature_dtype,
                about={"what": f"features of {config.data.dataset} {name}, {how}", "backbone": backbone.source},
                on_images=bar,
            )
        _require_different(features[name], dataset, f"{backbone.source} gives the same features for all {name}")
    limit_features(root, config.run.cache_limit * 1e9, list(keys.values()))
    seconds = stopwatch.seconds
    return Extracted(features, num_images, seconds.get("extraction", 0.0), seconds.get("compilation", 0.0))


def _require_different(features: Float32[np.ndarray, "n features"], dataset: Dataset, what: str) -> None:
    # Row by row with an early exit, as usually the second row already differs.
    if len(features) and all(np.array_equal(row, features[0]) for row in features):
        digests = content_digests(dataset.images)
        if (digests != digests[0]).any():
            raise RunError(f"{what}: the network is dead or its preprocessing is wrong; nothing was trained.")
