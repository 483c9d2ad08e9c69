"""Runs that were stopped and resumed: the same bits as undisturbed ones; a resume that is refused changes nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from helpers import FIELDS, NARROW, SMALL_JOB, TINY, Killed, Silent, flip_bit, kill_at, rows_of, summary_of

from cifar_jax import load_run, random_backbone, save_backbone
from cifar_jax.cli import commands
from cifar_jax.cli.console import ConsoleReporter
from cifar_jax.cli.options import parse_train
from cifar_jax.config import TrainConfig
from cifar_jax.data.sources import shapes
from cifar_jax.errors import UserError
from cifar_jax.experiment import train
from cifar_jax.files import write_json
from cifar_jax.runs.checkpoint import Position, list_checkpoints, position_of
from cifar_jax.runs.directory import CHECKPOINTS, SUMMARY
from cifar_jax.runs.resume import selected_epoch
from cifar_jax.runs.scores import evaluate_run
from cifar_jax.runtime.progress import EpochRow
from cifar_jax.train.loop import Diverged

# Everything that a resumed run might draw or count anew: augmentation, order, schedule, momentum.
ANY_BACKBONE = {
    "mode": "finetune",
    "augment": ("flip", "crop", "cutout"),
    "momentum": 0.9,
    "nesterov": True,
    "schedule": "cosine",
    "warmup_epochs": 1.0,
    "weight_decay": 1e-3,
    "clip_norm": 1.0,
    "label_smoothing": 0.1,
    "batch_size": 32,
}
RESNET = {"mode": "finetune", "weights": "random-w16", "image_size": 32, "batch_size": 32}
OPTIONS = {
    "cached": {"momentum": 0.9, "val_fraction": 0.25, "batch_size": 8},
    "live": {"mode": "live", "augment": ("flip", "crop"), "momentum": 0.9, "batch_size": 32},
    "finetune": ANY_BACKBONE,
    # And what a ResNet adds: statistics, and stages that are frozen.
    "resnet": RESNET | ANY_BACKBONE | {"bn_momentum": 0.9, "freeze_stages": 1, "zero_gamma": True},
    "plain resnet": RESNET,
}

pytestmark = pytest.mark.usefixtures("narrow")


def config(out, options, **more):
    usual = {
        **SMALL_JOB,
        "learning_rate": 0.1,
        "cache_dir": str(out.parent / "cache"),
        "out": str(out),
    }
    return TrainConfig(**usual | OPTIONS[options] | more)


def backbone_of(options):
    return None if "resnet" in options else FIELDS


def run_job(out, options, reporter=None, **more):
    return train(config(out, options, **more), reporter, backbone=backbone_of(options))


def stop_job(out, options, reporter, **more):
    with pytest.raises(Killed):
        run_job(out, options, reporter, **more)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directory of the runs that tests share."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def undisturbed(runs):
    """A finished run of given options, made once."""
    return lambda options: runs / options if (runs / options).exists() else run_job(runs / options, options)


@pytest.fixture
def stopped(runs, tmp_path):
    """A copy of a run that was killed after its second epoch."""
    if not (runs / "stopped").exists():
        stop_job(runs / "stopped", "cached", kill_at(2))
    return shutil.copytree(runs / "stopped", tmp_path / "stopped")


def assert_same_bits(a, b, options="cached"):
    assert rows_of(a) == rows_of(b)
    runs = [load_run(run, backbone=backbone_of(options)) for run in (a, b)]
    assert runs[0].summary["selected_epoch"] == runs[1].summary["selected_epoch"]
    for x, y in zip(*(jax.tree.leaves((run.backbone.variables, run.head_params)) for run in runs), strict=True):
        np.testing.assert_array_equal(x, y)


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def hidden_files(run):
    return [path for path in run.rglob(".*") if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "killed_at", "before", "after"),
    [
        ("cached", (2, None), None, None),
        ("cached", (2, 54), None, None),  # of 54 examples: before the checkpoint of the second epoch
        ("cached", (1, 54), None, None),  # before the first checkpoint
        ("cached", (2, 17), 1, 1),
        ("cached", (2, 17), 2, 3),
        ("cached", (2, 25), 3, None),
        ("cached", (1, None), None, 2),
        ("live", (2, 33), 1, 1),
        ("finetune", (2, 65), 2, 2),
        pytest.param("resnet", (2, 65), 2, 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, undisturbed, options, killed_at, before, after):
    """Wherever checkpoints are made, before and after: also within an epoch that is otherwise one compiled call."""
    run = stop_job(tmp_path / "run", options, kill_at(*killed_at), checkpoint_every=before)
    # What a kill in the midst of writing leaves.
    (run / ".metrics.jsonl.half.jsonl").touch()
    if (run / CHECKPOINTS).exists():
        (run / CHECKPOINTS / ".0003.half").mkdir()
    run_job(run, options, resume=True, checkpoint_every=after)
    assert_same_bits(run, undisturbed(options), options)
    assert hidden_files(run) == []
    assert json.loads((run / "config.json").read_text())["checkpoint_every"] == after

    last_steps = {"cached": 6, "live": 2, "finetune": 2, "resnet": 2}[options]  # of 7 and 3 steps in an epoch
    before_last = Position(2, last_steps // after * after if after else 0)
    kept = {before_last, Position(3), Position(summary_of(run)["selected_epoch"])}
    if options == "cached":  # with held-out images a checkpoint is of no use without that of the epoch selected by then
        kept.add(Position(selected_epoch([EpochRow(**row) for row in rows_of(run)[:2]], True)))
    assert [position_of(path) for path in list_checkpoints(run / CHECKPOINTS)] == sorted(kept)


def test_a_corrupt_checkpoint_is_reported_and_the_one_before_it_used(undisturbed, stopped, log_messages):
    flip_bit(stopped / CHECKPOINTS / "0002" / "arrays.safetensors")
    run_job(stopped, "cached", resume=True)
    assert_same_bits(stopped, undisturbed("cached"))
    assert any("0002 is corrupt" in text and "using the one before it" in text for text in log_messages)
    assert any("Resuming the run" in text and "after 1 epoch." in text for text in log_messages)


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ("cached", {}),
        ("cached", {"val_fraction": 0.0, "checkpoint_every": 3}),
        ("finetune", {"schedule": "constant", "warmup_epochs": 0.0}),
    ],
)
def test_a_finished_run_is_continued_from_the_checkpoint_before_a_corrupt_one(tmp_path, log_messages, options, more):
    """Whatever that one needs was kept as well, and nothing was removed before that was known."""
    whole = run_job(tmp_path / "whole", options, **more, epochs=4)
    run = run_job(tmp_path / "run", options, **more)
    flip_bit(run / CHECKPOINTS / "0003" / "arrays.safetensors")
    run_job(run, options, **more, epochs=4, resume=True)
    assert_same_bits(run, whole, options)
    assert any("0003 is corrupt" in text for text in log_messages)


def test_a_run_that_another_process_continues_is_left_alone(stopped):
    before = contents(stopped)

    class Overtaken(Silent):
        def header(self, rows):
            with pytest.raises(UserError, match="Another process is writing the run in"):
                run_job(stopped, "cached", resume=True)
            assert contents(stopped) == before

    run_job(stopped, "cached", Overtaken(), resume=True)
    assert summary_of(stopped)["status"] == "complete"


@pytest.mark.parametrize("content", ["", "{}\n", "not JSON\n", None])
def test_corrupt_metrics_are_written_again_from_the_checkpoint(stopped, log_messages, content):
    metrics = stopped / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole.replace("0", "1", 3) if content is None else content)
    run_job(stopped, "cached", resume=True)
    assert metrics.read_text().startswith(whole)
    assert any("metrics.jsonl is missing or corrupt" in text for text in log_messages)


def test_images_may_not_change_under_the_same_name(tmp_path, stopped, monkeypatch):
    draw = shapes.draw_shapes
    monkeypatch.setattr(shapes, "draw_shapes", lambda *a, **k: (255 - draw(*a, **k)[0], draw(*a, **k)[1]))
    before = contents(stopped)
    with pytest.raises(UserError, match="its training images and test images and validation images have changed"):
        run_job(stopped, "cached", resume=True, cache_dir=str(tmp_path / "other"))
    assert contents(stopped) == before


def test_weights_may_move_but_not_change(tmp_path):
    first, second = tmp_path / "one" / "weights.safetensors", tmp_path / "two" / "weights.safetensors"
    backbone = random_backbone(jax.random.key(0), shapes.draw_shapes(64, seed=0)[0], NARROW, 32)
    for place in (first, second):
        place.parent.mkdir()
        save_backbone(place, backbone)
    job = config(tmp_path / "run", "cached", epochs=1, weights=str(first), data_dir=str(tmp_path / "one"))
    train(job)
    longer = replace(job, epochs=2, resume=True)
    save_backbone(first, backbone.replace(variables=jax.tree.map(lambda leaf: leaf * 1.5, backbone.variables)))
    with pytest.raises(UserError, match=r"its weights have changed\. Restore them"):
        train(longer)
    run = train(replace(longer, weights=str(second), data_dir=str(tmp_path / "two")))
    recorded = json.loads((run / "config.json").read_text())
    assert (recorded["weights"], recorded["data_dir"]) == (str(second), str(tmp_path / "two"))


def test_the_command_asks_whether_to_resume_its_own_unfinished_run(tmp_path, capsys):
    run, asked = tmp_path / "run", []
    arguments = [*TINY, "--schedule", "constant", "--cache-dir", str(tmp_path / "cache"), "--epochs", "2"]
    arguments += ["--out", str(run)]
    with pytest.raises(Killed):
        train(parse_train(arguments), kill_at(1))

    class Answering(ConsoleReporter):
        answer = False

        def confirm(self, question):
            asked.append(question)
            return self.answer

    reporter = Answering()
    with pytest.raises(UserError, match="already holds a run; choose another directory or --overwrite it, or --resume"):
        commands.train(arguments, reporter)
    reporter.answer = True
    with pytest.raises(UserError, match="already holds a run"):  # another run: it is not even asked
        commands.train([*arguments, "--seed", "1"], reporter)
    assert asked == [f"{run} holds this run, unfinished. Resume it?"]
    capsys.readouterr()
    assert commands.train(arguments, reporter) == 0
    printed = capsys.readouterr().out
    assert "epoch 2/2" in printed and "epoch 1/2" not in printed


def test_a_finetuned_run_reads_back_with_its_own_backbone(tmp_path):
    run = run_job(tmp_path / "run", "plain resnet", epochs=1, val_fraction=0.25)
    summary = summary_of(run)
    assert evaluate_run(run)["test_accuracy"] == summary["test_accuracy"]
    backbone = load_run(run).backbone
    assert backbone.sha256 == summary["backbone"]["sha256"] and "trained on shapes" in summary["backbone"]["source"]
    assert backbone.variant == "trained from random weights"


def test_a_finished_run_is_left_alone_and_more_epochs_continue_it(tmp_path, undisturbed):
    run = run_job(tmp_path / "run", "cached", epochs=1)
    before = contents(run)
    assert run_job(run, "cached", epochs=1, resume=True) == run and contents(run) == before
    run_job(run, "cached", resume=True)
    assert rows_of(run) == rows_of(undisturbed("cached"))
    assert json.loads((run / "config.json").read_text())["epochs"] == 3


def test_a_run_that_was_killed_while_its_first_file_was_written_starts(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.abcdefgh.json").write_text("{")
    assert hidden_files(run_job(tmp_path / "run", "cached", epochs=1)) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"seed": 1, "momentum": 0.5}, r"differs in --momentum \(0.9 there, 0.5 here\), --seed \(0 there, 1 here\)"),
        ({"schedule": "cosine", "epochs": 4}, r"--epochs \(3 there, 4 here\)"),  # the cosine would be another one
        ({"epochs": 1}, "has 2 epochs done, more than --epochs 1"),
    ],
)
def test_other_options_are_refused_and_nothing_changes(stopped, more, message):
    before = contents(stopped)
    with pytest.raises(UserError, match=message):
        run_job(stopped, "cached", resume=True, **more)
    assert contents(stopped) == before


def test_paths_are_recorded_absolutely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_job(Path("run"), "cached", epochs=1, data_dir="data")
    recorded = json.loads((run / "config.json").read_text())
    assert [recorded[name] for name in ("data_dir", "cache_dir", "out")] == [
        str(tmp_path / name) for name in ("data", "cache", "run")
    ]


def test_a_run_that_diverged_is_resumed_with_a_lower_rate_only(stopped, undisturbed):
    write_json(stopped / SUMMARY, summary_of(undisturbed("cached")) | {"status": "diverged"})
    message = r"diverged and would diverge again\. Resume it with a --learning-rate below 0\.1"
    with pytest.raises(UserError, match=message):
        run_job(stopped, "cached", resume=True)
    assert run_job(stopped, "cached", resume=True, learning_rate=0.05)


def test_a_run_that_diverged_with_an_optimiser_of_its_own_resumes_with_another_rate_in_it(tmp_path):
    job = config(tmp_path / "run", "cached", epochs=2)
    with pytest.raises(Diverged, match=r"Continue with a lower rate in tx and resume=True") as raised:
        train(job, backbone=FIELDS, tx=optax.sgd(float("inf")))
    assert "--learning-rate" not in str(raised.value)
    run = train(replace(job, resume=True), backbone=FIELDS, tx=optax.sgd(1e-3))
    assert summary_of(run)["status"] == "complete"
