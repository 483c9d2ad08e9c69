"""Pooled features of a frozen backbone for any number of images."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, PyTree, UInt8

from cifar_jax.data.pictures import Images
from cifar_jax.data.pipeline import read_batches
from cifar_jax.errors import RunError
from cifar_jax.models.backbone import AnyBackbone, FunctionBackbone, extract
from cifar_jax.models.folded import features_of, prepare
from cifar_jax.models.preprocess import require_images
from cifar_jax.runtime.devices import is_out_of_memory
from cifar_jax.runtime.sharding import mesh_of, replicate, shard

MAX_BATCH = 1024  # images on each device at a time
IN_FLIGHT = 3  # batches: one is transferred and one copied out while one is computed

logger = logging.getLogger(__name__)

T = TypeVar("T")
Rows: TypeAlias = tuple[slice, Float32[np.ndarray, "rows features"]]


class Extractor:
    """Extracts features of any number of images, with one compiled function of a fixed batch size."""

    def __init__(
        self,
        run: Callable[[PyTree, Array], Array],
        variables: PyTree,
        mesh: Mesh,
        batch_size: int,
        num_features: int,
    ) -> None:
        """Takes a compiled function and what it needs; see `make_extractor`.

        Args:
          run: `(variables, images_u8 [batch, h, w, 3]) -> features [batch, num_features]`.
          variables: its first argument, on the devices.
          mesh: the devices.
          batch_size: images on each device at a time.
          num_features: number of features per image.
        """
        self._run, self._variables, self._mesh = run, variables, mesh
        self.batch_size, self.num_features = batch_size, num_features

    def __call__(
        self, images_u8: Images, on_images: Callable[[int], None] | None = None
    ) -> Float32[np.ndarray, "n features"]:
        """Returns the features of the images; calls `on_images` with the number done after each batch."""
        features = np.empty((len(images_u8), self.num_features), np.float32)
        for rows, values in self.stream(images_u8, [slice(0, len(images_u8))]):
            features[rows] = values
            if on_images:
                on_images(rows.stop)
        return features

    def stream(self, images_u8: Images, pieces: Sequence[slice]) -> Iterator[Rows]:
        """Yields the features of pieces of the images, in order, while the devices compute the next ones.

        The rows of a device's batch come from one piece, and the last batch of a piece is padded. So the features of
        a piece are the same to the bit, whichever other pieces there are.

        If the devices run out of memory, the batch size is halved for good, which is logged.

        Raises:
          ValueError: if the images are not uint8 [n, h, w, 3].
          RunError: if features are not finite.
        """
        require_images(images_u8)
        left = deque(piece for piece in pieces if piece.start < piece.stop)
        while left:
            try:
                for units, features in pipelined(self._start, self._batches(images_u8, left)):
                    for number, rows in enumerate(units):
                        first = number * self.batch_size
                        values = features[first : first + rows.stop - rows.start]
                        _require_finite_features(rows, values)
                        yield rows, values
                        rest = left.popleft()
                        if rows.stop < rest.stop:
                            left.appendleft(slice(rows.stop, rest.stop))
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error) or self.batch_size == 1:
                    raise
                size = self.batch_size * self._mesh.size
                self.batch_size //= 2
                half = self.batch_size * self._mesh.size
                logger.info(
                    f"Out of memory at batch size {size}; retrying with {half}, which may change the last bits of "
                    f"features. Pass --extract-batch-size {half} to start there."
                )

    def warm_up(self, image_shape: tuple[int, ...]) -> None:
        """Compiles for images of a shape [h, w, 3], by running a batch of black ones."""
        batch = np.zeros((self.batch_size * self._mesh.size, *image_shape), np.uint8)
        try:
            jax.block_until_ready(self._run(self._variables, shard(self._mesh, batch)))
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):  # `stream` tries smaller batches
                raise

    def _start(self, batch: UInt8[np.ndarray, "batch h w 3"]) -> Array:
        return self._run(self._variables, shard(self._mesh, batch))

    def _batches(
        self, images_u8: Images, pieces: Iterable[slice]
    ) -> Iterator[tuple[list[slice], UInt8[np.ndarray, "batch h w 3"]]]:
        """Yields batches of one shape with the rows that each device's share of it holds; the rest of it is black."""
        size, num_devices = self.batch_size, self._mesh.size
        units = [
            slice(start, min(start + size, piece.stop))
            for piece in pieces
            for start in range(piece.start, piece.stop, size)
        ]
        groups = [units[first : first + num_devices] for first in range(0, len(units), num_devices)]
        wanted = [np.concatenate([np.arange(rows.start, rows.stop) for rows in own]) for own in groups]
        for own, found in zip(groups, read_batches(images_u8, wanted), strict=True):
            batch = np.zeros((size * num_devices, *images_u8.shape[1:]), np.uint8)
            taken = 0
            for number, rows in enumerate(own):
                count = rows.stop - rows.start
                batch[number * size : number * size + count] = found[taken : taken + count]
                taken += count
            yield own, batch


def pipelined(
    start: Callable[[Any], Array], batches: Iterable[tuple[T, Any]], in_flight: int = IN_FLIGHT
) -> Iterator[tuple[T, np.ndarray]]:
    """Yields the results of batches in order, keeping several in flight so that the device never waits.

    Args:
      start: starts the computation of a batch and returns at once, as compiled functions of JAX do.
      batches: batches, each with a label.
      in_flight: number of batches that are started before the first result is waited for.
    """
    running: deque[tuple[T, Array]] = deque()
    for label, batch in batches:
        result = start(batch)
        result.copy_to_host_async()
        running.append((label, result))
        if len(running) == in_flight:
            label, result = running.popleft()
            yield label, np.asarray(result)
    for label, result in running:
        yield label, np.asarray(result)


def make_extractor(
    backbone: AnyBackbone,
    image_size: int | None = None,
    precision: str = "float32",
    batch_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    num_images: int | None = None,
) -> Extractor:
    """Makes a fast `extract` for any number of images: BatchNorm folded, compiled once, run batch by batch.

    Args:
      backbone: from `load_backbone`; transferred to the devices once, folded.
      image_size: side in pixels that the images are upsampled to; the backbone's own if None.
      precision: `float32` or `bfloat16`.
      batch_size: images per compiled call, shared out to the devices, at most 1,024 each; chosen by platform and image
        size if None. On each device it is rounded down to a power of two, which divides the chunks of the cache.
        Every batch has this size; the last one is padded. If the devices run out of memory, it is halved and the
        batch retried, which is logged.
      devices: devices of one platform; all local devices if None.
      num_images: the most images there will be, if known; a batch is not made larger.

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
    each = -(-batch_size // mesh.size) if batch_size else extraction_batch_size(image_size, platform)
    each = _power_of_two(each)
    while num_images and each > 1 and each * mesh.size >= 2 * num_images:
        each //= 2
    if isinstance(backbone, FunctionBackbone):
        return Extractor(jax.jit(extract), replicate(mesh, backbone), mesh, each, backbone.num_features)
    folded = prepare(backbone, image_size, precision, platform)
    return Extractor(jax.jit(features_of), replicate(mesh, folded), mesh, each, backbone.num_features)


def _require_finite(backbone: AnyBackbone) -> None:
    """Checks the weights themselves: the features may hide NaN, as a relu compiled for a CPU turns it into 0."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(backbone.variables):
        if not np.isfinite(leaf).all():
            raise RunError(
                f"The backbone {backbone.source} has non-finite values in "
                f"{jax.tree_util.keystr(path, simple=True, separator='/')}; get a fresh copy of its weights."
            )


def _require_finite_features(rows: slice, features: Float32[np.ndarray, "rows features"]) -> None:
    if not np.isfinite(features).all():
        raise RunError(
            f"The backbone returned non-finite features for images {rows.start} to {rows.stop - 1}: its weights "
            "or preprocessing are wrong; nothing was trained."
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
    return 2 ** max(0, min(int(math.log2(MAX_BATCH)), int(math.log2(most))))
