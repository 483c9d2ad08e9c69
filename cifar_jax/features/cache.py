"""The feature cache: features stored on disk in chunks, so that each image passes through the backbone only once.

An entry is a directory named by a hash of everything the features depend on. It holds the chunks of a zarr array, each
written atomically with a CRC-32C. Only chunks that are missing or corrupt are recomputed.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from cifar_jax.data.pictures import Images
from cifar_jax.errors import RunError
from cifar_jax.features.extractor import Rows
from cifar_jax.files import write_json
from cifar_jax.models.backbone import AnyBackbone
from cifar_jax.runtime.caches import ABOUT, locked

# Increment it if a change to extraction (preprocessing, network, folding, extractor) changes features beyond rounding,
# so that cached features are recomputed. tests/test_golden.py fails if that was forgotten.
EXTRACTION_VERSION = 1
# 8 MB for 2048 features in float32, 1 MB for 256. A multiple of the usual batch sizes.
CHUNK_ROWS = 1024
_ALIGNMENT = 64  # bytes; JAX on a CPU uses memory with this alignment without a copy

logger = logging.getLogger(__name__)


def features_key(
    backbone: AnyBackbone,
    image_size: int,
    precision: str,
    images_sha256: str,
    dtype: str = "float32",
    decoder: str = "",
) -> str:
    """The name of a cache entry: a hash of the pixels, weights, network configuration, precision and package versions.

    Batch size and hardware model affect only the last digits and are not part of it. `decoder` names what decodes the
    pictures whose digest `images_sha256` is, if that is not one of their pixels.
    """
    about = {
        "extraction": EXTRACTION_VERSION,
        "chunk_rows": CHUNK_ROWS,
        "backbone": backbone.sha256,
        **backbone.about(),
        "image_size": image_size,
        "precision": precision,
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        "images": images_sha256,
        "dtype": dtype,
        "backend": jax.default_backend(),
        **({"decoder": decoder} if decoder else {}),
        "packages": [importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax")],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def num_absent(path: Path, num: int) -> int:
    """Counts the rows, of `num`, without a chunk file in an entry's directory; contents are not checked."""
    return sum(rows.stop - rows.start for rows in _chunks(num) if not _file(path, rows).exists())


def cached_features(
    path: Path,
    images_u8: Images,
    stream: Callable[[Images, Sequence[slice]], Iterator[Rows]],
    num_features: int,
    *,
    dtype: str = "float32",
    about: Mapping[str, Any] | None = None,
    on_images: Callable[[int], None] | None = None,
) -> Float32[np.ndarray, "n features"]:
    """Reads features from the cache, verifying every chunk; missing ones are computed and stored.

    All missing chunks are computed in one stream, and each is stored as soon as it is complete. If another process is
    computing the same features, this one waits for it and computes the rest. Features that cannot be stored are
    computed all the same.

    Args:
      path: directory of the entry, named by `features_key`; created if necessary.
      images_u8: RGB pixels.
      stream: `Extractor.stream`: yields the features of the missing chunks piece by piece, in order.
      num_features: number of features per image.
      dtype: storage dtype: `float32`, `float16` or `bfloat16`. The result is rounded to it even if nothing was cached.
      about: JSON values to store with the entry, for listings of the cache.
      on_images: called with the number of images done so far.

    Returns:
      The features, read-only, as JAX may use their memory without a copy.

    Raises:
      RunError: if features overflow `dtype`, or raised by the extractor.
    """
    num, array = len(images_u8), None
    memory = np.empty(num * num_features * 4 + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    features = memory[start : start + num * num_features * 4].view(np.float32).reshape(num, num_features)
    missing = _chunks(num)
    waiting = f"Another process is computing the features in {path}; waiting for it."
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, lambda: logger.info(waiting)))
            # Its modification time records when the entry was last used.
            write_json(path / ABOUT, {"images": num, "features": num_features, "dtype": dtype, **(about or {})})
            array = _open(path, features.shape, dtype)
            missing = _read(path, array, features)
        except (OSError, ValueError) as error:
            logger.info(_not_kept(path, error))
        done = num - sum(rows.stop - rows.start for rows in missing)
        if done:
            which = f"The features of {done:,} of {num:,} images" if missing else "The features"
            goes_on = f"; extraction continues at image {missing[0].start + 1:,} of {num:,}" if missing else ""
            logger.info(f"{which} come from the cache, {path}{goes_on}.")
        if missing and on_images:
            on_images(done)
        chunks = deque(missing)
        with _writing(path, array, dtype) as write:
            for rows, values in stream(images_u8, missing) if missing else ():
                features[rows] = _rounded(values, dtype)
                if rows.stop == chunks[0].stop:
                    write(chunks[0], features)
                    chunks.popleft()
                done += len(values)
                if on_images:
                    on_images(done)
    features.flags.writeable = False
    return features


@contextlib.contextmanager
def _writing(
    path: Path, array: Any, dtype: str
) -> Iterator[Callable[[slice, Float32[np.ndarray, "n features"]], None]]:
    """Yields a function that stores a chunk in the background. The first failure is logged once all are written."""
    writes: list[Any] = []

    def write(rows: slice, features: Float32[np.ndarray, "n features"]) -> None:
        if array is not None:
            if writes:
                writes[-1].exception()  # waits for the previous chunk, so that a kill costs no more than one
            writes.append(array[rows].write(features[rows].astype(jnp.dtype(dtype), copy=False)))

    try:
        yield write
    finally:
        if failed := list(filter(None, [write.exception() for write in writes])):
            logger.info(_not_kept(path, failed[0]))


def _chunks(num: int) -> list[slice]:
    return [slice(start, min(start + CHUNK_ROWS, num)) for start in range(0, num, CHUNK_ROWS)]


def _file(path: Path, rows: slice) -> Path:
    return path / "c" / str(rows.start // CHUNK_ROWS) / "0"


def _open(path: Path, shape: tuple[int, ...], dtype: str) -> Any:
    """Opens the zarr array of an entry. Its metadata are known and not stored, so they cannot be corrupt."""
    import tensorstore

    chunk_shape = [min(CHUNK_ROWS, shape[0]), shape[1]]
    metadata = {
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": metadata,
        # By default a missing chunk is read as zeros, and a chunk of zeros is not written.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }
    return tensorstore.open(spec, assume_metadata=True).result()


def _read(path: Path, array: Any, features: Float32[np.ndarray, "n features"]) -> list[slice]:
    """Reads chunks into their rows of `features`, in parallel. Returns those that are missing or corrupt."""
    import tensorstore

    target, source = tensorstore.array(features), array.astype(tensorstore.float32)
    copies = {rows.start: target[rows].write(source[rows]) for rows in _chunks(len(features))}
    missing = []
    for rows in _chunks(len(features)):
        if error := copies[rows.start].exception():
            missing.append(rows)
            if not str(error).startswith("NOT_FOUND"):
                again = f"recomputing the features of {rows.stop - rows.start:,} images"
                logger.info(f"The cache is corrupt ({_reason(error)}): {again}.")
                # Remove it: tensorstore reads a partial last chunk before writing it.
                with contextlib.suppress(OSError):
                    _file(path, rows).unlink()
    return missing


def _rounded(values: Float32[np.ndarray, "n features"], dtype: str) -> Float[np.ndarray, "n features"]:
    with np.errstate(over="ignore"):
        rounded = values.astype(jnp.dtype(dtype), copy=False)
    if not np.isfinite(rounded).all():
        raise RunError(
            f"Features of up to {np.abs(values).max():.3g} do not fit in {dtype}; use --feature-dtype bfloat16 or "
            "float32."
        )
    return rounded


def _not_kept(path: Path, error: Exception) -> str:
    return (
        f"The features could not be saved in {path.parent} ({_reason(error)}); they will be computed again next time."
    )


def _reason(error: Exception) -> str:
    """The message of a tensorstore error, without the status code before it and the settings after it."""
    return re.sub(r"^[A-Z_]+: | \[\w+='.*", "", str(error), flags=re.DOTALL)
