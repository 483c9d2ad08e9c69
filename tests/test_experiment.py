"""The whole job, tiny: what it leaves behind, both modes, held-out images, reproducibility, real images."""

import json
import logging
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import FIELDS, narrow_networks, rows_of, summary_of
from PIL import Image

from cifar_jax import load_run, make_extractor, predict_probs
from cifar_jax.config import TrainConfig, preset
from cifar_jax.experiment import train
from cifar_jax.runs.directory import CONTENTS
from cifar_jax.runs.predict import predict_files
from cifar_jax.runs.scores import evaluate_run

TINY = {
    "dataset": "shapes",
    "weights": "random-w16",
    "image_size": 32,
    "train_examples": 160,
    "test_examples": 50,
    "epochs": 2,
    "hidden": (16,),
    "batch_size": 32,
    "learning_rate": 0.1,
}


# What this project compiles in a run, as XLA names it.
OURS = {"features_of", "run", "eval_step", "train_step"}


@pytest.fixture(scope="module", autouse=True)
def narrow_resnets():
    with pytest.MonkeyPatch.context() as patch:
        narrow_networks(patch)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("job")
    return train(TrainConfig(**TINY, out=str(root / "run"), cache_dir=str(root / "cache")))


def test_a_run_leaves_the_files_of_the_documents(run):
    of_test_beside_held_out = {"test_predictions.png", "test_confusion.png"}
    assert {path.name for path in run.iterdir()} == set(CONTENTS) - of_test_beside_held_out
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in run.glob("*.png"))
    summary = summary_of(run)
    assert summary["status"] == "complete" and summary["format_version"] == 2
    assert summary["num_train"] == 160 and summary["num_test"] == 50 and summary["val_split"] == "test"
    assert np.sum(summary["val_confusion"]) == 50
    assert 0 < summary["seconds_to_first_step"] < summary["seconds"]["total"]
    assert summary["val_accuracy"] == rows_of(run)[-1]["val_accuracy"] == np.trace(summary["val_confusion"]) / 50
    assert TrainConfig.from_json(json.loads((run / "config.json").read_text())).train_examples == 160


@pytest.mark.parametrize(
    ("mode", "functions"), [("cached", 3), ("live", 2), pytest.param("finetune", 2, marks=pytest.mark.slow)]
)
def test_a_whole_run_compiles_each_function_once_for_a_shape(tmp_path, narrow, caplog, mode, functions):
    """Epochs, short last batches and evaluations included; JAX's own small operations are no concern of a run."""
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        options = TINY | {"epochs": 3, "train_examples": 85, "test_examples": 20, "mode": mode, "val_fraction": 0.2}
        train(TrainConfig(**options, out=str(tmp_path / "run")))
    pattern = r"Compiling jit\((\w+)\) with global shapes and types (.*?)\. Argument mapping"
    compiled = Counter(re.findall(pattern, caplog.text, re.DOTALL))
    ours = Counter({key: count for key, count in compiled.items() if key[0] in OURS})
    assert len(ours) >= functions and set(ours.values()) == {1}, ours
    # Held-out and test images, of other numbers, and the figures take one evaluation.
    assert [name for name, _ in ours].count("eval_step") == 1, ours


def test_run_reads_back_and_scores_the_same(run):
    summary, scores = summary_of(run), evaluate_run(run)
    assert scores["test_accuracy"] == summary["val_accuracy"]
    assert scores["test_loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    assert scores["test_class_accuracy"] == summary["val_class_accuracy"]


def test_predict_probs_is_pure_and_agrees_with_the_run(run, shapes, tmp_path):
    read = load_run(run)
    probs = jax.jit(predict_probs)(read.backbone, read.head_params, shapes.images[:20])
    assert probs.shape == (20, 10)
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
    features = make_extractor(read.backbone)(shapes.images[:20])
    np.testing.assert_allclose(probs, jax.nn.softmax(read.head.logits(read.head_params, features)), rtol=1e-4)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, image in zip(paths, shapes.images, strict=False):
        Image.fromarray(np.asarray(image)).save(path)
    for prediction, row in zip(predict_files(read, paths), probs[:3], strict=True):
        assert prediction.top[0] == (read.class_names[int(row.argmax())], pytest.approx(float(row.max()), rel=1e-4))


def test_same_command_same_bits(run, narrow, tmp_path):
    """With features from the cache too, which the second run reads."""
    cache = json.loads((run / "config.json").read_text())["cache_dir"]
    for directory in (cache, str(tmp_path / "cache")):
        again = train(TrainConfig(**TINY, out=str(tmp_path / "again"), cache_dir=directory, overwrite=True))
        assert (summary_of(again)["images_per_second"] is None) == (directory == cache)
        assert rows_of(again) == rows_of(run)
        jax.tree.map(np.testing.assert_array_equal, load_run(again).head_params, load_run(run).head_params)


def test_live_gives_what_cached_gives(run, narrow, tmp_path):
    live = train(TrainConfig(**TINY, mode="live", out=str(tmp_path / "live"), cache_dir=str(tmp_path)))
    for a, b in zip(rows_of(run), rows_of(live), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_held_out_images_choose_the_epoch_and_the_test_images_do_not(tmp_path):
    run = tmp_path / "run"
    train(TrainConfig(**TINY | {"epochs": 4}, val_fraction=0.25, out=str(run), cache_dir=str(tmp_path / "cache")))
    summary = summary_of(run)
    assert (summary["num_train"], summary["num_val"], summary["num_test"]) == (120, 40, 50)
    rows = rows_of(run)
    best = max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert summary["selected_epoch"] == best["epoch"] and summary["val_accuracy"] == best["val_accuracy"]
    # Scores, figures and lines name their split, and there are those of both.
    assert summary["val_split"] == "held_out"
    assert (run / "metrics.jsonl").read_text().count('"val_split": "held_out"') == 4
    for split, num in (("val", 40), ("test", 50)):
        assert np.sum(summary[f"{split}_confusion"]) == num
        assert np.trace(summary[f"{split}_confusion"]) / num == summary[f"{split}_accuracy"]
        assert set(summary[f"{split}_class_accuracy"]) == set(summary["dataset"]["class_names"])
    assert {path.name for path in run.iterdir()} == set(CONTENTS)
    assert summary["test_accuracy"] == evaluate_run(run)["test_accuracy"]


def test_an_earlier_epoch_that_was_the_best_is_scored_and_not_the_last(tmp_path, narrow):
    """The learning rate rises until the head is spoilt."""
    options = TINY | {"epochs": 3, "learning_rate": 0.01, "hidden": ()}
    tx = optax.sgd(lambda count: jnp.where(count < 4, 0.1, -3.0))
    run = train(
        TrainConfig(**options, val_fraction=0.25, out=str(tmp_path / "run"), cache_dir=str(tmp_path)),
        backbone=FIELDS,
        tx=tx,
    )
    summary = summary_of(run)
    assert summary["selected_epoch"] == 1 and summary["val_accuracy"] == rows_of(run)[0]["val_accuracy"]
    assert summary["test_accuracy"] == evaluate_run(run, backbone=FIELDS)["test_accuracy"]


def test_presets_are_what_the_readme_says():
    demo, main = preset("demo"), preset("cifar10")
    assert (main.dataset, main.weights, main.epochs, main.batch_size) == ("cifar10", "keras-resnet50", 4, 64)
    assert (main.learning_rate, main.momentum, main.hidden) == (0.01, 0.0, (1024, 512))
    assert (demo.dataset, demo.train_examples, demo.test_examples, demo.epochs) == ("shapes", 5000, 1000, 4)


def test_real_images_train(cifar10, session_cache, narrow, tmp_path):
    config = TrainConfig(
        train_examples=2000,
        test_examples=500,
        hidden=(64,),
        learning_rate=0.1,
        cache_dir=str(session_cache),
        out=str(tmp_path / "run"),
    )
    summary = summary_of(train(config, backbone=FIELDS))
    assert summary["dataset"]["name"] == "cifar10" and summary["dataset"]["version"] == "3.0.2"
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["train_accuracy"] > rows[0]["train_accuracy"] + 0.03
