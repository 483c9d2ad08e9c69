"""Training of all layers: BatchNorm statistics, frozen stages, micro-batches, recomputation and precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NARROW
from tasks import assert_close, assert_same_bits, batch_of, fitted, on_all_layers, start_of

from cifar_jax.config import TrainConfig, preset
from cifar_jax.errors import UserError
from cifar_jax.experiment import train
from cifar_jax.models.head import dense_logits, head_logits, init_head
from cifar_jax.models.preprocess import preprocess
from cifar_jax.models.resnet import ResNet, ResNetConfig
from cifar_jax.pretrained import FunctionBackbone, random_backbone
from cifar_jax.train.finetune import make_network, trainable, trainable_backbone, with_zero_gamma
from cifar_jax.train.loop import Diverged, EpochOrder
from cifar_jax.train.losses import cross_entropy
from cifar_jax.train.optimizer import make_optimizer, param_labels
from cifar_jax.train.step import make_train_step
from cifar_jax.train.task import finetune_task

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(7)
ORDER = EpochOrder(jax.random.key(1), jax.random.key(2), batch_size=16)
NETWORK = ResNetConfig(stage_sizes=(1,), width=4)  # half the time to compile of `NARROW`, which has two stages
MOMENTUM = 0.9  # of the BatchNorm statistics

# An optimiser that keeps the gradient as its state and changes nothing.
KEEPS_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)


@pytest.fixture(scope="module")
def backbone(shapes):
    return random_backbone(jax.random.key(0), shapes.images[:16], NETWORK, 32)


@pytest.fixture(scope="module")
def two_stages(shapes):
    return random_backbone(jax.random.key(0), shapes.images[:16], NARROW, 32)


@pytest.fixture(scope="module")
def head():
    return init_head(jax.random.key(3), NETWORK.features, (8,), 10)


def step_on(task, batch, **more):
    """The state after a step of `KEEPS_GRADIENT`, and its metrics."""
    step = jax.jit(make_train_step(task.forward, cross_entropy, KEEPS_GRADIENT, **more))
    return step(start_of(task, KEEPS_GRADIENT), {}, batch, KEY)


@pytest.fixture(scope="module")
def gradients(backbone, head):
    """Takes a batch and options; returns the state, whose opt_state is the gradient, and metrics. Compiles once."""

    @functools.cache
    def compiled(**options):
        config = TrainConfig(mode="finetune", **options)
        task = on_all_layers(config, head, backbone, ((), ()))
        micro_batch = options.get("micro_batch")
        return task, jax.jit(make_train_step(task.forward, cross_entropy, KEEPS_GRADIENT, micro_batch=micro_batch))

    def gradients(batch, start=None, **options):
        options = options if "bn_statistics" in options else {"bn_momentum": MOMENTUM} | options
        task, step = compiled(**options)
        return step(start or start_of(task, KEEPS_GRADIENT), {}, batch, KEY)

    return gradients


def test_statistics_move_as_in_keras(gradients, backbone, shapes):
    """New = 0.9 old + 0.1 of the batch, with the biased variance; checked at the stem, whose input is known."""
    batch, variables = batch_of(shapes.images[:3], shapes.labels[:3]), backbone.variables
    state, _ = gradients(batch)
    x = preprocess(batch.inputs, backbone.preprocessing, 32)
    stem, layout, pads = variables["params"]["stem_conv"], ("NHWC", "HWIO", "NHWC"), ((3, 3), (3, 3))
    y = jax.lax.conv_general_dilated(x, jnp.asarray(stem["kernel"]), (2, 2), pads, dimension_numbers=layout)
    y = np.asarray(y + stem["bias"], np.float64)
    old, new = variables["batch_stats"]["stem_bn"], state.batch_stats["stem_bn"]
    for name, of_batch in (("mean", y.mean(axis=(0, 1, 2))), ("var", y.var(axis=(0, 1, 2)))):
        np.testing.assert_allclose(new[name], MOMENTUM * old[name] + (1 - MOMENTUM) * of_batch, rtol=1e-5, atol=1e-6)


def test_frozen_statistics_are_used_and_micro_batches_add_up_to_the_batch(gradients, backbone, head, shapes):
    batch = batch_of(shapes.images[:5], shapes.labels[:5])
    whole, metrics = gradients(batch, bn_statistics="frozen")
    assert_same_bits(whole.batch_stats, jax.tree.map(jnp.asarray, backbone.variables["batch_stats"]))
    pooled = ResNet(NETWORK).apply(backbone.variables, preprocess(batch.inputs, backbone.preprocessing, 32)).pooled
    log_probs = jax.nn.log_softmax(head_logits(head, pooled))
    assert float(metrics.loss_sum) == pytest.approx(-float(log_probs[jnp.arange(5), batch.labels].sum()), rel=1e-5)

    pieces, metrics_of_pieces = gradients(batch, bn_statistics="frozen", micro_batch=3)  # the last one has two examples
    assert_close(pieces.opt_state, whole.opt_state, 1e-5)
    assert_close(metrics_of_pieces, metrics, 1e-5)
    assert int(metrics.num) == 5


def test_micro_batches_update_the_statistics_one_after_the_other(gradients, shapes):
    batch = batch_of(shapes.images[:6], shapes.labels[:6])
    together, _ = gradients(batch, micro_batch=3)
    halves = [batch_of(shapes.images[rows], shapes.labels[rows]) for rows in (slice(0, 3), slice(3, 6))]
    first, _ = gradients(halves[0])
    second, _ = gradients(halves[1], first)
    assert_close(together.batch_stats, second.batch_stats, 1e-6)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first.opt_state, second.opt_state)
    assert_close(together.opt_state, mean, 1e-5)


def test_recomputed_activations_and_plain_convolutions_give_the_same_gradients(gradients, backbone, head, shapes):
    batch = batch_of(shapes.images[:3], shapes.labels[:3])
    plain, _ = gradients(batch)
    recomputed, _ = gradients(batch, remat=True)
    network = make_network(TrainConfig(mode="finetune", bn_momentum=MOMENTUM), NETWORK, "gpu")
    convolutions = finetune_task(head, dense_logits, backbone.variables, trainable(network, backbone, 32), {})
    for state in (recomputed, step_on(convolutions, batch)[0]):
        assert_close(state.batch_stats, plain.batch_stats, 1e-5)
        assert_close(state.opt_state, plain.opt_state, 1e-5)


def test_bfloat16_computes_in_half_and_keeps_float32(gradients, shapes):
    batch = batch_of(shapes.images[:3], shapes.labels[:3])
    (_, full), (state, half) = gradients(batch), gradients(batch, precision="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves((state.batch_stats, state.opt_state))} == {jnp.dtype("float32")}
    assert float(half.loss_sum) != float(full.loss_sum) == pytest.approx(float(half.loss_sum), rel=0.05)


def test_a_step_whose_statistics_are_not_finite_changes_nothing(gradients, shapes):
    batch = batch_of(shapes.images[:3], shapes.labels[:3])
    before, _ = gradients(batch)
    kernel = before.params["backbone"]["stem_conv"]["kernel"]
    before.params["backbone"]["stem_conv"]["kernel"] = kernel.at[0, 0].set(jnp.nan)
    after, metrics = gradients(batch, before)
    assert not metrics.finite and after.halted
    assert_same_bits(after._replace(halted=before.halted), before)


@pytest.mark.parametrize("freeze_stages", [1, 2])
def test_the_loss_falls_and_frozen_stages_keep_their_bits(two_stages, shapes, freeze_stages):
    options = {"freeze_stages": freeze_stages, "weight_decay": 1e-2, "momentum": 0.9, "learning_rate": 0.05}
    config = TrainConfig(mode="finetune", batch_size=16, **options)
    dataset = shapes.take(np.arange(22))  # so that the last batch is short
    task = on_all_layers(config, init_head(jax.random.key(3), NARROW.features, (8,), 10), two_stages, dataset)
    tx = make_optimizer(config, 2)
    before, (state, rows) = start_of(task, tx), fitted(task, tx, ORDER, 8)
    assert int(state.step) == 8 * 2 and rows[-1].train_loss < rows[0].train_loss - 0.1

    labels = jax.tree_util.tree_leaves_with_path(param_labels(before.params, freeze_stages))
    leaves = zip(labels, jax.tree.leaves(before.params), jax.tree.leaves(state.params), strict=True)
    for (path, label), old, new in leaves:
        if label == "frozen":
            np.testing.assert_array_equal(old, new)
        elif str(path[-1]) != "['bias']":  # a bias in front of a BatchNorm has no effect, so it need not move
            assert np.asarray(old != new).any(), path
    for name, old in before.batch_stats.items():
        same = [
            np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (old, state.batch_stats[name])), strict=True)
        ]
        assert all(same) if name.startswith("stem") or int(name[5]) <= freeze_stages else not any(same), name


@pytest.mark.parametrize("freeze_stages", [0, 1])
def test_zero_gamma_starts_trained_blocks_as_their_shortcut(two_stages, freeze_stages):
    before = two_stages.variables["params"]
    params = with_zero_gamma(two_stages.variables, freeze_stages)["params"]
    for name in ("stage1_block1", "stage2_block1"):
        assert np.any(before[name]["bn3"]["scale"]) and np.any(params[name]["bn2"]["scale"])
        assert np.any(params[name]["bn3"]["scale"]) == (int(name[5]) <= freeze_stages)
    assert np.any(params["stem_bn"]["scale"])


def test_variables_of_a_function_that_have_no_gradient_are_refused():
    variables = {"kernel": np.ones((3, 4), np.float32), "bits": [np.ones(3, np.int32)]}
    function = FunctionBackbone(lambda v, x: x.mean((1, 2)) @ v["kernel"] * v["bits"][0].sum(), variables, "a product")
    with pytest.raises(UserError, match=r"a product: .* cannot train: variables\['bits'\]\[0\] is int32, and"):
        trainable_backbone(TrainConfig(mode="finetune"), function, 32)


def test_a_run_that_diverges_names_the_tensor_both_rates_and_how_to_continue(tmp_path, narrow):
    kernel = np.full((32 * 32 * 3, 4), 0.01, np.float32)
    product = FunctionBackbone(lambda v, x: x.astype(jnp.float32).reshape(len(x), -1) @ v, kernel, "a product")
    config = TrainConfig(
        **{"mode": "finetune", "dataset": "shapes", "train_examples": 40, "test_examples": 20, "batch_size": 8},
        **{"learning_rate": 1e30, "backbone_learning_rate": 1e29, "hidden": ()},
        **{"out": str(tmp_path / "a run"), "cache_dir": str(tmp_path)},
    )
    with pytest.raises(Diverged, match=r"epoch 1, step \d+ \(first the ") as raised:
        train(config, backbone=product)
    assert "The learning rate was 1e+30, that of the backbone 1e+29." in str(raised.value)
    assert f"--resume --out '{tmp_path / 'a run'}'" in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "finetune", "freeze_stages": 5}, "--freeze-stages must be between 0 and 4, got 5"),
        ({"mode": "finetune", "micro_batch": 65}, "--micro-batch must be at most --batch-size 64, got 65"),
        ({"mode": "finetune", "bn_statistics": "frozen", "bn_momentum": 0.5}, "--bn-momentum moves no statistics"),
        ({"mode": "live", "augment": ("flip", "flip")}, "--augment must be a list without repetitions, got flip flip"),
        ({"mode": "cached", "augment": ("flip",)}, "--augment .*--mode cached.* live or finetune"),
        ({"mode": "cached", "freeze_stages": 1}, "--freeze-stages has no meaning in --mode cached.*--mode finetune"),
        ({"mode": "live", "remat": True}, "--remat has no meaning in --mode live"),
    ],
)
def test_options_of_training_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**options)


def test_the_preset_is_the_recipe_of_the_lab():
    lab = preset("finetune")
    assert (lab.mode, lab.learning_rate, lab.batch_size, lab.epochs) == ("finetune", 0.01, 64, 4)
    assert (lab.dataset, lab.weights, lab.momentum, lab.augment) == ("cifar10", "keras-resnet50", 0.0, ())
