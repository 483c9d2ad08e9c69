"""Features kept on disk chunk by chunk, so that no image passes the backbone twice.

They lie in a directory named by all that they depend on. A chunk that is missing or damaged is computed again, alone.
"""

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, UInt8

from cifar_jax.errors import RunError
from cifar_jax.features.extractor import Extractor
from cifar_jax.features.store import chunks_of, num_rows, open_entry
from cifar_jax.files import sha256_of_file
from cifar_jax.models.backbone import AnyBackbone

_FORMAT = 2
_ALIGNMENT = 64  # bytes
# Who changes one of these wants features of the changed network, not those in the cache.
_CODE = ("features/extractor.py", "models/folded.py", "models/preprocess.py", "models/resnet.py")

logger = logging.getLogger(__name__)


def features_key(
    backbone: AnyBackbone,
    image_size: int,
    precision: str,
    images_sha256: str,
    dtype: str = "float32",
) -> str:
    """Names a feature matrix by what it depends on: pixels, weights, how they are run, and the code that runs them.

    The number of images at a time and the machine's arithmetic units move its last digits and are no part of it.
    """
    about = {
        "format": _FORMAT,
        "backbone": backbone.sha256,
        **backbone.about(),
        "image_size": image_size,
        "precision": precision,
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        "images": images_sha256,
        "dtype": dtype,
        "backend": jax.default_backend(),
        "packages": [importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax")],
        "code": [sha256_of_file(Path(__file__).parents[1] / name) for name in _CODE],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def cached_features(
    directory: Path,
    key: str,
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
      directory: of the cache.
      key: from `features_key`.
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
    features = _empty(len(images_u8), num_features)
    chunks = chunks_of(len(features))
    with open_entry(directory / key[:32], features.shape, dtype, about or {}) as entry:
        missing = entry.read(features, chunks)
        done = len(features) - num_rows(missing)
        if done:
            logger.info(_what_is_reused(entry.path, len(features), done, missing))

        if on_images and missing:
            on_images(done)
        for rows in missing:
            values = extractor(images_u8[rows], on_images and partial(_counted_from, done, on_images))
            features[rows] = stored = _rounded(values, dtype)
            entry.write(rows, stored)
            done += len(stored)
    features.flags.writeable = False
    return features


def _empty(num: int, num_features: int) -> Float32[np.ndarray, "n features"]:
    """Memory that JAX takes as it is where its device is the CPU: that is none of another alignment."""
    memory = np.empty(num * num_features * 4 + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num * num_features * 4].view(np.float32).reshape(num, num_features)


def _counted_from(before: int, on_images: Callable[[int], None], done: int) -> None:
    on_images(before + done)


def _what_is_reused(path: Path, num: int, done: int, missing: Sequence[slice]) -> str:
    if not missing:
        return f"The features come from the cache, {path}."
    return (
        f"The features of {done:,} of {num:,} images come from the cache, {path}; extraction goes on at image "
        f"{missing[0].start + 1:,} of {num:,}."
    )


def _rounded(values: Float32[np.ndarray, "n features"], dtype: str) -> Float[np.ndarray, "n features"]:
    with np.errstate(over="ignore"):
        rounded = values.astype(jnp.dtype(dtype), copy=False)
    if not np.isfinite(rounded).all():
        raise RunError(
            f"Features of up to {np.abs(values).max():.3g} do not fit in {dtype}; use --feature-dtype bfloat16 or "
            "float32."
        )
    return rounded
