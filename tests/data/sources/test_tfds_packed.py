"""Tests of pictures packed into the cache, and of sets in ArrayRecord files."""

import json
import shutil
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT, files_below, flip_bit, full_disk
from tfds_sets import drawn, examples, of_many_sizes, pixels_of, prepare, refusal, same_examples

from cifar_jax.data import load_splits
from cifar_jax.files import locked_directory


@pytest.mark.parametrize("shape", [(32, 32, 3), (None, None, 3)])
def test_array_records_need_no_tensorflow(root, tmp_path, shape):
    draw = of_many_sizes if shape[0] is None else drawn
    prepare(root, {"train": examples(draw(12)), "test": examples(draw(6))}, "array_record", shape=shape)
    code = f"""
import sys
from cifar_jax.data import load_splits
from cifar_jax.data.pictures import resized
from cifar_jax.data.pipeline import read_batches
from cifar_jax.data.resize import Resize
import numpy as np
for _ in range(2):
    splits = load_splits("tiny", data_dir={str(root)!r}, cache_dir={str(tmp_path / "cache")!r})
    images = resized(splits.train.images, Resize("eval-transform", 24, 32))
    assert [len(batch) for batch in read_batches(images, [np.arange(8), np.arange(8, 12)])] == [8, 4]
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "", done
    assert "absl" not in done.stderr and "Warning" not in done.stderr, done.stderr


@pytest.fixture
def packed(root, load, tmp_path):
    """Directory of the cache of a packed set, `tiny`."""
    prepare(root, {"train": examples(of_many_sizes(12)), "test": examples(of_many_sizes(6, 1))})
    load()
    (kept,) = (tmp_path / "cache" / "data").iterdir()
    return kept


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: flip_bit(kept / "content.npy"),
        lambda kept: flip_bit(kept / "train_ends.npy", -1),
        lambda kept: (kept / "content.npy").unlink(),
        lambda kept: (kept / "content.npy").write_bytes((kept / "content.npy").read_bytes()[:-1000]),
        lambda kept: (kept / "index.json").write_text("{}"),
    ],
    ids=["flipped", "end", "missing", "truncated", "emptied"],
)
def test_corrupt_pack_is_detected_and_rebuilt(packed, load, log_messages, damage):
    before = load().train.digests()
    log_messages.clear()
    damage(packed)
    splits = load()
    assert splits.train.digests() == before
    same_examples(splits.train, of_many_sizes(12), [i % 3 for i in range(12)])
    assert len(log_messages) == 2 and str(packed) in log_messages[0] and log_messages[0].endswith(" again.")
    assert log_messages[1].startswith("Packing the pictures")
    log_messages.clear()
    load()
    assert log_messages == [] and list(packed.parent.iterdir()) == [packed]


def test_changed_source_is_packed_again(packed, load, root):
    labels = root / "tiny" / "1.0.0" / "label.labels.txt"
    labels.write_text(labels.read_text().replace("circle", "disc"))
    assert load().class_names[0] == "disc"
    shutil.rmtree(root / "tiny")
    prepare(root, {"train": examples(of_many_sizes(9, 5)), "test": examples(of_many_sizes(6, 1))})
    same_examples(load().train, of_many_sizes(9, 5), [0, 1, 2] * 3)
    assert len(list(packed.parent.iterdir())) == 3


def test_full_disk_while_packing(root, load, tmp_path):
    prepare(root, {"train": examples(of_many_sizes(12)), "test": examples(of_many_sizes(6, 1))})
    load_splits("shapes", train_examples=10, test_examples=10)  # imports
    with full_disk(5000):
        message = refusal(load)
    cache = tmp_path / "cache" / "data"
    assert message.startswith("The pictures ") and f"cannot be packed into {cache} (" in message
    assert "File too large" in message and message.endswith("make room, or name another --cache-dir.")
    assert files_below(cache) == []


def test_leftovers_of_killed_processes_are_removed(packed, load):
    left = packed.parent / f".{packed.name}-0badcafe"
    left.mkdir()
    (left / "content.npy").write_bytes(b"half")
    shutil.rmtree(packed)
    load()
    assert list(packed.parent.iterdir()) == [packed]


def test_unwritable_cache_of_pictures_in_array_records(root, load, tmp_path, log_messages):
    prepare(root, {"train": examples(of_many_sizes(12)), "test": examples(of_many_sizes(6, 1))}, "array_record")
    (tmp_path / "cache").write_text("a file where a directory should be")
    same_examples(load().train, of_many_sizes(12), [i % 3 for i in range(12)])
    assert len(log_messages) == 1 and "cannot be cached" in log_messages[0]


@pytest.mark.parametrize("shape", [(32, 32, 3), (None, None, 3)])
def test_corrupt_array_records_are_refused(root, load, shape):
    draw = of_many_sizes if shape[0] is None else drawn
    at = prepare(root, {"train": examples(draw(12)), "test": examples(draw(6))}, "array_record", shape=shape)
    flip_bit(next(at.glob("*train*")), 0.02)
    assert f"The data set in {at} is corrupt (" in refusal(load)


def test_lists_of_shards_that_lack_examples_are_refused(root, load):
    at = prepare(root, {"train": examples(drawn(12)), "test": examples(drawn(6))}, "array_record")
    info = json.loads((at / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["13"]
    (at / "dataset_info.json").write_text(json.dumps(info))
    assert f"The data set in {at} is corrupt (" in refusal(load)


def test_array_records_that_change_during_a_run_are_named(root, load):
    at = prepare(root, {"train": examples(of_many_sizes(12)), "test": examples(of_many_sizes(6))}, "array_record")
    load()
    images = load().train.images
    next(at.glob("*train*")).write_bytes(b"changed")
    assert f"of the train images of {at} cannot be read (" in refusal(pixels_of, images)


def test_tfrecords_need_tensorflow_until_they_are_packed(root, load, no_tensorflow):
    at = prepare(root, {"train": examples(of_many_sizes(12)), "test": examples(of_many_sizes(6))})
    no_tensorflow()
    assert refusal(load).startswith(f"Reading {at} needs TensorFlow, which cannot be imported (")


def test_processes_wait_for_the_one_that_packs(root, load, log_messages):
    at = prepare(root, {"train": examples(of_many_sizes(12)), "test": examples(of_many_sizes(6))})
    found = []
    with locked_directory(at):
        thread = threading.Thread(target=lambda: found.append(load()))
        thread.start()
        while not log_messages:
            time.sleep(0.01)
        assert log_messages == [f"Waiting for another process that reads {at}."] and found == []
    thread.join()
    same_examples(found[0].train, of_many_sizes(12), [i % 3 for i in range(12)])
