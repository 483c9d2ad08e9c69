"""Places that cannot be written, runs that are damaged, losses that are no numbers; and what holds for any input."""

import contextlib
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import (
    FIELDS,
    TINY,
    Silent,
    command,
    files_below,
    flip_bit,
    full_disk,
    is_one_error,
    narrow_networks,
    tiny_run,
    without_pictures,
)
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.numpy import load_file

from cifar_jax.config import PRESETS, TrainConfig
from cifar_jax.config.option_groups import GROUP_OF
from cifar_jax.data import balanced_subset, epoch_batches, hold_out
from cifar_jax.errors import UserError
from cifar_jax.experiment import train
from cifar_jax.files import load_arrays, replacing, save_arrays, write_json
from cifar_jax.runs.directory import CHECKPOINTS, CONFIG, INPUTS, METRICS, SUMMARY
from cifar_jax.runs.ending import Interrupted
from cifar_jax.runs.reader import load_run

FAST = settings(max_examples=30, deadline=None)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    return tiny_run(tmp_path_factory).path


@pytest.fixture
def run(finished, tmp_path):
    """A finished run that may be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def try_to_train(capsys, out, *more):
    return command(capsys, "train", *TINY, "--epochs", 1, "--out", out, *more)


# ---------------------------------------------------------------------------------------------------------------------
# Where a run cannot be written


def a_file(path):
    path.write_text("notes")
    return path


def below_a_file(path):
    return a_file(path) / "runs" / "first"


def a_link_to_nothing(path):
    path.symlink_to(path.with_name("nowhere"))
    return path


def a_link_to_a_file(path):
    path.symlink_to(a_file(path.with_name("file")))
    return path


def a_directory_of_other_files(path):
    path.mkdir()
    a_file(path / "thesis.tex")
    return path


def a_directory_of_hidden_files(path):
    path.mkdir()
    a_file(path / ".hidden")
    return path


def another_programs_directory(path):
    """A directory as Hugging Face makes them, whose config.json and checkpoints are not ours to remove."""
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "resnet"}')
    return path


def a_name_too_long(path):
    return path.with_name("x" * 300)


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    ("make", "part"),
    [
        (a_file, "is a file; choose a directory"),
        (below_a_file, "is a file; choose another directory"),
        (a_link_to_nothing, "is a broken symlink"),
        (a_link_to_a_file, "is a file; choose a directory"),
        (a_directory_of_other_files, "holds other files (thesis.tex, ...)"),
        (a_directory_of_hidden_files, "holds other files (.hidden, ...)"),
        (another_programs_directory, "holds other files (checkpoints, ...)"),
        (a_name_too_long, "cannot be used (File name too long)"),
    ],
)
def test_places_that_cannot_be_written(tmp_path, capsys, make, part, overwrite):
    out = make(tmp_path / "out")
    before = files_below(tmp_path)
    is_one_error(try_to_train(capsys, out, *overwrite), 2, "--out ", part)
    assert files_below(tmp_path) == before


def test_a_run_is_replaced_only_when_asked_to(tmp_path, capsys, narrow, run):
    a_file(run / "my notes.txt")
    (run / CHECKPOINTS / "9999").mkdir()
    before = files_below(run)
    is_one_error(try_to_train(capsys, run), 2, "already holds a run; choose another directory or --overwrite it")
    inside = run / "backbone.safetensors"
    is_one_error(try_to_train(capsys, run, "--overwrite", "--weights", inside), 2, "lies in the run that --overwrite")
    assert files_below(run) == before
    assert try_to_train(capsys, run, "--overwrite").code == 0
    assert (run / "my notes.txt").read_text() == "notes"
    assert json.loads((run / SUMMARY).read_text())["epochs"] == 1
    assert [path.name for path in (run / CHECKPOINTS).iterdir()] == ["0001"]
    assert not (run / "curves.png").exists()  # of the run that was there


def test_a_run_whose_configuration_is_damaged_is_told_from_other_files(run, capsys):
    (run / CONFIG).write_text("")
    before = files_below(run)
    is_one_error(try_to_train(capsys, run, "--resume"), 2, f"{run / CONFIG} cannot be read")
    assert files_below(run) == before


def test_a_link_to_a_directory_is_followed_and_stays(tmp_path, capsys, narrow):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert try_to_train(capsys, tmp_path / "out").code == 0
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / SUMMARY).is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Disks that fill up, losses that are no numbers


@pytest.mark.parametrize(("room", "code", "left"), [(100, 2, []), (2_600, 1, [CONFIG, INPUTS, SUMMARY])])
def test_a_disk_that_fills_up_fails_the_run_in_one_sentence(tmp_path, capsys, narrow, room, code, left):
    """While config.json is written, and while the backbone is."""
    with full_disk(at=room):
        result = try_to_train(capsys, tmp_path / "out")
    is_one_error(result, code, f"{tmp_path / 'out'} cannot be written", "File too large", "choose another")
    assert files_below(tmp_path / "out") == left


@pytest.mark.parametrize("name", [METRICS, "checkpoint.json", SUMMARY, "curves.png"])
def test_any_file_of_a_run_may_fail(tmp_path, capsys, monkeypatch, name):
    narrow_networks(monkeypatch)
    if name != "curves.png":
        without_pictures(monkeypatch)
    replace = os.replace

    def fail(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    result = try_to_train(capsys, tmp_path / "out")
    is_one_error(result, 1, str(tmp_path / "out"), "written (", "No space left on device)", "choose another --out")
    left = {Path(path).name for path in files_below(tmp_path / "out")}
    if name != SUMMARY:
        assert json.loads((tmp_path / "out" / SUMMARY).read_text())["status"] == "failed"
    assert name not in left and not [path for path in left if path.startswith(".")]


def test_a_cache_that_cannot_be_written_only_warns(tmp_path, capsys, narrow, own_compile_cache):
    a_file(tmp_path / "cache")
    result = try_to_train(capsys, tmp_path / "out", "--cache-dir", tmp_path / "cache")
    assert result.code == 0 and result.err.count("The features could not be saved in") == 2
    assert result.err.count("Cannot save compiled functions in") == 1


@pytest.mark.parametrize("mode", ["cached", "live"])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, capsys, narrow, mode):
    out = tmp_path / "out"
    result = try_to_train(capsys, out, "--learning-rate", "1e30", "--mode", mode)
    is_one_error(
        result,
        1,
        "Loss or gradient was not finite in epoch 1, step 2 (first the loss)",
        "The learning rate was 5e+29.",
        f"Continue with a lower --learning-rate and --resume --out {out}, or start again",
    )
    summary = json.loads((out / SUMMARY).read_text())
    assert (summary["status"], summary["epochs"], summary["val_accuracy"]) == ("diverged", 0, None)
    assert not (out / CHECKPOINTS).exists()  # no epoch was done
    is_one_error(command(capsys, "evaluate", out, "--allow-incomplete"), 2, "diverged after 0 of", "no trained head")
    result = try_to_train(capsys, out, "--learning-rate", "0.01", "--mode", mode, "--resume")
    assert result.code == 0 and json.loads((out / SUMMARY).read_text())["status"] == "complete"


def test_ctrl_c_before_the_first_epoch_leaves_a_summary(tmp_path, narrow):
    out = tmp_path / "out"

    class Interrupting(Silent):
        def progress(self, description, total, compiles=False):
            if description.startswith("Features"):
                signal.raise_signal(signal.SIGINT)
            return super().progress(description, total, compiles)

    config = TrainConfig(dataset="shapes", train_examples=64, test_examples=10, out=str(out))
    with pytest.raises(Interrupted) as caught:
        train(config, Interrupting(), backbone=FIELDS)
    assert (caught.value.path, caught.value.saved) == (out, (0, 0))
    summary = json.loads((out / SUMMARY).read_text())
    assert (summary["status"], summary["epochs"], summary["val_loss"]) == ("interrupted", 0, None)


# ---------------------------------------------------------------------------------------------------------------------
# Runs that are none, or damaged


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda run: (run / SUMMARY).unlink(), ["has not ended: it has no summary.json", "continue it with --resume"]),
        (lambda run: (run / CONFIG).unlink(), ["is not a run directory: it has no config.json"]),
        (lambda run: (run / SUMMARY).write_text("{"), [SUMMARY, "cannot be read"]),
        (lambda run: (run / SUMMARY).write_bytes(b"\xff\xfe{}"), [SUMMARY, "cannot be read"]),
        (lambda run: (run / SUMMARY).write_text("[1]"), [SUMMARY, "does not hold what `train` writes"]),
        (lambda run: (run / SUMMARY).write_text("{}"), ["was written by another version"]),
        (lambda run: edit(run / SUMMARY, format_version=99), ["was written by another version"]),
        (lambda run: edit(run / SUMMARY, dataset=None), [SUMMARY, "is not as `train` wrote it"]),
        (lambda run: edit(run / SUMMARY, dataset={"class_names": 3}), [SUMMARY, "is not as `train` wrote it"]),
        (lambda run: edit(run / SUMMARY, backbone={}), [SUMMARY, "is not as `train` wrote it"]),
        (lambda run: edit(run / SUMMARY, dataset={"class_names": ["a", "b"]}), ["checkpoints/0002"]),
        (lambda run: (run / CONFIG).write_text(""), [CONFIG, "cannot be read"]),
        (lambda run: edit(run / CONFIG, epochs="4"), [CONFIG, "--epochs must be a whole number, got '4'"]),
        (lambda run: edit(run / CONFIG, colour="red"), [CONFIG, "unknown fields: colour"]),
        (lambda run: edit(run / CONFIG, hidden=[16]), ["checkpoints/0002"]),
        (lambda run: edit(run / CONFIG, hidden=[8, 8]), ["checkpoints/0002"]),
        (lambda run: shutil.rmtree(run / CHECKPOINTS), ["There is no checkpoint in", "Train first"]),
        (lambda run: (run / CHECKPOINTS / "0002" / "arrays.safetensors").unlink(), ["checkpoints/0002", "Train again"]),
        (lambda run: (run / CHECKPOINTS / "0002" / "checkpoint.json").write_text("{}"), ["checkpoints/0002"]),
        (lambda run: (run / "backbone.safetensors").unlink(), ["needs the backbone", "SHA-256", "--weights"]),
        (
            lambda run: flip_bit(run / "backbone.safetensors"),
            ["needs the backbone", "backbone.safetensors is another file"],
        ),
    ],
)
def test_damaged_runs(run, picture, capsys, damage, parts):
    damage(run)
    before = files_below(run)
    is_one_error(command(capsys, "predict", run, picture), 2, str(run), *parts)
    assert files_below(run) == before


@pytest.mark.parametrize("name", ["arrays.safetensors", "checkpoint.json"])
def test_a_corrupt_checkpoint_is_not_used_to_predict(run, name):
    path = run / CHECKPOINTS / "0002" / name
    whole = path.read_bytes()
    # What is read is checked: of the arrays the head's, which lie between others.
    kernel = load_file(run / CHECKPOINTS / "0002" / "arrays.safetensors")["params/head/0/kernel"]
    flip_bit(path, whole.find(kernel.tobytes()) / len(whole) if name == "arrays.safetensors" else 0.5)
    with pytest.raises(UserError, match="checkpoints/0002"):
        load_run(run)
    path.write_bytes(whole)
    assert load_run(run).class_names[0] == "disc"


@pytest.mark.parametrize("what", ["nowhere", ".", "picture.png", "x" * 300])
@pytest.mark.parametrize("verb", ["predict", "evaluate"])
def test_directories_that_are_no_runs(tmp_path, capsys, picture, what, verb):
    images = [picture] if verb == "predict" else []
    is_one_error(command(capsys, verb, tmp_path / what, *images), 2, str(tmp_path / what), "name a")


def test_a_backbone_that_moved_is_taken_from_where_it_is_said_to_be(run, tmp_path, picture, capsys):
    whole = command(capsys, "predict", run, picture)
    moved = (run / "backbone.safetensors").rename(tmp_path / "moved.safetensors")
    digest = json.loads((run / SUMMARY).read_text())["backbone"]["sha256"]
    is_one_error(command(capsys, "predict", run, picture), 2, digest, "name a copy of it with --weights")
    other = shutil.copy(moved, tmp_path / "other.safetensors")
    flip_bit(other)
    result = command(capsys, "predict", run, picture, "--weights", other)
    is_one_error(result, 2, digest, f"{other} is another file")
    assert command(capsys, "predict", run, picture, "--weights", moved) == whole
    assert command(capsys, "evaluate", run, "--weights", moved).code == 0


def test_other_test_images_are_not_scored(run, capsys):
    edit(run / CONFIG, seed=1)
    is_one_error(command(capsys, "evaluate", run), 2, "are not those that the run", "--data-dir")


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": "4"},
        {"epochs": 4.0},
        {"epochs": True},
        {"epochs": None},
        {"batch_size": [64]},
        {"learning_rate": float("nan")},
        {"hidden": 16},
        {"hidden": [[16]]},
        {"hidden": [0]},
        {"image_size": 31},
        {"seed": -1},
        {"val_fraction": 1},
        {"shuffle": "no"},
        {"mode": "eager"},
        {"weights": 3},
        {"preset": "imagenet"},
        {"learning-rate": 0.1},
    ],
)
def test_a_configuration_that_cannot_be_is_refused(fields):
    (name,) = fields
    with pytest.raises(UserError, match=f"{name}|{name.replace('_', '-')}"):
        TrainConfig.from_json(json.loads(json.dumps(fields)))


optional = st.none() | st.integers(1, 10**6)
texts = st.none() | st.text()
names = st.text().filter(str.strip)
paths = st.none() | names
configs = st.builds(
    TrainConfig,
    preset=st.sampled_from(sorted(PRESETS)),
    dataset=names,
    data_dir=paths,
    weights=names,
    variant=texts,
    image_size=st.none() | st.integers(1, 100).map(lambda n: 32 * n),
    mode=st.sampled_from(["cached", "live"]),
    epochs=st.integers(1, 10**6),
    batch_size=st.integers(1, 10**6),
    learning_rate=st.floats(0, exclude_min=True, allow_infinity=False),
    momentum=st.floats(0, 1, exclude_max=True),
    hidden=st.lists(st.integers(1, 10**6)).map(tuple),
    seed=st.integers(0, 2**31 - 1),
    train_examples=optional,
    test_examples=optional,
    val_fraction=st.floats(0, 1, exclude_max=True),
    shuffle=st.booleans(),
    precision=st.sampled_from(["float32", "bfloat16"]),
    extract_batch_size=optional,
    out=paths,
    overwrite=st.booleans(),
)


@FAST
@given(configs)
def test_a_configuration_survives_its_json(config):
    text = json.dumps(config.to_json(), allow_nan=False)
    assert TrainConfig.from_json(json.loads(text)) == config
    assert set(json.loads(text)) == {"preset", *GROUP_OF}


# ---------------------------------------------------------------------------------------------------------------------
# What holds for any data set


# Of few sizes, as JAX compiles a permutation anew for each.
labelled = st.sampled_from([1, 2, 11, 60]).flatmap(
    lambda size: st.lists(st.integers(0, 4), min_size=size, max_size=size).map(lambda lst: np.array(lst, np.int32))
)


@FAST
@given(labelled, st.data(), st.integers(0, 99))
def test_balanced_subsets_are_balanced(labels, data, seed):
    num = data.draw(st.integers(1, len(labels)))
    subset = balanced_subset(labels, num, jax.random.key(seed))
    assert len(subset) == num and (np.diff(subset) > 0).all() and subset[0] >= 0 and subset[-1] < len(labels)
    np.testing.assert_array_equal(subset, balanced_subset(labels, num, jax.random.key(seed)))
    # As many of each class as of any other to one, but for those that have run out.
    there, taken = (np.bincount(of, minlength=5) for of in (labels, labels[subset]))
    assert taken[taken < there].min(initial=num) >= taken.max() - 1


@FAST
@given(labelled, st.floats(0, 1), st.integers(0, 99))
def test_held_out_images_are_the_rest(labels, fraction, seed):
    num = round(fraction * len(labels))
    if not 0 < num < len(labels):
        with pytest.raises(UserError, match="leaves images on both sides"):
            hold_out(labels, fraction, jax.random.key(seed))
        return
    kept, held = hold_out(labels, fraction, jax.random.key(seed))
    assert len(held) == num
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(labels)))


@FAST
@given(st.sampled_from([1, 2, 60, 61]), st.integers(1, 70), st.integers(0, 9), st.booleans())
def test_an_epoch_visits_each_example_once(num, batch_size, epoch, shuffle):
    indices, counts = epoch_batches(jax.random.key(0), epoch, num, batch_size, shuffle)
    assert indices.shape == (-(-num // batch_size), batch_size) and counts.shape == indices.shape[:1]
    visited = np.concatenate([index[:count] for index, count in zip(indices, counts, strict=True)])
    np.testing.assert_array_equal(np.sort(visited), np.arange(num))
    assert (counts[:-1] == batch_size).all() and counts[-1] >= 1
    assert shuffle or (visited == np.arange(num)).all()


def test_an_epoch_of_cifar10_has_the_steps_that_keras_counts():
    indices, counts = epoch_batches(jax.random.key(0), 0, 50_000, 64)
    assert indices.shape == (782, 64) and counts[-1] == 16 and counts.sum() == 50_000
    later, _ = epoch_batches(jax.random.key(0), 1, 50_000, 64)
    assert (indices != later).mean() > 0.99


# ---------------------------------------------------------------------------------------------------------------------
# What holds for any file


@pytest.mark.parametrize("value", [{1, 2}, {"deep": [float("inf")]}])
def test_what_is_no_json_leaves_the_old_file(tmp_path, value):
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, value)
    assert files_below(tmp_path) == ["file.json"] and json.loads(path.read_text()) == {"old": 1}


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with full_disk(at=1000), pytest.raises(OSError, match="too large"):
        write_json(path, "x" * 2000)
    with contextlib.suppress(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert files_below(tmp_path) == ["file.json"] and json.loads(path.read_text()) == {"old": 1}
    write_json(path, {"new": 2})
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


ARRAYS = {"images": np.arange(12, dtype=np.float32).reshape(3, 4), "labels": np.arange(3, dtype=np.int32)}
ABOUT = {"class_names": ["cat", "dög"], "version": "1.0.0"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    directory = tmp_path_factory.mktemp("arrays") / "kept"
    save_arrays(directory, ARRAYS, ABOUT)
    return directory


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["images.npy", "labels.npy", "index.json"]), st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_is_noticed_wherever_it_is(kept, name, position, bit):
    """Or it changes nothing that is read, such as a blank between two values."""
    path = kept / name
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[position % len(whole)] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        arrays, about = load_arrays(kept)
    except ValueError as error:
        assert str(kept) in str(error)  # noqa: PT017 (it need not be raised)
    else:
        assert about == ABOUT
        for array, expected in ARRAYS.items():
            np.testing.assert_array_equal(arrays[array], expected, strict=True)
    finally:
        path.write_bytes(whole)


def test_arrays_that_cannot_be_written_leave_nothing(tmp_path):
    with full_disk(at=1000), pytest.raises(OSError, match=r"too large|requested"):
        save_arrays(tmp_path / "kept", {"a": np.zeros(1000)}, {})
    assert files_below(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path / "kept")


def test_arrays_that_are_there_already_stay(tmp_path):
    """Two processes may make the same directory at once: their content is the same."""
    for _ in range(2):
        save_arrays(tmp_path / "kept", ARRAYS, ABOUT)
    assert load_arrays(tmp_path / "kept")[1] == ABOUT and len(list(tmp_path.iterdir())) == 1
