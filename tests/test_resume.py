"""Runs that were stopped: the same bits as undisturbed ones, and one sentence where there is nothing to go on with."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from cifar_jax import load_run
from cifar_jax.checkpoint import list_checkpoints
from cifar_jax.config import TrainConfig
from cifar_jax.errors import UserError
from cifar_jax.files import write_json
from cifar_jax.job import train
from cifar_jax.predict import evaluate_run
from cifar_jax.run_dir import CHECKPOINTS, SUMMARY
from cifar_jax.run_writer import RunWriter

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
WAYS = {"finetune": FULL, "cached": {"momentum": 0.9, "val_fraction": 0.25}}


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
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def kill_after(monkeypatch, epoch, before_checkpoint=False):
    """The run dies once that epoch's checkpoint is there, or just before it would be."""
    usual = RunWriter.checkpoint

    def checkpoint(self, state):
        if not (before_checkpoint and len(self.history) == epoch):
            usual(self, state)
        if len(self.history) == epoch:
            raise Killed

    monkeypatch.setattr(RunWriter, "checkpoint", checkpoint)
    return lambda: monkeypatch.setattr(RunWriter, "checkpoint", usual)


@pytest.mark.parametrize(("way", "before_checkpoint"), [("finetune", False), ("cached", False), ("cached", True)])
def test_goes_on_to_the_same_bits(tmp_path, monkeypatch, way, before_checkpoint):
    undisturbed = train(config(tmp_path, way, "undisturbed"))
    revive = kill_after(monkeypatch, 2, before_checkpoint)
    stopped = config(tmp_path, way, "stopped", resume=True)
    with pytest.raises(Killed):
        train(stopped)
    revive()
    # What a kill in the midst of writing leaves.
    (tmp_path / "stopped" / CHECKPOINTS / ".0003.half").mkdir()
    (tmp_path / "stopped" / ".metrics.jsonl.half.jsonl").touch()
    resumed = train(stopped)
    assert rows_of(resumed) == rows_of(undisturbed)
    a, b = load_run(undisturbed), load_run(resumed)
    assert a.summary["selected_epoch"] == b.summary["selected_epoch"]
    for x, y in zip(*(jax.tree.leaves((run.backbone.variables, run.head_params)) for run in (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert [path for path in resumed.rglob(".*") if path.name.startswith(".")] == []
    last = list_checkpoints(resumed / CHECKPOINTS)
    assert {int(path.name) for path in last} == {3, b.summary["selected_epoch"]}


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


def test_a_run_without_a_checkpoint_starts_again(tmp_path, monkeypatch):
    revive = kill_after(monkeypatch, 1, before_checkpoint=True)
    stopped = config(tmp_path, "cached", "run", resume=True)
    with pytest.raises(Killed):
        train(stopped)
    revive()
    assert len(rows_of(train(stopped))) == 3


def test_another_run_is_not_gone_on_with(tmp_path):
    run = train(config(tmp_path, "finetune", "run", epochs=2))
    with pytest.raises(UserError, match=r"differs in --seed \(0 there, 1 here\), --momentum|--momentum .*--seed"):
        train(config(tmp_path, "finetune", "run", epochs=2, seed=1, momentum=0.5, resume=True))
    with pytest.raises(UserError, match=r"differs in --epochs \(2 there, 3 here\)"):
        train(config(tmp_path, "finetune", "run", resume=True))  # the cosine would be another one
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match="holds other files"):
        train(config(tmp_path, "finetune", "other", resume=True))
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / "metrics.jsonl").write_text("{}\n")
    (damaged / SUMMARY).unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
        train(config(tmp_path, "finetune", "damaged", epochs=2, resume=True))


def test_a_run_that_diverged_is_not_gone_on_with(tmp_path):
    run = train(config(tmp_path, "cached", "run", epochs=1))
    write_json(run / SUMMARY, json.loads((run / SUMMARY).read_text()) | {"status": "diverged"})
    with pytest.raises(UserError, match="diverged and would again"):
        train(config(tmp_path, "cached", "run", epochs=1, resume=True))
