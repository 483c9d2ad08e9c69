"""Pooled features of a frozen backbone for any number of images."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Array, Float32, UInt8

from cifar_jax.errors import RunError
from cifar_jax.models.backbone import AnyBackbone, FunctionBackbone, extract
from cifar_jax.models.folded import features_of, prepare
from cifar_jax.models.preprocess import require_images
from cifar_jax.runtime.devices import is_out_of_memory
from cifar_jax.runtime.sharding import mesh_of, replicate, round_up, shard

logger = logging.getLogger(__name__)


class Extractor(Protocol):
    """Extracts features of any number of images; calls `on_images` with the number done after each batch."""

    def __call__(
        self, images_u8: UInt8[np.ndarray, "n h w 3"], on_images: Callable[[int], None] | None = None
    ) -> Float32[np.ndarray, "n features"]:
        """Returns the features of the images."""
        ...


def make_extractor(
    backbone: AnyBackbone,
    image_size: int | None = None,
    precision: str = "float32",
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Extractor:
    """Makes a fast `extract` for any number of images: BatchNorm folded, compiled once, run batch by batch.

    Args:
      backbone: from `load_backbone`; transferred to the devices once, folded.
      image_size: side in pixels that the images are upsampled to; the backbone's own if None.
      precision: `float32` or `bfloat16`.
      batch_size: images per compiled call, sharded over the devices; chosen by platform and image size if None. If the
        devices run out of memory, it is halved and the batch retried, which is logged.
      devices: devices of one platform; all local devices if None.

    Raises:
      RunError: if the backbone has non-finite values, before or after folding; by the extractor, if features are not
        finite.
      ValueError: by the extractor, if the images are not uint8 [n, h, w, 3].

    Example:
      >>> features = make_extractor(backbone)(splits.test.images)  # doctest: +SKIP
      >>> features.shape  # doctest: +SKIP
      (10000, 2048)
    """
    _require_finite(backbone)
    mesh = mesh_of(devices or jax.local_devices())
    platform, image_size = mesh.devices.flat[0].platform, image_size or backbone.image_size
    at_once = batch_size or extraction_batch_size(image_size, platform) * mesh.size
    if isinstance(backbone, FunctionBackbone):
        run, on_devices = jax.jit(extract), replicate(mesh, backbone)
    else:
        run, on_devices = jax.jit(features_of), replicate(mesh, prepare(backbone, image_size, precision, platform))

    def extractor(
        images_u8: UInt8[np.ndarray, "n h w 3"], on_images: Callable[[int], None] | None = None
    ) -> Float32[np.ndarray, "n features"]:
        nonlocal at_once
        require_images(images_u8)
        features, done = np.empty((len(images_u8), backbone.num_features), np.float32), 0
        while done < len(images_u8):
            size = round_up(mesh, min(at_once, len(images_u8)))
            # The devices compute a batch while the previous one is copied to the host.
            running: deque[tuple[slice, Array]] = deque()
            try:
                for rows, batch in _batches(images_u8, done, size):
                    running.append((rows, run(on_devices, shard(mesh, batch))))
                    while len(running) > (rows.stop < len(images_u8)):
                        first, extracted = running.popleft()
                        _copy_out(features, first, extracted)
                        done = first.stop
                        if on_images:
                            on_images(done)
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error) or size == mesh.size:
                    raise
                at_once = round_up(mesh, size // 2)
                logger.info(
                    f"Out of memory at batch size {size}; retrying with {at_once}, which may change the last bits of "
                    f"features. Pass --extract-batch-size {at_once} to start there."
                )
        return features

    return extractor


def _require_finite(backbone: AnyBackbone) -> None:
    """Checks the weights themselves: the features may hide NaN, as a relu compiled for a CPU turns it into 0."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(backbone.variables):
        if not np.isfinite(leaf).all():
            raise RunError(
                f"The backbone {backbone.source} has non-finite values in "
                f"{jax.tree_util.keystr(path, simple=True, separator='/')}; get a fresh copy of its weights."
            )


def extraction_batch_size(image_size: int, platform: str) -> int:
    """Batch size per device: small on a CPU, to stay in its caches; elsewhere large enough to fill the device.

    A power of two up to 1024, so that it divides the chunks of the feature cache.
    """
    return _power_of_two((4 if platform == "cpu" else 256) * (224 / image_size) ** 2)


def default_batch_size(image_size: int) -> int:
    """Batch size per device for networks that are not folded, such as those that train."""
    return _power_of_two((16 if jax.default_backend() == "cpu" else 256) * (224 / image_size) ** 2)


def _power_of_two(most: float) -> int:
    return 2 ** max(0, min(10, int(math.log2(most))))


def _batches(
    images: UInt8[np.ndarray, "n h w 3"], start: int, batch_size: int
) -> Iterator[tuple[slice, UInt8[np.ndarray, "batch h w 3"]]]:
    """Yields batches of one shape and their row ranges; the last batch is padded with black images."""
    for first in range(start, len(images), batch_size):
        batch = images[first : first + batch_size]
        rows = slice(first, first + len(batch))
        missing = batch_size - len(batch)
        if missing:
            batch = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
        yield rows, np.ascontiguousarray(batch)


def _copy_out(features: Float32[np.ndarray, "n features"], rows: slice, batch: Array) -> None:
    features[rows] = np.asarray(batch)[: rows.stop - rows.start]
    if not np.isfinite(features[rows]).all():
        raise RunError(
            f"The backbone returned non-finite features for images {rows.start} to {rows.stop - 1}: its weights "
            "or preprocessing are wrong; nothing was trained."
        )
