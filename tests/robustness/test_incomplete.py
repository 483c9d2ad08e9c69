"""Runs that end early: the last good checkpoint stays, the first error is told, nobody uses them without knowing."""

import errno
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from helpers import FIELDS, TINY, Disturbance, command, flip_bit, is_one_error, rows_of, summary_of
from PIL import Image

from cifar_jax import UserError, load_run
from cifar_jax.config import TrainConfig
from cifar_jax.experiment import train
from cifar_jax.models.head import dense_logits, init_head
from cifar_jax.runs.directory import CHECKPOINTS, CONFIG, SUMMARY
from cifar_jax.runs.ending import Interrupted
from cifar_jax.runtime.sharding import make_mesh
from cifar_jax.train.evaluate import EvalResult
from cifar_jax.train.loop import Diverged, EpochOrder, fit, make_advance
from cifar_jax.train.losses import cross_entropy
from cifar_jax.train.step import init_state, make_train_step
from cifar_jax.train.task import Split, cached_task

# With this rate the first epoch ends with a loss of 1e21, and the second one with none.
DIVERGES = (
    *("--dataset", "shapes", "--weights", "demo", "--image-size", "32", "--train-examples", "256"),
    *("--test-examples", "100", "--epochs", "3", "--hidden", "64", "64", "64", "--momentum", "0.9"),
    *("--schedule", "cosine", "--warmup-epochs", "1.9"),
)


def checkpoints(run):
    return {path.parent.name: path.read_bytes() for path in (run / CHECKPOINTS).glob("*/arrays.safetensors")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_a_run_that_diverges_keeps_its_last_good_checkpoint_and_resumes_with_a_lower_rate(tmp_path, capsys, cache):
    run, picture = tmp_path / "run", tmp_path / "picture.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    job = ("train", *DIVERGES, "--cache-dir", cache, "--out", run)
    result = command(capsys, *job, "--learning-rate", 30)
    is_one_error(result, 1, "Loss or gradient was not finite in epoch 2, step ", "The checkpoint after 1 epoch is kept")
    assert f"Continue with a lower --learning-rate and --resume --out {run}, or start again" in result.err
    kept = checkpoints(run)
    assert set(kept) == {"0001"} and summary_of(run)["status"] == "diverged"

    # Nobody uses it unawares.
    for arguments in (("predict", run, picture), ("evaluate", run)):
        refused = command(capsys, *arguments)
        is_one_error(refused, 2, "is incomplete (diverged after 1 of 3 epochs)", "--allow-incomplete")
        warned = command(capsys, *arguments, "--allow-incomplete")
        assert warned.code == 0 and warned.err.startswith(f"Warning: The run in {run} is incomplete (diverged")
    with pytest.raises(UserError, match="incomplete"):
        load_run(run)

    # The learning rate alone may differ, and it must be lower.
    is_one_error(command(capsys, *job, "--learning-rate", 30, "--resume"), 2, "would diverge again", "below 30")
    is_one_error(command(capsys, *job, "--learning-rate", 31, "--resume"), 2, "would diverge again", "below 30")
    other = command(capsys, *job, "--learning-rate", 0.01, "--seed", 1, "--resume")
    is_one_error(other, 2, "it differs in --seed (0 there, 1 here). Give")
    assert checkpoints(run) == kept and json.loads((run / CONFIG).read_text())["learning_rate"] == 30

    resumed = command(capsys, *job, "--learning-rate", 0.01, "--resume")
    assert resumed.code == 0 and f"Resuming the run in {run} after 1 epoch." in resumed.err
    assert re.findall(r"^epoch (\d)/3", resumed.out, re.MULTILINE) == ["2", "3"]
    summary = summary_of(run)
    assert summary["status"] == "complete" and json.loads((run / CONFIG).read_text())["learning_rate"] == 0.01
    assert summary["learning_rates"] == [
        {"from_epoch": 1, "from_step": 1, "learning_rate": 30.0},
        {"from_epoch": 2, "from_step": 1, "learning_rate": 0.01},
    ]
    assert command(capsys, "evaluate", run).code == 0


def config(tmp_path, cache, **more):
    usual = {
        "dataset": "shapes",
        "weights": "random-w16",
        "image_size": 32,
        "train_examples": 96,
        "test_examples": 20,
        "epochs": 3,
        "batch_size": 32,
        "hidden": (8,),
        "cache_dir": str(cache),
        "out": str(tmp_path / "run"),
    }
    return TrainConfig(**usual | more)


def test_a_corrupt_checkpoint_met_while_stopping_does_not_hide_the_signal(tmp_path, cache, narrow):
    job, run = config(tmp_path, cache, mode="finetune"), tmp_path / "run"

    def disturb():
        flip_bit(run / CHECKPOINTS / "0001" / "arrays.safetensors")
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted) as stopped:
        train(job, Disturbance(disturb, epoch=1))
    assert stopped.value.exit_code == 143 and stopped.value.saved == (1, 0)
    (note,) = stopped.value.__notes__
    assert "0001 is corrupt: checksum mismatch in" in note
    assert summary_of(run)["status"] == "interrupted"
    # The head of that epoch fits no other backbone.
    with pytest.raises(UserError, match=r"has no trained backbone: writing it failed\. Continue it with --resume"):
        load_run(run, allow_incomplete=True)


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_an_epoch_after_which_the_loss_is_not_finite_is_no_good_checkpoint(loss):
    tx, params = optax.sgd(0.1), init_head(jax.random.key(0), 3, (), 2)
    task = cached_task(params, dense_logits, {"train": Split(np.ones((4, 3), np.float32), np.zeros(4, np.int32))})
    order = EpochOrder(jax.random.key(1), jax.random.key(2), batch_size=4)
    advance = make_advance(task, make_train_step(task.forward, cross_entropy, tx), order, make_mesh())
    results = iter([EvalResult(value, 0.1, np.eye(2, dtype=int), np.eye(2)) for value in (2.0, loss)])
    kept, state = [], init_state(task.params, tx)

    def on_epoch(row, *_):
        kept.append(row.epoch)

    with pytest.raises(Diverged, match=r"in epoch 2, step 1 \(first the loss after the epoch") as raised:
        fit(state, {}, advance, lambda _: next(results), 3, on_epoch=on_epoch)
    assert kept == [1] and raised.value.epoch == 2


@pytest.mark.parametrize("disturbance", ["full disk", "signal"])
def test_what_happens_while_a_diverged_run_ends_does_not_hide_divergence(
    tmp_path, capsys, narrow, monkeypatch, disturbance
):
    replace_file = os.replace

    def disturbed(source, target):
        if Path(target).name == SUMMARY and disturbance == "full disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        if Path(target).name == SUMMARY:
            signal.raise_signal(signal.SIGINT)
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", disturbed)
    run = tmp_path / "run"
    result = command(capsys, "train", *TINY, "--mode", "live", "--learning-rate", "1e30", "--out", run)
    is_one_error(result, 1, "Loss or gradient was not finite in epoch 1, step 2")
    if disturbance == "signal":
        assert summary_of(run)["status"] == "diverged"
    else:
        last = result.err.splitlines()[-1]
        assert last.startswith("Writing the summary failed too: ") and "No space left on device" in last


def test_ctrl_c_in_the_first_epoch_tells_its_steps_and_resuming_raises_no_false_alarm(
    tmp_path, cache, narrow, log_messages
):
    job = config(tmp_path, cache, mode="live", schedule="cosine", batch_size=4)
    undisturbed = train(replace(job, out=str(tmp_path / "undisturbed")))
    reporter = Disturbance(lambda: signal.raise_signal(signal.SIGINT), epoch=1, examples=16)
    # Those that the devices had been given are finished.
    with pytest.raises(Interrupted, match=r"interrupted after 0 epochs and 1\d steps") as stopped:
        train(job, reporter)
    log_messages.clear()
    resumed = train(replace(job, resume=True))
    assert f"Resuming the run in {resumed} after {stopped.value.saved.words}." in log_messages
    assert not [text for text in log_messages if "metrics.jsonl" in text]
    assert rows_of(resumed) == rows_of(undisturbed)


def test_a_run_that_the_rate_of_the_backbone_spoilt_resumes_with_a_lower_one_of_either(tmp_path, cache, narrow):
    job = config(tmp_path, cache, mode="finetune", learning_rate=1e-3, backbone_learning_rate=3e38, epochs=1)
    steep = {"backbone": FIELDS, "loss_fn": lambda logits, labels: 1e6 * cross_entropy(logits, labels)}
    with pytest.raises(Diverged, match=r"was 0\.001, that of the backbone 3e\+38\. Continue with a lower") as raised:
        train(job, **steep)
    assert "a lower --learning-rate or --backbone-learning-rate and --resume" in str(raised.value)
    again = replace(job, resume=True)
    below = r"below 0\.001 or a --backbone-learning-rate below 3e\+38, and neither above it, or start again"
    for rates in ({}, {"backbone_learning_rate": 1e-9, "learning_rate": 0.1}, {"backbone_learning_rate": 3.1e38}):
        with pytest.raises(UserError, match=below):
            train(replace(again, **rates), **steep)
    summary = summary_of(train(replace(again, backbone_learning_rate=1e-9), **steep))
    assert summary["status"] == "complete" and summary["learning_rates"][-1]["backbone_learning_rate"] == 1e-9


def test_the_rate_of_the_head_may_fall_and_take_that_of_the_backbone_along(tmp_path, cache, narrow):
    job = config(tmp_path, cache, mode="finetune", learning_rate=3e38, epochs=1)
    steep = {"backbone": FIELDS, "loss_fn": lambda logits, labels: 1e6 * cross_entropy(logits, labels)}
    with pytest.raises(Diverged):
        train(job, **steep)
    summary = summary_of(train(replace(job, learning_rate=1e-9, resume=True), **steep))
    assert summary["learning_rates"][-1] == {
        **{"from_epoch": 1, "from_step": 1, "learning_rate": 1e-9, "backbone_learning_rate": 1e-9}
    }


def test_the_rate_that_is_named_is_that_of_the_step_that_went_wrong(tmp_path, cache, narrow):
    """The cosine is at zero one step later, when the update of the only step has been looked at."""
    job = config(tmp_path, cache, schedule="cosine", learning_rate=3e38, epochs=1, batch_size=96)
    with pytest.raises(Diverged, match=r"epoch 1, step 1 \(first an update\)\. The learning rate was 3e\+38\."):
        train(job, backbone=FIELDS, loss_fn=lambda logits, labels: 1e6 * cross_entropy(logits, labels))
