"""Tests of the feature cache: reuse, resumption, repair of corrupt chunks, concurrent processes, full disks."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import NARROW, ROOT, TESTS, files_below, forwarding_logs, full_disk

from cifar_jax.data import Dataset
from cifar_jax.errors import RunError
from cifar_jax.features import cache as feature_cache
from cifar_jax.features.cache import CHUNK_ROWS, cached_features, features_key
from cifar_jax.models.backbone import Backbone
from cifar_jax.models.preprocess import CAFFE

KEY = "0123456789abcdef" * 2
NUM, WIDTH = 2 * CHUNK_ROWS + 500, 6
IMAGES = np.random.default_rng(0).integers(0, 256, (NUM, 2, 2, 3), np.uint8)
STARTS = [0, CHUNK_ROWS, 2 * CHUNK_ROWS]


def features_of(images_u8):
    """Stands for a backbone: six numbers of an image."""
    return images_u8.reshape(len(images_u8), -1)[:, :WIDTH].astype(np.float32) / 255


FEATURES = features_of(IMAGES)


class Extractor:
    """Computes pieces in rows of 256, remembers where the pieces begin, and may stop at one of them."""

    def __init__(self, stops_at=None, error=KeyboardInterrupt):
        self.starts, self.stops_at, self.error = [], stops_at, error

    def stream(self, images_u8, pieces):
        for piece in pieces:
            if len(self.starts) == self.stops_at:
                raise self.error
            self.starts.append(piece.start)
            for start in range(piece.start, piece.stop, 256):
                rows = slice(start, min(start + 256, piece.stop))
                yield rows, features_of(images_u8[rows])


def constant(value):
    """Stands for a backbone that gives the same number for everything."""

    def stream(images_u8, pieces):
        for rows in pieces:
            yield rows, np.full((rows.stop - rows.start, WIDTH), value, np.float32)

    return stream


def get(directory, **how):
    """Features from the cache, and where the chunks began that were computed."""
    extractor = how.pop("extractor", None) or Extractor()
    features = cached_features(entry(directory), IMAGES, extractor.stream, WIDTH, **how)
    assert features.dtype == np.float32 and features.shape == (NUM, WIDTH)
    return features, extractor.starts


def entry(directory):
    return directory / KEY


def chunk(directory, number):
    return entry(directory) / "c" / str(number) / "0"


def flip(path, position, bit=1):
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------------------
# The key


def test_key_depends_on_everything_that_changes_features(shapes, monkeypatch):
    backbone = Backbone(NARROW, CAFFE, 64, {})

    def key_of(images, backbone=backbone, image_size=64, precision="float32", dtype="float32"):
        digest = Dataset(images, shapes.labels[:4]).digests().images
        return features_key(backbone, image_size, precision, digest, dtype)

    images = shapes.images[:4]
    key = key_of(images)
    assert key == key_of(images.copy())
    others = {
        key_of(images, image_size=96),
        key_of(images, precision="bfloat16"),
        key_of(images[::-1]),
        key_of(images, dtype="float16"),
        key_of(images, backbone.replace(sha256="other")),
        key_of(images, backbone.replace(config=replace(NARROW, bn_epsilon=1e-5))),
    }
    with jax.default_matmul_precision("bfloat16"):
        others.add(key_of(images))
    monkeypatch.setattr(feature_cache, "EXTRACTION_VERSION", 0)
    others.add(key_of(images))
    assert len(others | {key}) == 9


# ---------------------------------------------------------------------------------------------------------------------
# Computation and reuse


def test_each_chunk_is_computed_once(tmp_path, log_messages):
    done = []
    features, starts = get(tmp_path, on_images=done.append)
    np.testing.assert_array_equal(features, FEATURES)
    assert starts == STARTS and log_messages == [] and done == [*range(0, NUM, 256), NUM]
    features, starts = get(tmp_path)
    np.testing.assert_array_equal(features, FEATURES)
    assert starts == [] and log_messages == [f"The features come from the cache, {entry(tmp_path)}."]
    assert "lock" in os.listdir(entry(tmp_path)) and not list(tmp_path.rglob("*.__lock"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RunError("the backbone burst")])
def test_interrupted_extraction_resumes(tmp_path, log_messages, error):
    done = []
    with pytest.raises(type(error) if isinstance(error, RunError) else error):
        get(tmp_path, extractor=Extractor(stops_at=2, error=error))
    features, starts = get(tmp_path, on_images=done.append)
    np.testing.assert_array_equal(features, FEATURES)
    assert starts == [2 * CHUNK_ROWS] and done == [2 * CHUNK_ROWS, 2 * CHUNK_ROWS + 256, NUM]
    assert log_messages == [
        f"The features of 2,048 of 2,548 images come from the cache, {entry(tmp_path)}; extraction continues at image "
        "2,049 of 2,548."
    ]


def test_killed_process_leaves_whole_chunks_and_no_lock(tmp_path, log_messages):
    code = (
        "import os, signal, sys, pathlib, numpy as np, features.test_cache as t\n"
        "class Killed(t.Extractor):\n"
        "    def stream(self, images, pieces):\n"
        "        yield from super().stream(images, pieces[:2])\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "t.get(pathlib.Path(sys.argv[1]), extractor=Killed())\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "JAX_PLATFORMS": "cpu"}
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    log_messages.clear()
    features, starts = get(tmp_path)
    np.testing.assert_array_equal(features, FEATURES)
    # The second chunk was on its way to the disk: it is there, or it is not.
    assert starts in (STARTS[1:], STARTS[2:]) and "continues at image" in log_messages[0] and len(log_messages) == 1


def test_zeros_are_stored_and_missing_chunks_are_not_read_as_zeros(tmp_path):
    cached_features(entry(tmp_path), IMAGES, constant(0), WIDTH)
    features, starts = get(tmp_path)
    assert starts == [] and not features.any()
    chunk(tmp_path, 1).unlink()
    features, starts = get(tmp_path)
    assert starts == [CHUNK_ROWS] and features[CHUNK_ROWS : 2 * CHUNK_ROWS].any() and not features[:CHUNK_ROWS].any()


def test_jax_uses_the_features_without_a_copy(tmp_path):
    features, _ = get(tmp_path)
    assert jax.device_put(features).unsafe_buffer_pointer() == features.ctypes.data
    assert not features.flags.writeable


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_features_are_rounded_when_extracted_too(tmp_path, dtype):
    first, _ = get(tmp_path, dtype=dtype)
    second, starts = get(tmp_path, dtype=dtype)
    assert starts == []
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, FEATURES.astype(jnp.dtype(dtype)).astype(np.float32))
    assert chunk(tmp_path, 0).stat().st_size == CHUNK_ROWS * WIDTH * 2 + 4


def test_features_that_overflow_the_dtype_raise(tmp_path):
    with pytest.raises(RunError, match=r"up to 1e\+05 do not fit in float16; use --feature-dtype bfloat16"):
        cached_features(entry(tmp_path), IMAGES, constant(1e5), WIDTH, dtype="float16")
    assert not chunk(tmp_path, 0).exists()


# ---------------------------------------------------------------------------------------------------------------------
# Corruption


@pytest.mark.parametrize(
    ("number", "num", "damage"),
    [
        (1, "1,024", lambda path: flip(path, 100)),
        (2, "500", lambda path: flip(path, -1)),
        (2, "500", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        (1, "1,024", lambda path: path.write_bytes(b"")),
    ],
)
def test_corrupt_chunk_is_reported_and_recomputed_alone(tmp_path, log_messages, number, num, damage):
    get(tmp_path)
    damage(chunk(tmp_path, number))
    log_messages.clear()
    features, starts = get(tmp_path)
    np.testing.assert_array_equal(features, FEATURES)
    assert starts == [STARTS[number]] and len(log_messages) == 2
    assert log_messages[0].startswith("The cache is corrupt (") and str(chunk(tmp_path, number)) in log_messages[0]
    assert log_messages[0].endswith(f": recomputing the features of {num} images.")
    assert get(tmp_path)[1] == []


def test_no_corruption_of_any_file_changes_features(tmp_path, log_messages):
    """A hundred files with one byte changed, or cut short: of the chunks, and what is for people."""
    get(tmp_path)
    rng = np.random.default_rng(0)
    files = [path for path in sorted(entry(tmp_path).rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) == 4
    for number in range(100):
        path = files[rng.integers(len(files))]
        if number % 3:
            flip(path, rng.integers(path.stat().st_size), 1 << rng.integers(8))
        else:
            path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])
        log_messages.clear()
        np.testing.assert_array_equal(get(tmp_path)[0], FEATURES)
        assert not any("could not be saved" in text for text in log_messages)
    assert get(tmp_path)[1] == []


# ---------------------------------------------------------------------------------------------------------------------
# Concurrent processes


def test_second_process_waits_and_computes_nothing_again(tmp_path):
    inside, go_on, log_messages = threading.Event(), threading.Event(), []

    def slow(images_u8, pieces):
        inside.set()
        assert go_on.wait(10)
        yield from Extractor().stream(images_u8, pieces)

    def second(text):
        log_messages.append(text)
        go_on.set()

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cached_features, entry(tmp_path), IMAGES, slow, WIDTH)
        assert inside.wait(10)
        never = Extractor(stops_at=0)
        with forwarding_logs(second):
            features = cached_features(entry(tmp_path), IMAGES, never.stream, WIDTH)
        np.testing.assert_array_equal(features, first.result())
    assert log_messages[0] == f"Another process is computing the features in {entry(tmp_path)}; waiting for it."
    assert "come from the cache" in log_messages[1]


# ---------------------------------------------------------------------------------------------------------------------
# Unwritable directories


def test_unwritable_directory_is_logged_once(tmp_path, log_messages):
    place = tmp_path / "cache"
    place.write_text("a file")
    for _ in range(2):
        features, starts = get(place)
        np.testing.assert_array_equal(features, FEATURES)
        assert starts == STARTS
    assert len(log_messages) == 2 and all(
        text.startswith(f"The features could not be saved in {place} (") for text in log_messages
    )
    assert place.read_text() == "a file"


def test_full_disk_is_logged_once_and_leaves_no_partial_chunks(tmp_path, log_messages):
    log_messages.clear()
    with full_disk(at=CHUNK_ROWS * WIDTH * 4):  # a chunk has four bytes more
        features, starts = get(tmp_path)
    np.testing.assert_array_equal(features, FEATURES)
    assert (
        starts == STARTS
        and len(log_messages) == 1
        and "could not be saved" in log_messages[0]
        and "File too large" in log_messages[0]
    )
    assert not [path for path in files_below(tmp_path) if path.endswith(("__lock", "0/0", "1/0", "2/0"))]
    assert get(tmp_path)[1] == STARTS
