"""Tests of reading images batch by batch: the same as reading them one by one, ahead, in bounded memory."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers import ROOT, TESTS, write_pictures_folder
from PIL import Image

from cifar_jax.data.pictures import DIGEST_BYTES, Pictures, resized
from cifar_jax.data.pipeline import AHEAD, batch_reader, read_batches
from cifar_jax.data.resize import Resize
from cifar_jax.data.sources.folder import load_folder
from cifar_jax.errors import UserError

BATCHES = [np.array([3, 1, 1]), np.array([0]), np.array([], np.int64), np.arange(10)]


def counted(num, seconds=0.0, side=8):
    """Pictures whose pixels are their row, and the rows that were read."""
    rows_read = []

    def read(row):
        time.sleep(seconds)
        rows_read.append(row)
        return Image.new("RGB", (side, side), (row % 256, row // 256, 0))

    digests, sizes = np.zeros((num, DIGEST_BYTES), np.uint8), np.full((num, 2), side, np.int32)
    return Pictures(read, [str(row) for row in range(num)], digests, sizes, np.arange(num)), rows_read


def images_of(pictures, side=8):
    return resized(pictures, Resize("upsample", side))


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_are_the_images_at_their_rows(tmp_path, threads):
    images = load_folder(write_pictures_folder(tmp_path, {"a": 6, "b": 4})).resized(Resize()).train.images
    found = list(read_batches(images, BATCHES, threads))
    assert [len(batch) for batch in found] == [3, 1, 0, 10]
    for batch, rows in zip(found, BATCHES, strict=True):
        np.testing.assert_array_equal(batch, images[rows])
        np.testing.assert_array_equal(batch, [images[int(row)] for row in rows] or np.zeros((0, 32, 32, 3)))


def test_arrays_are_read_as_they_are():
    array = np.arange(10 * 4 * 4 * 3, dtype=np.uint8).reshape(10, 4, 4, 3)
    for batch, rows in zip(read_batches(array, BATCHES), BATCHES, strict=True):
        np.testing.assert_array_equal(batch, array[rows])


def test_some_batches_are_read_ahead_and_no_more():
    pictures, rows_read = counted(1000)
    batches = read_batches(images_of(pictures), np.split(np.arange(1000), 100), threads=2)
    next(batches)
    deadline = time.monotonic() + 10
    while len(rows_read) < 10 * (1 + AHEAD) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert 10 * (1 + AHEAD) <= len(rows_read) <= 10 * (1 + AHEAD) + 12
    batches.close()


def test_decoding_goes_on_while_the_device_works():
    pictures, _ = counted(64, seconds=0.01)
    start = time.monotonic()
    for _ in read_batches(images_of(pictures), np.split(np.arange(64), 8), threads=4):
        time.sleep(0.02)  # 8 batches of 0.02 s, and 64 pictures of 0.01 s in 4 threads: both 0.16 s
    # One after the other and in one thread it would be 0.80 s.
    assert time.monotonic() - start < 0.6


def test_an_unreadable_picture_ends_the_batches_with_its_error(tmp_path):
    root = write_pictures_folder(tmp_path, {"a": 6, "b": 4})
    images = load_folder(root).resized(Resize()).train.images
    (root / "a/4.png").unlink()
    batches = read_batches(images, [np.arange(4), np.arange(4, 8)], threads=2)
    assert len(next(batches)) == 4
    with pytest.raises(UserError, match=r"a/4\.png does not exist") as caught:
        next(batches)
    assert not getattr(caught.value, "__notes__", ())  # of the pipeline's own


def test_threads_end_with_the_batches():
    before = threading.active_count()
    pictures, _ = counted(100)
    batches = read_batches(images_of(pictures), np.split(np.arange(100), 10), threads=4)
    next(batches)
    batches.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before + 1  # Grain's own


def test_a_reader_of_steps_reads_ahead_in_the_usual_order_and_any_step_at_all():
    pictures, rows_read = counted(12)
    images = images_of(pictures)
    order = {epoch: np.split(np.random.default_rng(epoch).permutation(12), 4) for epoch in (0, 1)}
    read = batch_reader(images, order.__getitem__)
    for epoch in (0, 1):
        for step in range(4):
            assert read(epoch, step)[:, 0, 0, 0].tolist() == order[epoch][step].tolist()
    assert sorted(rows_read) == sorted([*range(12)] * 2)  # each picture once an epoch
    assert read(0, 2)[:, 0, 0, 0].tolist() == order[0][2].tolist()
    assert read(1, 3)[:, 0, 0, 0].tolist() == order[1][3].tolist()


def test_log_records_are_printed_once():
    code = """
import logging, numpy as np
from cifar_jax.data.pictures import Pictures
from cifar_jax.data.pipeline import read_batches
from test_pipeline import counted, images_of
before = list(logging.root.handlers)
list(read_batches(images_of(counted(4)[0]), [np.arange(4)]))
assert logging.root.handlers == before, logging.root.handlers
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}{os.pathsep}{TESTS / 'data'}"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)
