"""Tests of TFDS data sets: decoded once and cached, corruption detected, and errors where there is no data set."""

import json
import logging
import shutil
import sys

import numpy as np
import pytest
import requests
from helpers import command, files_below, is_one_error, write_tfds

from cifar_jax.data import load_splits
from cifar_jax.data.sources.tfds import find_prepared, load_tfds
from cifar_jax.errors import UserError

TRAIN, TEST = "tiny-train.tfrecord-00000-of-00001", "tiny-test.tfrecord-00000-of-00001"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A data set of 40 and 20 images, prepared by TFDS."""
    root = tmp_path_factory.mktemp("tfds")
    write_tfds(root)
    return root


@pytest.fixture
def root(prepared, tmp_path):
    """A copy that tests may corrupt."""
    return shutil.copytree(prepared, tmp_path / "data")


@pytest.fixture
def load(root, tmp_path, log_messages):
    """Loads the copy and returns it with the messages logged meanwhile."""

    def load_copy():
        log_messages.clear()
        return load_tfds("tiny", str(root), str(tmp_path / "cache")), list(log_messages)

    return load_copy


def refusal(load):
    with pytest.raises(UserError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message and "{{" not in message, message
    return message


def test_reads_a_prepared_data_set(load):
    splits, log_messages = load()
    assert (splits.name, splits.version, log_messages) == ("tiny", "1.0.0", [])
    assert splits.class_names == tuple(f"class {label}" for label in range(10))
    for dataset, count, seed in ((splits.train, 40, 0), (splits.test, 20, 1)):
        written = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)
        # TFDS shuffles when it writes, so the pairs come in another order, though always the same one.
        order = [next(i for i, image in enumerate(written) if (image == read).all()) for read in dataset.images]
        assert sorted(order) == list(range(count))
        np.testing.assert_array_equal(dataset.labels, np.array(order) % 10)


def test_root_logger_is_left_unchanged(load, monkeypatch):
    """absl, which TFDS logs with, adds a handler to a root logger without one, which would print every log record."""
    monkeypatch.setattr(logging.root, "handlers", [])
    load()
    assert logging.root.handlers == []


def test_second_load_memory_maps_without_tensorflow(load, monkeypatch):
    first, _ = load()
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # cannot be imported
    second, log_messages = load()
    assert log_messages == []
    for one, other in ((first.train, second.train), (first.test, second.test)):
        assert isinstance(other.images, np.memmap) and isinstance(other.labels, np.memmap)
        assert not other.images.flags.writeable
        assert one.digests() == other.digests()


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: (kept / "train_images.npy").write_bytes(b"no array"),
        lambda kept: (kept / "index.json").write_text("{}"),
        lambda kept: (kept / "test_labels.npy").unlink(),
        lambda kept: flip(kept / "train_images.npy", 5000),
    ],
    ids=["replaced", "emptied", "missing", "flipped"],
)
def test_corrupt_cache_is_detected_and_rebuilt(load, tmp_path, damage):
    first, _ = load()
    (kept,) = (tmp_path / "cache" / "data").iterdir()
    damage(kept)
    second, log_messages = load()
    assert second.train.digests() == first.train.digests()
    assert len(log_messages) == 1 and str(kept) in log_messages[0] and log_messages[0].endswith(" again.")
    assert load()[1] == [] and list(kept.parent.iterdir()) == [kept]


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_changed_source_is_decoded_again(load, root, tmp_path):
    load()
    labels = root / "tiny" / "1.0.0" / "label.labels.txt"
    labels.write_text(labels.read_text().replace("class 3", "cat"))
    splits, log_messages = load()
    assert splits.class_names[3] == "cat" and log_messages == []
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 2


@pytest.mark.parametrize("blocked", ["cache", "cache/data"])
def test_unwritable_cache_is_logged(load, tmp_path, blocked):
    (tmp_path / "cache").parent.mkdir(exist_ok=True)
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("a file where a directory should be")
    splits, log_messages = load()
    assert len(splits.train.labels) == 40
    assert (
        len(log_messages) == 1
        and "cannot be cached" in log_messages[0]
        and "decoded again next time" in log_messages[0]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Corruption


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def set_shards(lengths):
    def change(info):
        info["splits"][0]["shardLengths"] = lengths

    return lambda at: edit_json(at / "dataset_info.json", change)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda at: flip(at / TRAIN, 70_000), "corrupt (corrupted record"),
        (lambda at: flip(at / TEST, 3), "corrupt (corrupted record"),
        (lambda at: (at / TRAIN).write_bytes((at / TRAIN).read_bytes()[:70_000]), "corrupt (truncated record"),
        (lambda at: (at / TRAIN).write_bytes(b""), "expected to contain 40 elements but contained only 0"),
        (lambda at: (at / TEST).unlink(), "No such file"),
        (set_shards(["41"]), "expected to contain 41 elements but contained only 40"),
        (set_shards(["39"]), "expected to contain 39 elements but contained at least 40"),
        (set_shards(["20", "20"]), "00002; No such file"),
        (lambda at: (at / "dataset_info.json").write_text(""), "corrupt (Failed to load JSON"),
        (lambda at: (at / "dataset_info.json").write_text("{}"), "corrupt (Invalid version"),
        (lambda at: (at / "dataset_info.json").write_bytes(b"\xff\xfe"), "corrupt ("),
        (lambda at: (at / "features.json").unlink(), "corrupt (Cannot restore"),
        (lambda at: (at / "features.json").write_text('{"x": 1}'), "corrupt ("),
        (lambda at: (at / "label.labels.txt").write_text("a\nb\n"), "labels in 0..9, outside 0..1"),
    ],
)
def test_corrupt_data_sets_are_refused(load, root, tmp_path, damage, part):
    at = root / "tiny" / "1.0.0"
    damage(at)
    message = refusal(load)
    assert part in message and str(at) in message, message
    assert files_below(tmp_path / "cache") == []


def test_newest_version_is_read(load, root):
    for version in ("0.9.0", "1.0.0.incompleteA1B2C3", "incomplete.A1B2C3_2.0.0", "0.10.0"):
        shutil.copytree(root / "tiny" / "1.0.0", root / "tiny" / version)
    assert find_prepared("tiny", str(root)).name == "1.0.0"
    assert load()[0].version == "1.0.0"


# ---------------------------------------------------------------------------------------------------------------------
# No data set at all


@pytest.fixture
def offline(monkeypatch):
    """Makes downloads fail at once; TFDS's own ten retries would take three and a half minutes."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader

    def fail(builder):
        assert downloader.MAX_RETRIES <= 3
        print("Downloading and preparing dataset")  # to stdout, as TFDS does
        request = requests.Request("GET", "https://www.example.org/data.tar.gz").prepare()
        raise requests.ConnectionError("Max retries exceeded", request=request)

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    yield
    assert downloader.MAX_RETRIES == 10


def test_missing_data_without_a_network_is_explained(tmp_path, capsys, offline):
    root, out = tmp_path / "nothing", tmp_path / "out"
    result = command(capsys, "train", "--data-dir", root, "--weights", "random-w16", "--out", out)
    hints = [f"tfds build cifar10 --data_dir {root}", "--data-dir", "TFDS_DATA_DIR", "--dataset shapes"]
    is_one_error(result, 2, f"'cifar10' is not in {root}", "no connection to 'https://www.example.org", *hints)
    assert result.out == "" and not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_examples": 41}, r"--train-examples must be at most 40, the number of training images, got 41\."),
        ({"test_examples": 21}, r"--test-examples must be at most 20, the number of test images, got 21\."),
    ],
)
def test_rejects_more_examples_than_the_split_has(load, root, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        load_splits("tiny", data_dir=str(root), cache_dir=str(tmp_path / "cache"), **options)


def test_real_cifar10(cifar10):
    assert (cifar10.train.images.shape, cifar10.test.images.shape) == ((50_000, 32, 32, 3), (10_000, 32, 32, 3))
    assert np.bincount(cifar10.train.labels).tolist() == [5000] * 10
    assert np.bincount(cifar10.test.labels).tolist() == [1000] * 10
    assert cifar10.class_names == (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
    )  # fmt: skip
