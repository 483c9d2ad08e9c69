"""Makes tests/golden/outputs/extraction.safetensors again: the features that belong to EXTRACTION_VERSION.

    PYTHONPATH=. python tests/make_golden_features.py

It refuses where features have moved and the version has not.
"""

import sys

import numpy as np
import safetensors.numpy
from golden import draw
from golden.outputs import DIRECTORY
from parity.compare import TOLERANCE

from cifar_jax import load_backbone, make_extractor
from cifar_jax.features.cache import EXTRACTION_VERSION

PATH = DIRECTORY / "extraction.safetensors"
VERSION = "extraction_version"
SIZES = (64, 96)


def extracted() -> dict[str, np.ndarray]:
    """Features of drawn images by the demo backbone, at its own size and at another, by the side in pixels."""
    images = draw.draw_images(4)
    return {str(size): make_extractor(load_backbone("demo"), size)(images) for size in SIZES}


def read() -> tuple[dict[str, np.ndarray], int]:
    """The features that are kept, and the version that they belong to."""
    with safetensors.safe_open(PATH, framework="np") as file:
        return {name: file.get_tensor(name) for name in map(str, SIZES)}, int(file.metadata()[VERSION])


def moved() -> float:
    """How far features are from those that are kept: max|a - b| / max|b|."""
    found, (kept, _) = extracted(), read()
    return max(float(np.abs(found[size] - kept[size]).max() / np.abs(kept[size]).max()) for size in kept)


if __name__ == "__main__":
    if PATH.exists() and read()[1] == EXTRACTION_VERSION and moved() > TOLERANCE:
        sys.exit("Features have moved beyond rounding: raise EXTRACTION_VERSION in cifar_jax/features/cache.py first.")
    safetensors.numpy.save_file(extracted(), PATH, metadata={VERSION: str(EXTRACTION_VERSION)})
