"""Tests of the cache: its contents, its limit, and removal of only what it wrote."""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
from features.test_cache import IMAGES, WIDTH, Extractor
from features.test_extractor import MEANS
from helpers import command, files_below, is_one_error

from cifar_jax.config import TrainConfig
from cifar_jax.data import Dataset
from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.features.cache import cached_features
from cifar_jax.features.extraction import dataset_features
from cifar_jax.files import save_arrays
from cifar_jax.runtime.caches import FEATURES, clear, contents, limit_features, locked

ENTRY_BYTES = 3 * (1024 * WIDTH * 4 + 4)


def name_of(number):
    return f"{number:032x}"


def keep(root, *numbers):
    """Caches features, each entry used a minute after the one before."""
    extract = Extractor().stream
    about = {"what": "features of drawn images", "backbone": "a backbone"}
    for number in numbers:
        cached_features(root / FEATURES / name_of(number), IMAGES, extract, WIDTH, about=about)
        os.utime(root / FEATURES / name_of(number) / "about.json", (0, 60 * number))


def kept(root):
    return [int(path.name, 16) for path in sorted((root / FEATURES).iterdir())]


@pytest.mark.parametrize(
    ("entries", "in_use", "left"),
    [
        (10, [], [1, 2, 3, 4]),
        (3.5, [], [2, 3, 4]),
        (2.5, [], [3, 4]),
        (2.5, [1], [1, 4]),
        (0, [], []),
        (0, [2, 3], [2, 3]),
    ],
)
def test_least_recently_used_features_are_evicted_first(tmp_path, log_messages, entries, in_use, left):
    keep(tmp_path, 3, 1, 4, 2)
    log_messages.clear()
    limit_features(tmp_path, entries * ENTRY_BYTES, [name_of(number) for number in in_use])
    assert kept(tmp_path) == left
    assert len(log_messages) == (len(left) < 4) and all(
        "GB of least recently used features (--cache-limit)" in text for text in log_messages
    )


def test_reading_counts_as_use(tmp_path):
    keep(tmp_path, 1, 2)
    cached_features(tmp_path / FEATURES / name_of(1), IMAGES, None, WIDTH)  # all of it is there
    limit_features(tmp_path, 1.5 * ENTRY_BYTES, [])
    assert kept(tmp_path) == [1]


def test_entries_in_use_by_another_process_are_kept(tmp_path, log_messages):
    keep(tmp_path, 1, 2)
    with locked(tmp_path / FEATURES / name_of(1), pytest.fail):
        limit_features(tmp_path, 0, [])
        assert kept(tmp_path) == [1]
        log_messages.clear()
        assert clear(tmp_path) == 0
    assert kept(tmp_path) == [1] and "another process is using it" in log_messages[0] and len(log_messages) == 1


def test_directory_removed_while_waiting_for_its_lock_is_created_again(tmp_path):
    path = tmp_path / "entry"
    with contextlib.ExitStack() as holder:
        holder.enter_context(locked(path, pytest.fail))

        def remove() -> None:
            shutil.rmtree(path)
            holder.close()

        with locked(path, remove):
            assert (path / "lock").exists()
            with pytest.raises(BlockingIOError), locked(path, refuse):
                pass


def refuse():
    raise BlockingIOError


def test_contents(tmp_path):
    keep(tmp_path, 1)
    save_arrays(tmp_path / "data" / "tiny-1.0.0-abc", {"train_images": np.zeros(10)}, {})
    (tmp_path / "weights" / "some").mkdir(parents=True)
    (tmp_path / "weights" / "some" / "some.h5").write_bytes(b"12345")
    (tmp_path / "xla").mkdir()
    features, *others = contents(tmp_path)
    assert features.about.items() >= {"what": "features of drawn images", "images": len(IMAGES)}.items()
    assert features.last_used == 60 and ENTRY_BYTES < features.size < ENTRY_BYTES + 1000
    found = {entry.kind: entry.size for entry in others}
    assert list(found) == ["decoded images", "weights", "compiled functions"] and found["weights"] == 5
    for damage in ("{", "[]"):
        (features.path / "about.json").write_text(damage)
        assert (contents(tmp_path)[0].kind, contents(tmp_path)[0].about) == ("features", {})
    assert contents(tmp_path / "nothing") == []


def test_clear_removes_only_files_that_the_cache_wrote(tmp_path, log_messages):
    root, outside = tmp_path / "cache", tmp_path / "outside"
    keep(root, 1, 2, 3)
    keep(outside, 4)
    save_arrays(root / "data" / "tiny", {"train_images": np.zeros(10)}, {})
    (root / "xla").mkdir()
    (root / "xla" / f"jit_f-{'0' * 64}-cache").write_bytes(b"123")
    for name in ("c/0/0.__lock", ".about.json.x1.json"):  # left by kills
        (root / "features" / name_of(1) / name).touch()
    theirs = [
        root / "features" / "notes.txt",
        root / "features" / name_of(2) / "notes.txt",
        root / "features" / "empty" / "too",
        root / "data" / "tiny" / "notes.txt",
        root / "xla" / "notes.txt",
        root / "weights" / "some" / "some.h5",
        root / "others" / "about.json",
    ]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    # Links out of the cache: in place of an entry, of a part of one, and of a file.
    (root / "features" / name_of(5)).symlink_to(outside / FEATURES / name_of(4))
    (root / "features" / name_of(3) / "c" / "7").symlink_to(outside / FEATURES / name_of(4) / "c" / "0")
    (root / "data" / "linked").symlink_to(outside)
    before = files_below(outside)
    log_messages.clear()
    assert clear(root) > 3 * ENTRY_BYTES
    assert files_below(outside) == before
    assert all(path.read_text() == "mine" for path in theirs)
    left = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert sorted(left) == sorted(theirs)
    assert not (root / FEATURES / name_of(1)).exists() and len(log_messages) == 3
    assert all("is kept: the cache did not write it" in text for text in log_messages)


def test_symlinked_folder_is_not_followed(tmp_path, log_messages):
    root, outside = tmp_path / "cache", tmp_path / "outside"
    keep(outside, 1)
    root.mkdir()
    (root / FEATURES).symlink_to(outside / FEATURES)
    before = files_below(outside)
    log_messages.clear()
    assert clear(root) == 0
    limit_features(root, 0, [])
    assert files_below(outside) == before and str(root / FEATURES) in log_messages[0]


def test_info_shows_the_cache_and_clears_it(tmp_path, capsys):
    assert "nothing" in command(capsys, "info", "cache", "--cache-dir", tmp_path).out
    keep(tmp_path, 1)
    rows = json.loads(command(capsys, "info", "cache", "--json", "--cache-dir", tmp_path).out)["cache"]
    assert [(row["images"], row["backbone"]) for row in rows] == [(len(IMAGES), "a backbone")]
    shown = command(capsys, "info", "cache", "--cache-dir", tmp_path)
    assert shown.code == 0 and "features of drawn images" in shown.out and name_of(1) in shown.out
    cleared = command(capsys, "info", "cache", "--clear", "--cache-dir", tmp_path)
    assert cleared.code == 0 and cleared.out.startswith("0.1 MB have left") and kept(tmp_path) == []
    assert json.loads(command(capsys, "info", "cache", "--clear", "--json", "--cache-dir", tmp_path).out) == {
        "cache": str(tmp_path),
        "freed_bytes": 0,
    }
    is_one_error(command(capsys, "info", "--clear", "--cache-dir", tmp_path), 2, "--clear goes with `info cache`")


def test_extraction_evicts_all_features_but_its_own(tmp_path, log_messages):
    keep(tmp_path, 1)
    config = TrainConfig(cache_dir=str(tmp_path), cache_limit=0.0)
    datasets = {f"images {seed}": Dataset(*draw_shapes(20, seed)) for seed in (0, 1)}
    extracted = dataset_features(config, MEANS, 32, datasets)
    own = kept(tmp_path)
    assert extracted.num_images == 40 and len(own) == 2 and 1 not in own
    assert "GB of least recently used features (--cache-limit)" in log_messages[-1]
    assert dataset_features(config, MEANS, 32, datasets).num_images == 0 and kept(tmp_path) == own
