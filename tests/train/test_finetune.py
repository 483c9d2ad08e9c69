"""Training of all layers: statistics, frozen stages, pieces, recomputation, precision, and what is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NARROW, TINY, command, is_one_error, is_refused
from tasks import fitted, on_all_layers, start_of

from cifar_jax.config import TrainConfig, preset
from cifar_jax.errors import UserError
from cifar_jax.models.head import dense_logits, head_logits, init_head
from cifar_jax.models.preprocess import preprocess
from cifar_jax.models.resnet import ResNet
from cifar_jax.pretrained import FunctionBackbone, WeightsError, load_backbone, random_backbone, save_backbone
from cifar_jax.train.finetune import make_network, trainable, trainable_backbone, with_zero_gamma
from cifar_jax.train.loop import Diverged, EpochOrder
from cifar_jax.train.losses import smoothed_cross_entropy
from cifar_jax.train.optimizer import make_optimizer, param_labels
from cifar_jax.train.step import make_train_step
from cifar_jax.train.task import Batch, finetune_task

KEY = jax.random.key(7)
ORDER = EpochOrder(jax.random.key(1), jax.random.key(2), batch_size=16)


@pytest.fixture(scope="module")
def backbone(shapes):
    return random_backbone(jax.random.key(0), shapes.images[:64], NARROW, 32)


def config(**options):
    return TrainConfig(mode="finetune", batch_size=16, **({"learning_rate": 0.1} | options))


def task_of(backbone, config, dataset=((), ())):
    return on_all_layers(config, init_head(jax.random.key(3), NARROW.features, (8,), 10), backbone, dataset)


def start(backbone, tx=None, **options):
    return start_of(task_of(backbone, config(**options)), tx or optax.sgd(0.1))


def batch_of(shapes, count):
    return Batch(jnp.asarray(shapes.images[:count]), jnp.asarray(shapes.labels[:count]), jnp.ones(count))


# Keeps the gradient that it is given as its state, and changes nothing.
KEEPS_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)


def gradients(backbone, config, batch, batch_stats=None, task=None):
    """Mean loss, metrics and new statistics, and the gradient."""
    task = task or task_of(backbone, config)
    state = start_of(task, KEEPS_GRADIENT)
    state = state._replace(batch_stats=state.batch_stats if batch_stats is None else batch_stats)
    loss_fn, pieces = smoothed_cross_entropy(config.label_smoothing), config.micro_batch
    step = jax.jit(make_train_step(task.forward, loss_fn, KEEPS_GRADIENT, micro_batch=pieces))
    after, metrics = step(state, {}, batch, KEY)
    return (float(metrics.loss_sum) / int(metrics.num), (metrics, after.batch_stats)), after.opt_state


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def train(backbone, config, dataset, epochs=1):
    tx = make_optimizer(config, -(-len(dataset.labels) // config.batch_size))
    return fitted(task_of(backbone, config, dataset), tx, ORDER, epochs, micro_batch=config.micro_batch)


def test_loss_falls_and_the_short_last_batch_trains(backbone, shapes):
    state, rows = train(backbone, config(momentum=0.9), shapes.take(np.arange(150)), epochs=12)
    assert int(state.step) == 12 * 10
    assert rows[-1].train_loss < rows[0].train_loss - 0.1 and np.isfinite(rows[-1].val_loss)


def test_statistics_move_as_keras_moves_them(backbone, shapes):
    """New = 0.9 old + 0.1 of the batch, whose variance is the biased one: seen at the stem, whose input is known."""
    batch, variables = batch_of(shapes, 5), backbone.variables
    (_, (_, new)), _ = gradients(backbone, config(bn_momentum=0.9), batch)
    x = preprocess(batch.inputs, backbone.preprocessing, 32)
    stem = variables["params"]["stem_conv"]
    layout = ("NHWC", "HWIO", "NHWC")
    pads = ((3, 3), (3, 3))
    y = jax.lax.conv_general_dilated(x, jnp.asarray(stem["kernel"]), (2, 2), pads, dimension_numbers=layout)
    y = np.asarray(y + stem["bias"], np.float64)
    old = variables["batch_stats"]["stem_bn"]
    for name, seen in (("mean", y.mean(axis=(0, 1, 2))), ("var", y.var(axis=(0, 1, 2)))):
        np.testing.assert_allclose(new["stem_bn"][name], 0.9 * old[name] + 0.1 * seen, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("freeze_stages", [1, 2])
def test_frozen_stages_are_bit_equal_and_the_rest_moves(backbone, shapes, freeze_stages):
    before = start(backbone)
    state, _ = train(backbone, config(freeze_stages=freeze_stages, weight_decay=1e-2, momentum=0.9), shapes)
    labels = param_labels(before.params, freeze_stages)
    # A bias in front of a BatchNorm changes nothing, so it need not move.
    at = jax.tree_util.tree_leaves_with_path(labels)
    leaves = zip(at, jax.tree.leaves(before.params), jax.tree.leaves(state.params), strict=True)
    for (path, label), old, new in leaves:
        if label == "frozen":
            np.testing.assert_array_equal(old, new)
        elif str(path[-1]) != "['bias']":
            assert np.asarray(old != new).any(), path
    for name, old in before.batch_stats.items():
        frozen = name.startswith("stem") or int(name[5]) <= freeze_stages
        same = [
            np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (old, state.batch_stats[name])), strict=True)
        ]
        assert all(same) if frozen else not any(same), name


def test_frozen_statistics_stay_and_normalise(backbone, shapes):
    batch, state = batch_of(shapes, 8), start(backbone)
    (loss, (_, stats)), _ = gradients(backbone, config(bn_statistics="frozen"), batch)
    for old, new in zip(jax.tree.leaves(state.batch_stats), jax.tree.leaves(stats), strict=True):
        np.testing.assert_array_equal(old, new)
    pooled = ResNet(NARROW).apply(backbone.variables, preprocess(batch.inputs, backbone.preprocessing, 32)).pooled
    log_probs = jax.nn.log_softmax(head_logits(state.params["head"], pooled))
    assert float(loss) == pytest.approx(-float(log_probs[jnp.arange(8), batch.labels].mean()), rel=1e-5)


def test_pieces_count_by_their_examples_and_a_short_last_one_does_too(backbone, shapes):
    """With frozen statistics pieces are independent, so they must add up to the whole batch."""
    batch = batch_of(shapes, 11)
    (loss, (metrics, _)), grads = gradients(backbone, config(bn_statistics="frozen"), batch)
    pieced = config(bn_statistics="frozen", micro_batch=4)
    (loss_4, (metrics_4, _)), grads_4 = gradients(backbone, pieced, batch)
    assert float(loss_4) == pytest.approx(float(loss), rel=1e-5)
    assert int(metrics_4.num) == 11 and int(metrics_4.correct) == int(metrics.correct)
    assert float(metrics_4.loss_sum) == pytest.approx(float(metrics.loss_sum), rel=1e-5) and metrics_4.finite
    assert_close(grads, grads_4, 1e-5)


def test_pieces_update_the_statistics_one_after_the_other(backbone, shapes):
    batch, one_by_one = batch_of(shapes, 7), None
    (_, (_, stats)), _ = gradients(backbone, config(micro_batch=4), batch)
    for rows in (slice(0, 4), slice(4, 7)):
        piece = jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)
        (_, (_, one_by_one)), _ = gradients(backbone, config(), piece, one_by_one)
    assert_close(stats, one_by_one, 1e-6)


def test_recomputed_activations_give_the_same_gradients(backbone, shapes):
    batch = batch_of(shapes, 8)
    plain, again = (gradients(backbone, config(remat=remat), batch) for remat in (False, True))
    assert_close(plain[0][0], again[0][0], 1e-6)
    assert_close(plain[0][1][1], again[0][1][1], 1e-6)
    assert_close(plain[1], again[1], 1e-5)


def test_matrix_products_and_convolutions_have_the_same_gradients(backbone, shapes):
    batch, found = batch_of(shapes, 8), []
    head = init_head(jax.random.key(3), NARROW.features, (8,), 10)
    for as_dots in (False, True):
        function = trainable(make_network(config(), NARROW).clone(convs_as_dots=as_dots), backbone, 32)
        task = finetune_task(head, dense_logits, backbone.variables, function, {})
        found.append(gradients(backbone, config(), batch, task=task)[1])
    assert_close(*found, 1e-5)


def test_bfloat16_computes_in_half_and_keeps_float32(backbone, shapes):
    batch = batch_of(shapes, 16)
    (full, _), _ = gradients(backbone, config(), batch)
    (half, (_, stats)), grads = gradients(backbone, config(precision="bfloat16"), batch)
    assert {leaf.dtype for leaf in jax.tree.leaves((stats, grads))} == {jnp.dtype("float32")}
    assert float(half) != float(full) and float(half) == pytest.approx(float(full), rel=0.05)


def test_smoothed_labels_are_shared_out_evenly(backbone, shapes):
    batch, state = batch_of(shapes, 8), start(backbone)
    (loss, (metrics, _)), _ = gradients(backbone, config(label_smoothing=0.1, bn_statistics="frozen"), batch)
    pooled = ResNet(NARROW).apply(backbone.variables, preprocess(batch.inputs, backbone.preprocessing, 32)).pooled
    labels = optax.smooth_labels(jax.nn.one_hot(batch.labels, 10), 0.1)
    expected = optax.softmax_cross_entropy(head_logits(state.params["head"], pooled), labels).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(metrics.loss_sum) == pytest.approx(8 * float(loss), rel=1e-6)


def test_blocks_with_zero_gamma_begin_as_their_shortcut(backbone):
    params = with_zero_gamma(backbone.variables)["params"]
    blocks = [name for name in params if name.startswith("stage")]
    assert blocks and not any(np.any(params[name]["bn3"]["scale"]) for name in blocks)
    assert all(np.any(params[name]["bn2"]["scale"]) for name in blocks) and np.any(params["stem_bn"]["scale"])


def test_zero_gamma_leaves_frozen_stages_as_they_are(backbone, shapes):
    options = config(zero_gamma=True, freeze_stages=1)
    before, after = backbone.variables["params"], task_of(backbone, options).params["backbone"]
    assert_close(after["stage1_block1"], before["stage1_block1"], 0)
    assert not np.any(after["stage2_block1"]["bn3"]["scale"]) and np.any(before["stage2_block1"]["bn3"]["scale"])


def test_variables_of_a_function_that_have_no_gradient_are_refused():
    variables = {"kernel": np.ones((3, 4), np.float32), "bits": [np.ones(3, np.int32)]}
    function = FunctionBackbone(lambda v, x: x.mean((1, 2)) @ v["kernel"] * v["bits"][0].sum(), variables, "a product")
    with pytest.raises(UserError, match=r"a product: .* cannot train: variables\['bits'\]\[0\] is int32, and"):
        trainable_backbone(config(), function, 32)


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was(backbone, shapes):
    tx, task = make_optimizer(config(momentum=0.9), 7), task_of(backbone, config())
    broken = jax.tree.map(lambda leaf: leaf, task.params)
    broken["head"][0]["kernel"] = broken["head"][0]["kernel"].at[0, 0].set(jnp.nan)
    before = start_of(task._replace(params=broken), tx)
    step = jax.jit(make_train_step(task.forward, smoothed_cross_entropy(0), tx))
    after, metrics = step(before, {}, batch_of(shapes, 8), KEY)
    assert not metrics.finite and after.halted
    jax.tree.map(np.testing.assert_array_equal, before._replace(halted=()), after._replace(halted=()))


def test_divergence_names_the_step_and_keeps_what_was_good(backbone, shapes):
    with pytest.raises(Diverged, match=r"epoch 1, step \d\.$") as raised:
        train(backbone, config(learning_rate=1e30), shapes)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(raised.value.state.params))


def test_a_run_that_diverges_names_the_tensor_the_rate_and_how_to_continue(tmp_path, capsys, narrow):
    run = tmp_path / "a run"
    arguments = ("--mode", "finetune", "--learning-rate", "1e30", "--schedule", "constant", "--out", run)
    result = command(capsys, "train", *TINY, *arguments)
    is_one_error(
        result, 1, " (first the ", "The learning rate was 1e+30, that of the backbone 1e+30.", f"--resume --out '{run}'"
    )


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("--freeze-stages 5 --mode finetune", ["--freeze-stages must be between 0 and 4, got 5."]),
        ("--freeze-stages -1 --mode finetune", ["--freeze-stages must be between 0 and 4, got -1."]),
        ("--micro-batch 65 --mode finetune", ["--micro-batch must be at most --batch-size 64, got 65."]),
        ("--micro-batch 0 --mode finetune", ["--micro-batch must be at least 1, got 0."]),
        ("--augment flip", ["--augment", "--mode cached", "live or finetune"]),
        ("--augment mirror --mode live", ["--augment", "mirror"]),
        ("--augment flip flip --mode live", ["--augment must be a list without repetitions, got flip flip."]),
        ("--freeze-stages 1", ["--freeze-stages has no meaning in --mode cached", "--mode finetune"]),
        ("--remat --mode live", ["--remat has no meaning in --mode live"]),
        ("--micro-batch 8", ["--micro-batch has no meaning in --mode cached"]),
        ("--bn-momentum 0.5", ["--bn-momentum has no meaning"]),
        ("--bn-statistics frozen --mode live", ["--bn-statistics has no meaning"]),
        ("--zero-gamma", ["--zero-gamma has no meaning"]),
        ("--backbone-learning-rate 0.1", ["--backbone-learning-rate has no meaning"]),
        ("--mode finetune --bn-statistics frozen --bn-momentum 0.5", ["--bn-momentum moves no statistics"]),
        ("--bn-momentum 1 --mode finetune", ["--bn-momentum must be at least 0 and below 1, got 1.0."]),
        ("--nesterov --momentum 0", ["--nesterov needs --momentum", "--momentum"]),
        ("--warmup-epochs 1 --schedule constant", ["--warmup-epochs goes with --schedule cosine"]),
        ("--warmup-epochs 4 --schedule cosine", ["--warmup-epochs must be at least 0 and below --epochs 4, got 4.0."]),
        ("--label-smoothing 1", ["--label-smoothing must be at least 0 and below 1, got 1.0."]),
        ("--weight-decay -1", ["--weight-decay must be a number of at least 0, got -1.0."]),
        ("--clip-norm 0", ["--clip-norm must be a positive number, got 0.0."]),
        ("--resume --overwrite", ["--resume", "--overwrite"]),
    ],
)
def test_options_that_cannot_be(tmp_path, capsys, typed, parts):
    result = command(capsys, "train", *TINY, "--out", tmp_path / "out", *typed.split())
    is_refused(result, *parts)
    assert not (tmp_path / "out").exists()


def test_resume_needs_a_place(capsys):
    is_one_error(command(capsys, "train", *TINY, "--resume"), 2, "--resume needs", "--out")


def test_a_file_whose_width_does_not_fit_is_refused(tmp_path, backbone):
    save_backbone(tmp_path / "weights.safetensors", backbone.replace(config=replace(NARROW, width=8)))
    with pytest.raises(WeightsError, match=r"does not match the network: .* expected"):
        load_backbone(tmp_path / "weights.safetensors")


def test_presets_are_the_recipes_they_claim_to_be():
    lab, pretrain = preset("finetune"), preset("pretrain")
    assert (lab.mode, lab.learning_rate, lab.batch_size, lab.epochs) == ("finetune", 0.01, 64, 4)
    assert (lab.dataset, lab.weights, lab.momentum, lab.augment) == ("cifar10", "keras-resnet50", 0.0, ())
    assert (pretrain.dataset, pretrain.weights, pretrain.image_size) == ("cifar100_subset", "random-w16", 64)
    assert TrainConfig.from_json(pretrain.to_json()) == pretrain
