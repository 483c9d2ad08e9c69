"""Features kept on disk chunk by chunk, so that no image passes the backbone twice.

They lie in a directory named by all that they depend on, as the chunks of a zarr array: files that appear whole and
carry a CRC-32C. A chunk that is missing or corrupt is computed again, alone.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, UInt8

from cifar_jax.errors import RunError
from cifar_jax.features.extractor import Extractor
from cifar_jax.files import write_json
from cifar_jax.models.backbone import AnyBackbone
from cifar_jax.runtime.caches import ABOUT, locked

# Raise it when a change to extraction (preprocessing, network, folding, extractor) moves features beyond rounding: what
# caches hold is then computed anew. tests/test_golden.py fails where that was forgotten.
EXTRACTION_VERSION = 1
# 8 MB of 2048 features in float32, 1 MB of 256. A multiple of the usual numbers of images at a time.
CHUNK_ROWS = 1024
_ALIGNMENT = 64  # bytes; JAX takes such memory as it is where its device is the CPU

logger = logging.getLogger(__name__)


def features_key(
    backbone: AnyBackbone, image_size: int, precision: str, images_sha256: str, dtype: str = "float32"
) -> str:
    """Names a feature matrix by what it depends on: pixels, weights, how they are run, and by which versions.

    The number of images at a time and the machine's arithmetic units move its last digits and are no part of it.
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
        "packages": [importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax")],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def num_absent(path: Path, num: int) -> int:
    """How many of `num` rows have no chunk in an entry's directory; what the chunks hold is not looked at."""
    return sum(rows.stop - rows.start for rows in _chunks(num) if not _file(path, rows).exists())


def cached_features(
    path: Path,
    images_u8: UInt8[np.ndarray, "n h w 3"],
    extractor: Extractor,
    num_features: int,
    *,
    dtype: str = "float32",
    about: Mapping[str, Any] | None = None,
    on_images: Callable[[int], None] | None = None,
) -> Float32[np.ndarray, "n features"]:
    """Features from the cache, every chunk checked; what it lacks is computed and kept there.

    The extractor is called once a chunk, whatever is there already, so that a run that was stopped goes on to the bits
    of one that was not. Where another process computes the same features this one waits for it, and goes on where it
    ended. What cannot be kept is computed all the same.

    Args:
      path: of the directory, named by `features_key`; it is made if need be.
      images_u8: RGB pixels.
      extractor: from `make_extractor`.
      num_features: how many features an image has.
      dtype: what they are kept in: `float32`, `float16` or `bfloat16`. They come rounded to it, also the first time.
      about: JSON values kept beside them for whoever looks at the cache.
      on_images: is called with the number of images that are done.

    Returns:
      Features that are read-only, as JAX may take their memory for its own.

    Raises:
      RunError: when features are too large for `dtype`, or what the extractor raises.
    """
    num, array = len(images_u8), None
    writes: list[Any] = []
    memory = np.empty(num * num_features * 4 + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    features = memory[start : start + num * num_features * 4].view(np.float32).reshape(num, num_features)
    missing, done = _chunks(num), 0

    def count(more: int) -> None:
        if on_images:
            on_images(done + more)

    waiting = f"Another process is computing the features in {path}; waiting for it."
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, lambda: logger.info(waiting)))
            # Its time of change says when the entry was used last.
            write_json(path / ABOUT, {"images": num, "features": num_features, "dtype": dtype, **(about or {})})
            array = _open(path, features.shape, dtype)
            missing = _read(path, array, features)
        except (OSError, ValueError) as error:
            logger.info(_not_kept(path, error))
        done = num - sum(rows.stop - rows.start for rows in missing)
        if done:
            which = f"The features of {done:,} of {num:,} images" if missing else "The features"
            goes_on = f"; extraction goes on at image {missing[0].start + 1:,} of {num:,}" if missing else ""
            logger.info(f"{which} come from the cache, {path}{goes_on}.")
        if missing:
            count(0)
        try:
            for rows in missing:
                features[rows] = stored = _rounded(extractor(images_u8[rows], count), dtype)
                done += len(stored)
                if writes:
                    writes[-1].exception()  # waits for a chunk that was written while this one was computed
                if array is not None:
                    writes.append(array[rows].write(stored))
        finally:
            if failed := list(filter(None, [write.exception() for write in writes])):
                logger.info(_not_kept(path, failed[0]))
    features.flags.writeable = False
    return features


def _chunks(num: int) -> list[slice]:
    return [slice(start, min(start + CHUNK_ROWS, num)) for start in range(0, num, CHUNK_ROWS)]


def _file(path: Path, rows: slice) -> Path:
    return path / "c" / str(rows.start // CHUNK_ROWS) / "0"


def _open(path: Path, shape: tuple[int, ...], dtype: str) -> Any:
    """The zarr array in a directory. Its metadata follow from the directory's name; none are on disk to be corrupt."""
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
        # Otherwise a chunk that was never written is read as zeros, and one of zeros never written.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }
    return tensorstore.open(spec, assume_metadata=True).result()


def _read(path: Path, array: Any, features: Float32[np.ndarray, "n features"]) -> list[slice]:
    """Copies chunks to their rows of `features`, in parallel. Returns those that are missing or corrupt."""
    import tensorstore

    target, source = tensorstore.array(features), array.astype(tensorstore.float32)
    copies = {rows.start: target[rows].write(source[rows]) for rows in _chunks(len(features))}
    missing = []
    for rows in _chunks(len(features)):
        if error := copies[rows.start].exception():
            missing.append(rows)
            if not str(error).startswith("NOT_FOUND"):
                again = f"the features of {rows.stop - rows.start:,} images are computed again"
                logger.info(f"The cache is damaged ({_reason(error)}): {again}.")
                # The last chunk, which the array does not fill, would be read once more before it is written.
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
    return f"The features could not be kept in {path.parent} ({_reason(error)}); they will be computed again next time."


def _reason(error: Exception) -> str:
    """The heart of what tensorstore says: its status before it and its settings behind it mean nothing to a user."""
    return re.sub(r"^[A-Z_]+: | \[\w+='.*", "", str(error), flags=re.DOTALL)
