"""Each example runs in each of its modes, its part takes effect, and its run is read back and resumed only with it."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from helpers import NARROW, without_pictures
from PIL import Image

from cifar_jax import (
    Batch,
    FunctionBackbone,
    Run,
    TrainConfig,
    UserError,
    dense_head,
    extract,
    flax_head,
    load_run,
    predict_probs,
)
from cifar_jax.config import preset
from cifar_jax.data import load_data
from cifar_jax.experiment import train
from cifar_jax.models import resnet
from cifar_jax.pretrained import UNTRAINED
from cifar_jax.runs.checkpoint import load_checkpoint
from cifar_jax.runs.directory import CHECKPOINTS, CONTENTS
from cifar_jax.runs.predict import predict_files
from cifar_jax.runs.scores import evaluate_run
from examples import another_augmentation, another_loss, another_network, another_optimizer, dropout_head

MODES = ("cached", "live", "finetune")
EXAMPLES = {
    "another_loss": another_loss,
    "dropout_head": dropout_head,
    "another_network": another_network,
    "another_optimizer": another_optimizer,
    "another_augmentation": another_augmentation,
}
RUNS = [(name, mode) for name in EXAMPLES for mode in MODES if (name, mode) != ("another_augmentation", "cached")]
NETWORK_OF_ONE = replace(NARROW, stage_sizes=(1,))
NETWORK = another_network.make_backbone(seed=0)
READ_WITH = {"dropout_head": {"head": dropout_head.HEAD}, "another_network": {"backbone": NETWORK}}
ONE_EACH = [(name, "live" if name == "another_augmentation" else "cached") for name in EXAMPLES]
Made = Callable[..., Path]


def config_of(mode: str, root: Path, name: str) -> TrainConfig:
    """A job of a second or two."""
    return replace(
        preset("demo"),
        **{"mode": mode, "weights": "random-w16", "image_size": 32, "hidden": (8,), "epochs": 1, "batch_size": 25},
        **{"train_examples": 100, "test_examples": 20, "schedule": "constant", "momentum": 0.0},
        **{"out": str(root / f"{name}-{mode}"), "cache_dir": str(root / "cache")},
    )


def one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the untrained network one of a single narrow block, which is compiled in a second."""
    monkeypatch.setitem(resnet.DEPTHS, NETWORK_OF_ONE.stage_sizes, "one block")
    monkeypatch.setitem(UNTRAINED, "random-w16", (NETWORK_OF_ONE, 32))


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One narrow block, no pictures, and JAX's usual promotion of dtypes, without which Optax's schedules fail.

    Nearly all time goes into compiling, so XLA is told to optimise little.
    """
    one_block(monkeypatch)
    without_pictures(monkeypatch)
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Runs of examples, or of `train` alone, each made once."""
    root, runs = tmp_path_factory.mktemp("examples"), {}

    def make(name: str, mode: str) -> Path:
        if (name, mode) not in runs:
            main = EXAMPLES[name].main if name in EXAMPLES else train
            runs[name, mode] = main(config_of(mode, root, name))
        return runs[name, mode]

    return make


def read(name: str, path: Path) -> Run:
    return load_run(path, **READ_WITH.get(name, {}))


def logits_and_labels(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a run's test images, plainly, and their labels."""
    images, labels = load_data(run.config, run.backbone.image_size, resize=run.resize).test
    logits = run.head.logits(run.head_params, extract(run.backbone, images))
    return np.asarray(logits, np.float64), labels


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy by its definition."""
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]


def last_row(path: Path) -> dict:
    return json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b))
    )


@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_runs_and_is_read_back(made, name, mode, tmp_path):
    path = made(name, mode)
    run = read(name, path)
    assert run.summary["status"] == "complete" and run.summary["epochs"] == 1
    assert {"config.json", "metrics.jsonl", "summary.json", CHECKPOINTS} <= {file.name for file in path.iterdir()}
    logits, labels = logits_and_labels(run)
    assert np.mean(logits.argmax(axis=1) == labels) == pytest.approx(run.summary["val_accuracy"])
    if name != "another_loss":
        assert losses(logits, labels).mean() == pytest.approx(run.summary["val_loss"], rel=1e-4)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    (prediction,) = predict_files(run, [tmp_path / "red.png"])
    assert len(prediction.top) == 3 and not prediction.error
    red = np.full((1, 32, 32, 3), (255, 0, 0), np.uint8)
    probs = predict_probs(
        run.backbone, run.head_params, red, run.backbone.image_size, run.config.precision, run.head.logits
    )
    for label, prob in prediction.top:
        assert prob == pytest.approx(float(probs[0, run.class_names.index(label)]), rel=1e-4)


def test_prints_its_result_and_leaves_a_whole_run_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    one_block(monkeypatch)
    path = another_loss.main(config_of("cached", tmp_path, "whole"))
    assert set(CONTENTS) - {file.name for file in path.iterdir()} == {"test_predictions.png", "test_confusion.png"}
    assert f"accuracy {load_run(path).summary['val_accuracy']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("mode", MODES)
def test_loss_is_trained_on_and_reported(made, mode):
    path, plain = made("another_loss", mode), load_run(made("none", mode))
    run = load_run(path)
    entropy = losses(*logits_and_labels(run))
    focal = (1 - np.exp(-entropy)) ** 2 * entropy
    assert run.summary["val_loss"] == pytest.approx(focal.mean(), rel=1e-4)
    assert run.summary["val_loss"] == last_row(path)["val_loss"] < 0.99 * entropy.mean()
    assert last_row(path)["train_loss"] < 0.99 * last_row(plain.path)["train_loss"]
    assert not same(run.head_params, plain.head_params)


def test_evaluation_of_a_run_is_told_its_loss(made, log_messages):
    path = made("another_loss", "cached")
    summary = load_run(path).summary
    assert evaluate_run(path, loss_fn=another_loss.focal_loss)["test_loss"] == pytest.approx(summary["val_loss"])
    assert not any("focal_loss" in sentence for sentence in log_messages)
    assert evaluate_run(path)["test_loss"] > summary["val_loss"]
    assert f"The run in {path} was trained with the loss focal_loss; the loss here is cross-entropy." in log_messages


@pytest.mark.parametrize("mode", MODES)
def test_dropout_is_on_in_training_alone(mode, tmp_path):
    """On a network that compiles quickly. That evaluation is without it is for `test_runs_and_is_read_back`."""

    def trained(name, head):
        path = train(config_of(mode, tmp_path, name), head=head, backbone=NETWORK)
        return load_run(path, head=head, backbone=NETWORK).head_params

    never = dropout_head.HEAD._replace(logits=lambda params, x, **_: dropout_head.HEAD.logits(params, x))
    params = trained("dropout", dropout_head.HEAD)
    assert set(params) == {"Dense_0", "Dense_1"}
    assert not same(params, trained("never", never))


@pytest.mark.parametrize("mode", MODES)
def test_network_trains_only_with_finetune(made, mode):
    run = read("another_network", made("another_network", mode))
    assert run.backbone.num_features == 1024 and repr(run.backbone) in repr(run)
    assert same(run.backbone.variables, NETWORK.variables) == (mode != "finetune")


def test_network_gives_the_same_head_cached_and_live(made):
    cached, live = (read("another_network", made("another_network", mode)).head_params for mode in ("cached", "live"))
    for a, b in zip(jax.tree.leaves(cached), jax.tree.leaves(live), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_optimizer_takes_the_steps(made, mode):
    path = made("another_optimizer", mode)
    run, plain = load_run(path), load_run(made("none", mode))
    like = {"opt_state": [{"nu": {"head": run.head_params}}]}  # AdamW's second moments, which SGD does not have
    moments = load_checkpoint(path / CHECKPOINTS, like)
    assert any(np.any(leaf > 0) for leaf in jax.tree.leaves(moments))
    assert not same(run.head_params, plain.head_params)


def test_optimizer_that_keeps_a_key_is_resumed_to_the_same_bits(tmp_path):
    """Its key is in the checkpoint as numbers."""
    tx = optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(5)), optax.sgd(0.1))
    config = replace(config_of("cached", tmp_path, "whole"), epochs=2)
    half = replace(config_of("cached", tmp_path, "halves"), resume=True)
    whole = load_run(train(config, tx=tx, backbone=NETWORK), backbone=NETWORK)
    for epochs in (1, 2):
        halves = train(replace(half, epochs=epochs), tx=tx, backbone=NETWORK)
    assert same(load_run(halves, backbone=NETWORK).head_params, whole.head_params)


class Unwrapped:
    """Neither a function nor a part."""


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"head": dropout_head.DropoutHead()}, "head= takes a Head, got DropoutHead; wrap a Flax module as flax_head"),
        ({"backbone": another_network.random_convolutions}, r"wrap a function as FunctionBackbone\(function, var"),
        ({"tx": 0.1}, r"tx= takes an optax\.GradientTransformation, got float\."),
        ({"loss_fn": Unwrapped()}, r"loss_fn= takes a function, got Unwrapped\."),
        ({"augment": ("flip",)}, r"augment= takes a function, got tuple\."),
    ],
)
def test_part_of_another_kind_is_refused_before_anything_is_done(tmp_path, part, message):
    with pytest.raises(UserError, match=message):
        train(config_of("live", tmp_path, "refused"), **part)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("mode", "options", "named"),
    [
        ("cached", {"precision": "bfloat16", "image_size": 64}, "--image-size 64, --precision bfloat16."),
        ("finetune", {"freeze_stages": 1, "zero_gamma": True, "remat": True}, "--freeze-stages 1, --zero-gamma, --rem"),
        ("finetune", {"bn_momentum": 0.5}, "--bn-momentum 0.5."),
        ("finetune", {"bn_statistics": "frozen"}, "--bn-statistics frozen."),
    ],
)
def test_options_that_a_function_would_ignore_are_refused(tmp_path, mode, options, named):
    config = replace(config_of(mode, tmp_path, "refused"), **options)
    with pytest.raises(UserError, match=r"Options of a ResNet do not apply to Func.*: leave out ") as error:
        train(config, backbone=NETWORK)
    assert named in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("function", "returns"),
    [
        (lambda variables, images: images.astype("float32"), r"shape \[1, 32, 32, 3\]"),
        (lambda variables, images: images.astype("float32").mean(), r".*float32.*"),
        (lambda variables, images: (images.astype("float32").mean((1, 2)), variables), r"\(.*float32.*"),
    ],
)
def test_function_that_returns_no_features_is_refused(tmp_path, function, returns):
    with pytest.raises(UserError, match=rf"returns {returns} for one image, expected \[1, num_features\]"):
        train(config_of("live", tmp_path, "refused"), backbone=FunctionBackbone(function, {}, "no features"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_classes", [9, 11])
def test_head_of_another_number_of_classes_is_refused_before_features_are_extracted(tmp_path, num_classes):
    head = flax_head(dropout_head.DropoutHead(num_classes=num_classes))
    config = config_of("cached", tmp_path, "refused")
    with pytest.raises(UserError, match=rf"returns shape \[1, {num_classes}\] for the .*, expected \[1, 10\]: shapes"):
        train(config, head=head, backbone=NETWORK)
    assert not list(Path(config.cache_dir).rglob("features/*"))


def test_mixup_mixes_images_and_labels_alike():
    images = np.zeros((4, 32, 32, 3), np.uint8)
    images[1] = 200
    batch = another_augmentation.mixup(jax.random.key(0), Batch(images, np.array([0, 1, 2, 3]), np.ones(4, np.float32)))
    assert batch.inputs.dtype == np.uint8 and batch.labels.shape == (4, 10)
    np.testing.assert_allclose(batch.labels.sum(axis=1), 1, rtol=1e-6)
    assert batch.inputs[2, 0, 0, 0] == round(200 * float(batch.labels[2, 1])) > 0
    assert 0.7 <= batch.labels[2, 2] < 1


@pytest.mark.parametrize("mode", ["live", "finetune"])
def test_augmentation_changes_what_is_trained_on(made, mode):
    path, plain = made("another_augmentation", mode), made("none", mode)
    assert last_row(path)["train_loss"] != pytest.approx(last_row(plain)["train_loss"], rel=1e-3)
    assert not same(load_run(path).head_params, load_run(plain).head_params)


def test_augmentation_is_refused_where_pixels_are_seen_once(tmp_path):
    with pytest.raises(UserError, match=r"augment needs the pixels at every step.*; use --mode live or finetune"):
        another_augmentation.main(config_of("cached", tmp_path, "refused"))
    assert not list(tmp_path.iterdir())


HEAD = "the head 'DropoutHead(num_classes=10)'; pass it to load_run as head="
FUNCTION = "the function 'random convolutions' as its backbone; pass the same one to load_run as backbone="


@pytest.mark.parametrize(
    ("name", "given", "part"),
    [
        ("dropout_head", {}, HEAD),
        ("dropout_head", {"head": dense_head((8,))}, HEAD),
        ("another_network", {}, FUNCTION),
        ("another_network", {"backbone": another_network.make_backbone(seed=1)}, FUNCTION),
        ("none", {"backbone": NETWORK}, "another backbone than FunctionBackbone(random conv"),
    ],
)
def test_run_is_read_back_only_with_its_parts(made, name, given, part):
    with pytest.raises(UserError, match=re.escape(f"was trained with {part}")):
        load_run(made(name, "cached"), **given)


def test_dense_head_of_other_widths_is_read_back(tmp_path):
    head = dense_head((6, 5))
    run = load_run(train(config_of("cached", tmp_path, "widths"), head=head), head=head)
    assert [layer["bias"].shape for layer in run.head_params] == [(6,), (5,), (10,)]
    with pytest.raises(UserError, match="was trained with the head 'dense-6-5'; pass it to load_run as head="):
        load_run(run.path)


@pytest.mark.parametrize(("name", "mode"), ONE_EACH)
def test_run_is_resumed_only_with_its_part(made, name, mode, tmp_path):
    path = shutil.copytree(made(name, mode), tmp_path / "run")
    config = replace(read(name, path).config, out=str(path), epochs=2, resume=True)
    part = {
        "another_loss": "its loss_fn was focal_loss, now it is that of the options.",
        "dropout_head": "its head was DropoutHead(num_classes=10), now it is that of the options.",
        "another_network": "its backbone was FunctionBackbone, now it is that of the options.",
        "another_optimizer": "its tx was GradientTransformationExtraArgs, now it is that of the options.",
        "another_augmentation": "its augment was mixup, now it is that of the options.",
    }[name]
    with pytest.raises(UserError) as error:
        train(config)
    assert str(error.value).startswith(f"Cannot resume the run in {path}: {part}")
    assert EXAMPLES[name].main(config) == path
    assert read(name, path).summary["epochs"] == 2
