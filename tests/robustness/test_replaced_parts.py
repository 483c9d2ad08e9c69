"""Parts passed to `train`: recorded from the start, refused before a file is touched, not forgotten later."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Killed, Silent, command, is_one_error, narrow_networks, summary_of, without_pictures

from cifar_jax import FunctionBackbone, TrainConfig, UserError, dense_head, flax_head, load_backbone, load_run
from cifar_jax.experiment import train
from cifar_jax.models.head import Head
from cifar_jax.runs.resume import is_unfinished
from cifar_jax.runs.scores import evaluate_run
from cifar_jax.train.loop import Diverged
from cifar_jax.train.losses import cross_entropy


def fields(variables, images):
    """A layer on the means of 4 x 4 fields of an image: a network that compiles in no time."""
    x = images.astype(jnp.float32).reshape(len(images), 4, 8, 4, 8, 3).mean(axis=(2, 4)).reshape(len(images), -1)
    return nn.relu((x / 127.5 - 1) @ variables["kernel"])


def network(seed=0, function=fields):
    kernel = np.random.default_rng(seed).normal(0, 0.3, (48, 16)).astype(np.float32)
    return FunctionBackbone(function, {"kernel": kernel}, "fields")


NETWORK = network()


def focal(logits, labels):
    losses = cross_entropy(logits, labels)
    return (1 - jnp.exp(-losses)) ** 2 * losses


@pytest.fixture(autouse=True)
def small(monkeypatch):
    narrow_networks(monkeypatch)
    without_pictures(monkeypatch)


def config(tmp_path, **more):
    usual = {
        **{"dataset": "shapes", "train_examples": 64, "test_examples": 20, "epochs": 1, "batch_size": 32},
        **{"hidden": (8,), "cache_dir": str(tmp_path / "cache"), "out": str(tmp_path / "run")},
    }
    return TrainConfig(**usual | more)


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


class Stops(Silent):
    """Raises an error when the first epoch begins, or when it is done."""

    def __init__(self, error, done=False):
        self.error, self.done = error, done

    @contextlib.contextmanager
    def progress(self, description, total, compiles=False):
        if description == "Epoch 1" and not self.done:
            raise self.error
        yield lambda _: None

    def epoch(self, row, num_epochs):
        if self.done:
            raise self.error


def test_features_of_a_file_are_not_those_of_changed_variables(tmp_path):
    job = config(tmp_path, weights="demo", image_size=32)
    backbone = load_backbone("demo")
    first = train(replace(job, out=str(tmp_path / "first")), backbone=backbone)
    changed = backbone.replace(variables=jax.tree.map(lambda leaf: leaf * 1.1, backbone.variables))
    assert changed.sha256 == "" and backbone.replace(image_size=64).sha256 == backbone.sha256
    run = train(job, backbone=changed)
    found = summary_of(run)
    assert found["images_per_second"] is not None, "features came from the cache"
    assert found["backbone"]["sha256"] not in (None, "", summary_of(first)["backbone"]["sha256"])
    for read in (load_run(run), load_run(run, backbone=changed)):  # kept in the run, as no other file has it
        jax.tree.map(np.testing.assert_array_equal, read.backbone.variables, changed.variables)
    with pytest.raises(UserError, match="was trained with another backbone than"):
        load_run(run, backbone=backbone)
    # What is the same is found again, whoever makes it.
    again = train(replace(job, out=str(tmp_path / "again")), backbone=changed.replace(sha256=""))
    assert summary_of(again)["images_per_second"] is None


def loss(raises):
    """A loss by the same name, whether or not it raises."""

    def loss_fn(logits, labels):
        if raises:
            raise TypeError("a mistake in the user's loss")
        return cross_entropy(logits, labels)

    return loss_fn


def head(width):
    """A head by the same name, whatever its width."""
    return dense_head((width,))._replace(name="mine")


PLAIN, MOMENTUM = optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)
WRONG = {
    "missing": ({"tx": PLAIN}, {"tx": MOMENTUM}, UserError, "has no opt_state.*or start again with --overwrite"),
    "more": ({"tx": MOMENTUM}, {"tx": PLAIN}, UserError, "has an unexpected opt_state"),
    "shape": ({"head": head(5)}, {"head": head(6)}, UserError, r"params/head/0/bias has shape \[5\], expected \[6\]"),
    "raises": ({"loss_fn": loss(False)}, {"loss_fn": loss(True)}, TypeError, "a mistake in the user's loss"),
}


@pytest.mark.parametrize("case", WRONG)
def test_parts_that_do_not_fit_are_refused_and_the_run_is_kept(tmp_path, case):
    began, part, error, text = WRONG[case]
    run = train(config(tmp_path), backbone=NETWORK, **began)
    before = contents(run)
    with pytest.raises(error, match=text):
        train(config(tmp_path, epochs=2, resume=True), backbone=NETWORK, **part)
    assert contents(run) == before and summary_of(run)["status"] == "complete"


@pytest.mark.parametrize("mode", ["cached", "live", "finetune"])
def test_a_run_is_not_overwritten_for_one_that_cannot_take_a_step(tmp_path, mode):
    run = train(config(tmp_path), backbone=NETWORK)
    before = contents(run)
    with pytest.raises(TypeError, match="a mistake in the user's loss"):
        train(config(tmp_path, mode=mode, overwrite=True), backbone=NETWORK, loss_fn=loss(True))
    assert contents(run) == before


def test_a_run_that_failed_has_a_summary_and_is_resumed(tmp_path):
    with pytest.raises(TypeError, match="of a user's reporter"):
        train(config(tmp_path, epochs=2), Stops(TypeError("of a user's reporter"), done=True), backbone=NETWORK)
    run = tmp_path / "run"
    assert summary_of(run)["status"] == "failed"
    assert load_run(run, allow_incomplete=True, backbone=NETWORK).summary["epochs"] == 1
    train(config(tmp_path, epochs=2, resume=True), backbone=NETWORK)
    assert summary_of(run)["status"] == "complete"


def test_parts_of_a_run_without_a_checkpoint_are_not_forgotten(tmp_path, capsys):
    job = config(tmp_path, weights="demo", image_size=32)
    with pytest.raises(Killed):
        train(job, Stops(Killed()), loss_fn=focal)
    run = tmp_path / "run"
    before = contents(run)
    assert json.loads((run / "inputs.json").read_text())["parts"] == {"loss_fn": "focal"}
    assert not is_unfinished(job)  # so that the command does not ask to resume what it cannot
    with pytest.raises(UserError, match=r"its loss_fn was focal, now it is that of the options\. Pass to `train` what"):
        train(replace(job, resume=True))
    assert contents(run) == before
    train(replace(job, resume=True), loss_fn=focal)
    for file in (run, run / "config.json"):
        refused = command(capsys, "train", "--config", file, "--out", tmp_path / "other")
        is_one_error(refused, 2, f"--config {run / 'config.json'}: that run was passed what options cannot name")
        assert "(loss_fn focal); run its Python script again" in refused.err
    plain = train(replace(job, out=str(tmp_path / "plain")))
    assert command(capsys, "train", "--config", plain, "--out", tmp_path / "other").code == 0


def test_images_of_a_run_without_a_checkpoint_may_not_change(tmp_path):
    job = config(tmp_path)
    with pytest.raises(Killed):
        train(job, Stops(Killed()), backbone=NETWORK)
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    inputs["digests"]["training images"] = "of others"
    (tmp_path / "run" / "inputs.json").write_text(json.dumps(inputs))
    with pytest.raises(UserError, match="its training images have changed"):
        train(replace(job, resume=True), backbone=NETWORK)


def test_a_run_without_inputs_json_is_not_resumed(tmp_path):
    run = train(config(tmp_path), backbone=NETWORK)
    (run / "inputs.json").unlink()
    with pytest.raises(
        UserError, match=r"it has no inputs\.json, which says what it began with\. Start again with --ov"
    ):
        train(config(tmp_path, epochs=2, resume=True), backbone=NETWORK)


class TwoLayers(nn.Module):
    width: int = 8
    activation: object = nn.relu

    @nn.compact
    def __call__(self, features):
        return nn.Dense(10)(self.activation(nn.Dense(self.width)(features)))


def test_a_flax_head_is_named_with_its_fields():
    assert flax_head(TwoLayers(16)).name == "TwoLayers(width=16, activation=relu)"
    assert flax_head(TwoLayers(activation=nn.tanh)).name != flax_head(TwoLayers()).name
    assert "0x" not in flax_head(TwoLayers(activation=object())).name
    assert flax_head(nn.Sequential([nn.Dense(10)])).name.startswith("Sequential(layers=")


@pytest.mark.parametrize("weights", ["same", "other"])
def test_a_backbone_that_was_passed_is_compared_by_its_content(tmp_path, weights):
    job = config(tmp_path, weights="demo", image_size=32)
    backbone = load_backbone("demo")
    variables = jax.tree.map(lambda leaf: leaf * 1.1, backbone.variables)
    train(job, backbone=backbone if weights == "same" else backbone.replace(variables=variables))
    longer = replace(job, epochs=2, resume=True)
    if weights == "same":
        assert summary_of(train(longer))["epochs"] == 2
    else:
        with pytest.raises(UserError, match="its backbone was Backbone, now it is that of the options"):
            train(longer)


def test_with_an_optimiser_of_the_user_the_options_say_nothing_of_learning_rates(tmp_path, capsys):
    job = config(tmp_path, schedule="cosine", epochs=2, weights="demo", image_size=32)
    with pytest.raises(Diverged):
        train(job, tx=optax.sgd(float("inf")))
    run = tmp_path / "run"
    assert summary_of(run)["learning_rates"] == []
    with pytest.raises(UserError, match=r"Continue it with --resume and a lower rate in its tx\."):
        load_run(run)
    # That the optimiser is not its own comes before a rate that means nothing.
    with pytest.raises(UserError, match="its tx was GradientTransformationExtraArgs, now it is that of the options"):
        train(replace(job, resume=True))
    # Nor do other options of the optimiser mean anything, and more epochs only go on.
    resumed = train(replace(job, resume=True, epochs=3, learning_rate=0.5, momentum=0.9), tx=optax.sgd(1e-3))
    assert summary_of(resumed)["learning_rates"] == [] and summary_of(resumed)["epochs"] == 3


def test_a_run_of_the_dense_head_is_not_loaded_with_another_head(tmp_path):
    run = train(config(tmp_path), backbone=NETWORK)
    other = Head(dense_head((3,)).init, dense_head((3,)).logits, "mine")
    for head in (other, dense_head((3,))):
        with pytest.raises(UserError, match=r"was trained with the dense head of its options; leave head= out\.$"):
            load_run(run, head=head, backbone=NETWORK)
    assert load_run(run, head=dense_head((8,)), backbone=NETWORK).head_params[0]["bias"].shape == (8,)


def test_load_run_with_params_of_other_shapes_does_not_advise_to_start_again(tmp_path):
    head = dense_head((3,))._replace(name="mine")
    run = train(config(tmp_path), backbone=NETWORK, head=head)
    with pytest.raises(UserError, match=r"Give what the run was trained with\.$"):
        load_run(run, head=dense_head((4,))._replace(name="mine"), backbone=NETWORK)


def test_a_function_must_have_the_variables_of_the_run_and_another_program_is_warned_of(tmp_path, log_messages):
    run = train(config(tmp_path), backbone=NETWORK)
    same = network(function=lambda variables, images: fields(variables, images) * 1)
    assert same.sha256 == NETWORK.sha256 and same.program_sha256 != NETWORK.program_sha256
    load_run(run, backbone=network())
    assert not [text for text in log_messages if "program" in text]
    assert load_run(run, backbone=same).backbone is same
    assert [
        text
        for text in log_messages
        if "'fields' has the variables of the run" in text and "a different program" in text
    ]
    log_messages.clear()
    train(config(tmp_path, epochs=2, resume=True), backbone=same)
    assert [text for text in log_messages if "compiles to a different program than when the run began" in text]
    assert summary_of(run)["images_per_second"] is not None  # features of the other program are not taken for its own
    with pytest.raises(UserError, match="pass the same one to load_run as backbone="):
        load_run(run, backbone=network(seed=1))
    with pytest.raises(UserError, match="its weights and program have changed"):
        train(config(tmp_path, epochs=3, resume=True), backbone=network(seed=1))


def test_variables_of_a_function_differ_by_shape_and_dtype_too():
    def digest(array):
        return FunctionBackbone(fields, {"kernel": array}, "fields").sha256

    arrays = [np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32), np.zeros((2, 3), np.int32)]
    assert len({digest(array) for array in arrays}) == 3


def test_a_backbone_that_was_passed_is_not_called_untrained_before(tmp_path):
    job = config(tmp_path, mode="finetune", weights="random-w16", image_size=32)
    backbone = load_backbone("demo")
    assert load_run(train(job, backbone=backbone)).backbone.variant == backbone.variant


def test_the_loss_of_an_evaluation_is_named_with_its_smoothing(tmp_path, log_messages):
    run = train(config(tmp_path, label_smoothing=0.1), backbone=NETWORK, loss_fn=focal)
    evaluate_run(run, backbone=NETWORK)
    text = "was trained with the loss focal; the loss here is cross-entropy with label smoothing."
    assert [sentence for sentence in log_messages if text in sentence]


class Guarded(Silent):
    """Lets nothing go to the devices unasked while test images are scored."""

    scored = False

    @contextlib.contextmanager
    def progress(self, description, total, compiles=False):
        is_test = description == "Evaluating test images"
        self.scored |= is_test
        with jax.transfer_guard_host_to_device("disallow") if is_test else contextlib.nullcontext():
            yield lambda _: None


def test_the_selected_state_of_a_resumed_run_lies_on_the_devices_once(tmp_path):
    """The second epoch climbs, so that the first stays the selected one."""
    tx = optax.sgd(lambda count: jnp.where(count < 16, 0.1, -1.0))
    more = {"mode": "live", "val_fraction": 0.5, "batch_size": 2, "seed": 1, "resume": True}
    train(config(tmp_path, **more), backbone=NETWORK, tx=tx)
    reporter = Guarded()
    run = train(config(tmp_path, **more, epochs=2), reporter, backbone=NETWORK, tx=tx)
    assert reporter.scored and summary_of(run)["selected_epoch"] == 1


def test_overwriting_replaces_the_recorded_parts(tmp_path):
    run = train(config(tmp_path), backbone=NETWORK)
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "inputs.json"} <= names
    again = train(config(tmp_path, overwrite=True), backbone=NETWORK, loss_fn=focal)
    assert json.loads((Path(again) / "inputs.json").read_text())["parts"] == {
        "loss_fn": "focal",
        "backbone": "FunctionBackbone",
    }
