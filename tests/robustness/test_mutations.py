"""Files with a changed byte or without their end: detected by a checksum if they have one, else loaded or refused.

`make mutations` tries thousands of each. HDF5 files are first read in a separate process, which takes half a second, so
fewer of these are tried.
"""

import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers import (
    NARROW_TORCH,
    keras_description,
    keras_tensors,
    narrow_networks,
    torch_tensors,
    write_keras3_h5,
    write_keras_h5,
)
from torch_files import write_torch

from cifar_jax.pretrained import Backbone, WeightsError, load_backbone, save_backbone

COUNT = int(os.environ.get("CIFAR_JAX_MUTATIONS", "40"))
SECONDS = 5.0  # at most for any file


def zipped(path: Path) -> None:
    write_torch(path, torch_tensors(NARROW_TORCH))


def legacy(path: Path) -> None:
    write_torch(path, torch_tensors(NARROW_TORCH), legacy=True)


def transformers(path: Path) -> None:
    safetensors.numpy.save_file(torch_tensors(NARROW_TORCH, "huggingface"), path)


def ours(path: Path) -> None:
    zipped(path.with_name("source.pth"))
    save_backbone(path, load_backbone(path.with_name("source.pth")))


def bare(path: Path) -> None:
    write_keras_h5(path, keras_tensors())


def archive(path: Path) -> None:
    tensors = keras_tensors()
    weights = write_keras3_h5(path.with_name("weights.h5"), tensors)
    layers = dict.fromkeys(name.rpartition("/")[0] for name in tensors)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", json.dumps(keras_description(layers)))
        file.write(weights, "model.weights.h5")


# Writer of each kind of file, and whether a checksum in it covers every number.
FORMS: dict[str, tuple[Callable[[Path], None], bool]] = {
    "zip.pth": (zipped, True),
    "legacy.pth": (legacy, False),
    "transformers.safetensors": (transformers, False),
    "ours.safetensors": (ours, True),
    "archive.keras": (archive, True),
    "bare.h5": (bare, False),
}
SLOW, SLOWER = {"archive.keras", "bare.h5"}, 4  # probed in another process


def leaves(backbone: Backbone) -> list[np.ndarray]:
    return jax.tree.leaves(backbone.variables)


@pytest.mark.parametrize("name", FORMS)
def test_damaged_files(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow_networks(monkeypatch)
    make, covered = FORMS[name]
    whole, path, rng = tmp_path / name, tmp_path / f"damaged-{name}", np.random.default_rng(0)
    make(whole)
    content, wanted = whole.read_bytes(), leaves(load_backbone(whole))
    for number in range(COUNT // SLOWER if name in SLOW else COUNT):
        # A third are cut short, a third change near the beginning, where the headers are.
        at = int(rng.integers(0, len(content) if number % 3 else min(3000, len(content))))
        changed = content[at] ^ int(rng.integers(1, 256))
        path.write_bytes(content[:at] + (b"" if number % 3 == 1 else bytes([changed]) + content[at + 1 :]))
        start = time.monotonic()
        try:
            found = leaves(load_backbone(path))
        except WeightsError:
            found = None
        assert time.monotonic() - start < SECONDS, at
        if found is None:
            continue
        for value, expected in zip(found, wanted, strict=True):
            assert value.shape == expected.shape and np.isfinite(value).all(), at
            assert not covered or np.array_equal(value, expected), at
