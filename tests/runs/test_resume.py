"""Runs that were stopped: the same bits as undisturbed ones, and one sentence where there is nothing to go on with."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from helpers import TINY, Heard, command, flip_bit, is_one_error

from cifar_jax import load_backbone, load_run, save_backbone
from cifar_jax.cli.console import ConsoleReporter
from cifar_jax.config import TrainConfig
from cifar_jax.data.sources import shapes
from cifar_jax.errors import UserError
from cifar_jax.experiment import train
from cifar_jax.files import write_json
from cifar_jax.runs.checkpoint import Position, list_checkpoints, position_of
from cifar_jax.runs.directory import CHECKPOINTS, SUMMARY
from cifar_jax.runs.predict import evaluate_run
from cifar_jax.runs.resume import selected_epoch
from cifar_jax.runs.writer import RunWriter
from cifar_jax.runtime.progress import EpochRow
from cifar_jax.train.loop import Diverged

# Everything that a resumed run might draw or count anew: augmentation, order, schedule, momentum, statistics.
FULL = {
    "mode": "finetune",
    "augment": ("flip", "crop", "cutout"),
    "momentum": 0.9,
    "nesterov": True,
    "schedule": "cosine",
    "warmup_epochs": 1.0,
    "weight_decay": 1e-3,
    "clip_norm": 1.0,
    "label_smoothing": 0.1,
    "bn_momentum": 0.9,
    "freeze_stages": 1,
    "zero_gamma": True,
}
WAYS = {
    "finetune": FULL,
    "cached": {"momentum": 0.9, "val_fraction": 0.25},
    "live": {"mode": "live", "augment": ("flip", "crop"), "momentum": 0.9},
}


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


pytestmark = pytest.mark.usefixtures("narrow")


def config(tmp_path, way, out, **more):
    return TrainConfig(
        **{
            "dataset": "shapes",
            "weights": "random-w16",
            "image_size": 32,
            "train_examples": 72,
            "test_examples": 20,
            "epochs": 3,
            "hidden": (8,),
            "batch_size": 32,
            "learning_rate": 0.1,
            "cache_dir": str(tmp_path / "cache"),
            "out": str(tmp_path / out),
        }
        | WAYS[way]
        | more
    )


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("seconds", "val_split")} for row in rows]


def same_bits(a, b):
    assert rows_of(a) == rows_of(b)
    runs = load_run(a), load_run(b)
    assert runs[0].summary["selected_epoch"] == runs[1].summary["selected_epoch"]
    for x, y in zip(*(jax.tree.leaves((run.backbone.variables, run.head_params)) for run in runs), strict=True):
        np.testing.assert_array_equal(x, y)


def hidden_files(run):
    return [path for path in run.rglob(".*") if path.name.startswith(".")]


@contextmanager
def killed_at(position, before_checkpoint=False):
    """The run in the block dies once the checkpoint of that position is there, or just before it would be."""
    usual = RunWriter.checkpoint

    def checkpoint(self, state, part=None):
        here = (len(self.history), len(part.metrics.num) if part else 0) == position
        if not (before_checkpoint and here):
            usual(self, state, part)
        if here:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunWriter, "checkpoint", checkpoint)
        with pytest.raises(Killed):
            yield


@pytest.mark.parametrize(
    ("way", "position", "before_checkpoint"),
    [
        ("finetune", (1, 2), False),
        ("cached", (2, 0), False),
        ("cached", (1, 1), False),
        ("cached", (2, 0), True),
        ("live", (1, 1), False),
    ],
)
def test_goes_on_to_the_same_bits(tmp_path, way, position, before_checkpoint):
    every = {"checkpoint_every": 1} if position[1] else {}
    undisturbed = train(config(tmp_path, way, "undisturbed", **every))
    stopped = config(tmp_path, way, "stopped", resume=True, **every)
    with killed_at(position, before_checkpoint):
        train(stopped)
    # What a kill in the midst of writing leaves.
    (tmp_path / "stopped" / CHECKPOINTS / ".0003.half").mkdir()
    (tmp_path / "stopped" / ".metrics.jsonl.half.jsonl").touch()
    resumed = train(stopped)
    same_bits(resumed, undisturbed)
    assert hidden_files(resumed) == []
    newest = [position_of(path) for path in list_checkpoints(resumed / CHECKPOINTS)]
    steps = 1 if way == "cached" else 2  # of the last epoch, before its last one
    before = Position(2, steps if every else 0)
    selected = Position(load_run(resumed).summary["selected_epoch"])
    # With held-out images a checkpoint is of no use without that of the epoch selected until then.
    rows = [EpochRow(**row, seconds=0) for row in rows_of(resumed)]
    needed = {Position(selected_epoch(rows[:2], True))} if load_run(resumed).config.val_fraction else set()
    assert newest == sorted({before, Position(3), selected} | needed)


@pytest.mark.parametrize(("way", "every"), [("cached", 1), ("cached", 3), ("live", 2), ("finetune", 2)])
def test_where_checkpoints_are_made_changes_no_bit_of_steps(tmp_path, way, every):
    """Of an epoch that is one compiled call neither, which they cut into pieces, single steps among them."""
    smaller = {"batch_size": 8} if way == "cached" else {}
    often = train(config(tmp_path, way, "often", checkpoint_every=every, **smaller))
    same_bits(often, train(config(tmp_path, way, "seldom", **smaller)))


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, None), (None, 2)])
def test_checkpoints_may_be_made_elsewhere_once_a_run_is_resumed(tmp_path, said, before, after):
    undisturbed = train(config(tmp_path, "cached", "undisturbed", batch_size=8))
    stopped = config(tmp_path, "cached", "stopped", batch_size=8, resume=True, checkpoint_every=before)
    with killed_at((1, before or 0)):
        train(stopped)
    resumed = train(replace(stopped, checkpoint_every=after))
    assert any("Resuming the run" in text for text in said)
    same_bits(resumed, undisturbed)
    assert json.loads((resumed / "config.json").read_text())["checkpoint_every"] == after


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(tmp_path, said):
    undisturbed = train(config(tmp_path, "cached", "undisturbed"))
    stopped = config(tmp_path, "cached", "stopped", resume=True)
    with killed_at((2, 0)):
        train(stopped)
    flip_bit(tmp_path / "stopped" / CHECKPOINTS / "0002" / "arrays.safetensors")
    said.clear()
    same_bits(train(stopped), undisturbed)
    assert any("0002 is corrupt" in text and "using the one before it" in text for text in said)
    assert any("Resuming the run" in text and "after 1 epoch." in text for text in said)


@pytest.mark.parametrize(
    ("way", "more"), [("cached", {}), ("cached", {"val_fraction": 0.0, "checkpoint_every": 1}), ("finetune", {})]
)
def test_a_finished_run_goes_on_from_the_checkpoint_before_a_corrupt_one(tmp_path, said, way, more):
    """Whatever that one needs was kept as well, and nothing was removed before that was known."""
    longer = {"epochs": 4} if way == "cached" else {"schedule": "constant", "warmup_epochs": 0.0, "epochs": 4}
    undisturbed = train(config(tmp_path, way, "undisturbed", **more | longer))
    run = train(config(tmp_path, way, "run", **more | longer | {"epochs": 3}))
    flip_bit(run / CHECKPOINTS / "0003" / "arrays.safetensors")
    said.clear()
    same_bits(train(config(tmp_path, way, "run", **more | longer, resume=True)), undisturbed)
    assert any("0003 is corrupt" in text for text in said)


def test_a_run_that_another_process_continued_meanwhile_is_left_alone(tmp_path):
    stopped = config(tmp_path, "cached", "run", resume=True)
    with killed_at((1, 0)):
        train(stopped)

    class Overtaken(Heard):
        def header(self, rows):
            train(stopped)  # between the look at the directory and the first file

    with pytest.raises(UserError, match="Another process continued the run in"):
        train(stopped, Overtaken())
    run = tmp_path / "run"
    assert len(rows_of(run)) == 3 and load_run(run).summary["status"] == "complete"


@pytest.mark.parametrize("content", ["", "{}\n", "not JSON\n", None])
def test_damaged_metrics_are_written_again_from_the_checkpoint(tmp_path, said, content):
    stopped = config(tmp_path, "cached", "stopped", resume=True)
    with killed_at((2, 0)):
        train(stopped)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole.replace("0", "1", 3) if content is None else content)
    said.clear()
    assert train(stopped)
    assert metrics.read_text().startswith(whole)
    assert any("metrics.jsonl is missing or corrupt" in text for text in said)


def test_what_it_was_trained_on_may_not_change_under_the_same_name(tmp_path, monkeypatch):
    stopped = config(tmp_path, "cached", "stopped", resume=True)
    with killed_at((1, 0)):
        train(stopped)
    drawn = shapes.draw_shapes
    monkeypatch.setattr(shapes, "draw_shapes", lambda *a, **k: (255 - drawn(*a, **k)[0], drawn(*a, **k)[1]))
    other = replace(stopped, cache_dir=str(tmp_path / "other"))
    with pytest.raises(UserError, match="its training images and test images and validation images and weights have"):
        train(other)
    assert list_checkpoints(tmp_path / "stopped" / CHECKPOINTS)


def test_the_command_asks_whether_to_resume_its_own_unfinished_run(tmp_path, capsys, monkeypatch):
    run, question = tmp_path / "run", f"{tmp_path / 'run'} holds this run, unfinished. Resume it?"
    arguments = ["train", *TINY, "--schedule", "constant", "--cache-dir", tmp_path / "cache", "--epochs", "2"]
    with killed_at((1, 0)):
        command(capsys, *arguments, "--out", run)
    asked = []

    def answers(answer):
        monkeypatch.setattr(ConsoleReporter, "confirm", lambda _, text: asked.append(text) or answer)

    answers(False)
    refused = command(capsys, *arguments, "--out", run)
    is_one_error(refused, 2, "already holds a run; choose another directory or --overwrite it, or --resume")
    answers(True)
    other = command(capsys, *arguments, "--out", run, "--seed", "1")  # another run: it is not even asked
    is_one_error(other, 2, "already holds a run")
    assert asked == [question]
    resumed = command(capsys, *arguments, "--out", run)
    assert resumed.code == 0 and f"Resuming the run in {run} after 1 epoch." in resumed.err
    assert command(capsys, *arguments, "--out", tmp_path / "undisturbed").code == 0
    same_bits(run, tmp_path / "undisturbed")


def test_a_finetuned_run_reads_back_with_its_own_backbone(tmp_path):
    run = train(config(tmp_path, "finetune", "run", val_fraction=0.25))
    summary = json.loads((run / SUMMARY).read_text())
    assert evaluate_run(run)["test_accuracy"] == summary["test_accuracy"]
    read = load_run(run)
    assert (
        read.backbone.sha256 == summary["backbone"]["sha256"] and "trained on shapes" in summary["backbone"]["source"]
    )
    assert read.backbone.variant == "trained from random weights"


def test_a_finished_run_is_left_alone_and_more_epochs_go_on(tmp_path):
    plain = config(tmp_path, "cached", "run", epochs=1, resume=True)
    run = train(plain)
    before = (run / SUMMARY).stat().st_mtime_ns
    assert train(plain) == run and (run / SUMMARY).stat().st_mtime_ns == before
    longer = train(replace(plain, epochs=3))
    assert rows_of(longer) == rows_of(train(config(tmp_path, "cached", "undisturbed")))
    assert json.loads((longer / "config.json").read_text())["epochs"] == 3


def test_a_run_that_was_killed_before_its_first_file_was_whole_starts(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.abcdefgh.json").write_text("{")
    run = train(config(tmp_path, "cached", "run", epochs=1))
    assert hidden_files(run) == []


def test_a_run_without_a_checkpoint_starts_again(tmp_path):
    stopped = config(tmp_path, "cached", "run", resume=True)
    with killed_at((1, 0), before_checkpoint=True):
        train(stopped)
    assert len(rows_of(train(stopped))) == 3


def test_another_run_is_not_gone_on_with(tmp_path):
    train(config(tmp_path, "finetune", "run", epochs=2))
    with pytest.raises(UserError, match=r"differs in --seed \(0 there, 1 here\), --momentum|--momentum .*--seed"):
        train(config(tmp_path, "finetune", "run", epochs=2, seed=1, momentum=0.5, resume=True))
    with pytest.raises(UserError, match=r"differs in --epochs \(2 there, 3 here\)"):
        train(config(tmp_path, "finetune", "run", resume=True))  # the cosine would be another one
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match="holds other files"):
        train(config(tmp_path, "finetune", "other", resume=True))


def test_places_may_change_between_a_run_and_its_resumption_and_content_may_not(tmp_path):
    undisturbed = train(config(tmp_path, "cached", "undisturbed"))
    first, second = tmp_path / "one" / "weights.safetensors", tmp_path / "two" / "weights.safetensors"
    for place in (first, second):
        place.parent.mkdir()
        shutil.copy(undisturbed / "backbone.safetensors", place)
    stopped = config(tmp_path, "cached", "stopped", weights=str(first), data_dir=str(tmp_path / "one"), resume=True)
    with killed_at((1, 0)):
        train(stopped)
    moved = replace(stopped, weights=str(second), data_dir=str(tmp_path / "two"))
    backbone = load_backbone(first)
    save_backbone(first, backbone.replace(variables=jax.tree.map(lambda leaf: leaf * 1.5, backbone.variables)))
    with pytest.raises(UserError, match=r"its weights have changed\. Restore them"):
        train(stopped)
    assert rows_of(train(moved)) == rows_of(undisturbed)
    recorded = json.loads((tmp_path / "stopped" / "config.json").read_text())
    assert (recorded["weights"], recorded["data_dir"]) == (str(second), str(tmp_path / "two"))


def test_fewer_epochs_than_are_done_are_refused_and_nothing_changes(tmp_path):
    run = train(config(tmp_path, "cached", "run", epochs=2))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="has 2 epochs done, more than --epochs 1"):
        train(config(tmp_path, "cached", "run", epochs=1, resume=True))
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_places_are_recorded_absolutely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train(replace(config(tmp_path, "cached", "run", epochs=1), data_dir="data", cache_dir="cache", out="run"))
    recorded = json.loads((run / "config.json").read_text())
    assert {recorded[name] for name in ("data_dir", "cache_dir", "out")} == {
        str(tmp_path / name) for name in ("data", "cache", "run")
    }
    assert recorded["weights"] == "random-w16"


def test_a_run_that_diverged_is_not_gone_on_with(tmp_path):
    run = train(config(tmp_path, "cached", "run", epochs=1))
    write_json(run / SUMMARY, json.loads((run / SUMMARY).read_text()) | {"status": "diverged"})
    with pytest.raises(
        UserError, match=r"diverged and would diverge again\. Resume it with a --learning-rate below 0\.1"
    ):
        train(config(tmp_path, "cached", "run", epochs=1, resume=True))


def test_a_run_that_diverged_with_an_optimiser_of_its_own_resumes_with_another_rate_in_it(tmp_path):
    with pytest.raises(Diverged, match=r"Continue with a lower rate in tx and resume=True") as raised:
        train(config(tmp_path, "cached", "run", epochs=2), tx=optax.sgd(float("inf")))
    assert "--learning-rate" not in str(raised.value)
    run = train(config(tmp_path, "cached", "run", epochs=2, resume=True), tx=optax.sgd(1e-3))
    assert json.loads((run / SUMMARY).read_text())["status"] == "complete"


def test_a_checkpoint_of_another_optimiser_says_so(tmp_path):
    train(config(tmp_path, "cached", "run", epochs=1), tx=optax.sgd(1e-3))
    with pytest.raises(UserError, match="it was written with another head, backbone, optimiser or version"):
        train(config(tmp_path, "cached", "run", epochs=2, resume=True), tx=optax.sgd(1e-3, momentum=0.9))
