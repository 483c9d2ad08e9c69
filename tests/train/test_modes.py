"""Training modes: the same head from features and from images, one loss and any head for all, the public pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_difference
from flax import linen as nn
from tasks import assert_close, assert_same_bits, fitted, on_all_layers, on_features, on_images, start_of, steps_of

import cifar_jax as cj
from cifar_jax.config import TrainConfig
from cifar_jax.features.extractor import make_extractor
from cifar_jax.models.head import dense_logits, flax_head, init_head
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained import FunctionBackbone, random_backbone
from cifar_jax.train.evaluate import make_evaluate
from cifar_jax.train.loop import EpochOrder
from cifar_jax.train.losses import cross_entropy, smoothed_cross_entropy
from cifar_jax.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compile")

TX = optax.sgd(0.05)
KEY = jax.random.key(7)
ORDER = EpochOrder(jax.random.key(1), jax.random.key(2), batch_size=16)
FINETUNE = TrainConfig(mode="finetune", batch_size=16)
MODES = ["cached", "live", "finetune"]


def product(variables, images):
    """A backbone that compiles in no time."""
    x = images.astype(jnp.float32).reshape(images.shape[0], -1) / 255 - 0.5
    return jnp.tanh(x @ variables["kernel"])


KERNEL = np.asarray(0.05 * jax.random.normal(KEY, (32 * 32 * 3, 12)))
BACKBONE = FunctionBackbone(product, {"kernel": KERNEL}, "a product")


@pytest.fixture(scope="module")
def features(shapes):
    return make_extractor(BACKBONE)(shapes.images)


@pytest.fixture
def make(shapes, features):
    """Makes the task of a mode, with 40 training and 30 validation images."""

    def make(mode, params=None, head=dense_logits):
        params = init_head(jax.random.key(3), 12, (16,), 10) if params is None else params
        inputs = features if mode == "cached" else shapes.images
        data = [(inputs[rows], shapes.labels[rows]) for rows in (slice(0, 40), slice(40, 70))]
        if mode == "cached":
            return on_features(params, *data, head)
        if mode == "live":
            return on_images(params, BACKBONE, *data, head)
        return on_all_layers(FINETUNE, params, BACKBONE, *data, head)

    return make


def test_cached_and_live_give_the_same_head_and_no_bit_of_the_backbone_moves(shapes):
    backbone = random_backbone(jax.random.key(0), shapes.images[:16], ResNetConfig(stage_sizes=(1,), width=4), 32)
    before, on_device = jax.tree.map(np.array, backbone.variables), jax.tree.map(jnp.array, backbone)
    train, val = shapes.take(np.arange(70)), shapes.take(np.arange(150, 200))
    params, tx = init_head(jax.random.key(3), backbone.num_features, (16,), 10), optax.sgd(0.1, momentum=0.5)

    extractor = make_extractor(backbone)
    cached = on_features(params, (extractor(train.images), train.labels), (extractor(val.images), val.labels))
    live = on_images(params, on_device, train, val)
    (state, rows), (state_live, rows_live) = (fitted(task, tx, ORDER, 2, batch_size=50) for task in (cached, live))

    leaves = map(jax.tree.leaves, (state_live.params, state.params, {"head": params}))
    for a, b, start in zip(*leaves, strict=True):
        assert relative_difference(a, b) < 1e-4
        assert np.abs(np.asarray(a) - np.asarray(start)).max() > 1e-3  # it has moved
    for a, b in zip(rows_live, rows, strict=True):
        np.testing.assert_allclose(a[1:5], b[1:5], rtol=1e-4)
    assert state_live.batch_stats == {}
    assert_same_bits(jax.tree.map(np.array, on_device.variables), before)


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_is_one_function_for_training_and_validation(make, mode):
    """Twice the loss at half the rate takes the same steps, and both losses are twice as large."""
    task = make(mode)

    def twice(logits, labels):
        return 2 * cross_entropy(logits, labels)

    state, rows = fitted(task, optax.sgd(0.02), ORDER, 2)
    doubled, doubled_rows = fitted(task, optax.sgd(0.01), ORDER, 2, twice)
    assert_same_bits(doubled.params, state.params)
    for row, doubled_row in zip(rows, doubled_rows, strict=True):
        assert doubled_row.train_loss == pytest.approx(2 * row.train_loss, rel=1e-6)
        assert doubled_row.val_loss == pytest.approx(2 * row.val_loss, rel=1e-6)
        assert (doubled_row.train_accuracy, doubled_row.val_accuracy) == (row.train_accuracy, row.val_accuracy)


@pytest.mark.parametrize("mode", MODES)
def test_validation_has_the_smoothed_loss_and_the_logits_of_the_split_in_its_order(make, mode):
    task, smoothing, results = make(mode), 0.2, []
    state, rows = fitted(
        task,
        TX,
        ORDER,
        1,
        smoothed_cross_entropy(smoothing),
        batch_size=16,
        on_epoch=lambda row, result, state: results.append(result),
    )
    (result,), (inputs, labels, _) = results, task.splits["val"]
    expected, _ = task.forward(
        state.params, state.batch_stats, task.frozen, inputs, train=False, key=None, mask=jnp.ones(30)
    )
    assert result.logits.shape == (30, 10) and relative_difference(result.logits, expected) < 1e-5
    log_probs = np.asarray(jax.nn.log_softmax(expected), np.float64)
    plain = -log_probs[np.arange(30), labels].mean()
    smoothed = (1 - smoothing) * plain - smoothing * log_probs.mean()
    assert rows[0].val_loss == pytest.approx(smoothed, rel=1e-5) and abs(smoothed - plain) > 1e-3
    assert result.accuracy == (result.logits.argmax(1) == labels).mean()


@pytest.mark.parametrize("mode", ["cached", "live"])
def test_the_public_pieces_fit_together(shapes, features, mode):
    """Uses only what `import cifar_jax` offers, and no optional argument."""
    head, tx = cj.dense_head((16,)), optax.sgd(0.1)
    params = head.init(jax.random.key(3), 12, 10)
    inputs = features if mode == "cached" else shapes.images
    splits = {"train": cj.Split(inputs[:40], shapes.labels[:40]), "val": cj.Split(inputs[40:70], shapes.labels[40:70])}
    if mode == "cached":
        task = cj.cached_task(params, head, splits)
    else:
        task = cj.live_task(params, head, BACKBONE, cj.extract, splits)
    step = cj.make_train_step(task.forward, cj.cross_entropy, tx, augment=task.augment)
    advance, evaluate = cj.make_advance(task, step, ORDER), cj.make_evaluate(task, cj.cross_entropy)
    state, rows = cj.fit(cj.init_state(task.params, tx), task.frozen, advance, evaluate, 3)
    assert rows[-1].train_loss < rows[0].train_loss
    again = make_evaluate(task, cross_entropy, batch_size=30)(state, task.frozen, "val")
    assert evaluate(state).loss == pytest.approx(again.loss, rel=1e-6) == rows[-1].val_loss


class Dropping(nn.Module):
    """A head that drops half of its hidden units."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(10)(nn.Dropout(0.5, deterministic=not train)(x))


@pytest.mark.parametrize("mode", MODES)
def test_a_flax_head_with_dropout_trains(make, mode):
    head = flax_head(Dropping())
    params = head.init(jax.random.key(3), 12, 10)
    assert set(params) == {"Dense_0", "Dense_1"} and head.name == "Dropping()"
    task = make(mode, params, head.logits)
    advance = steps_of(task, optax.sgd(0.1), ORDER)

    def run():
        state, losses = start_of(task, optax.sgd(0.1)), []
        for epoch in range(4):
            state, metrics = advance(state, task.frozen, epoch, range(3))
            losses.append(metrics.loss_sum.sum())
        return state, losses

    (state, losses), again = run(), run()
    assert_same_bits((state, losses), again)
    assert losses[-1] < losses[0]

    # Without an update the loss of the same batch differs by the dropout alone, whose key depends on the run and step.
    still = optax.sgd(0.0)
    step, start = jax.jit(make_train_step(task.forward, cross_entropy, still)), start_of(task, still)
    batch = advance.batch(0, 0)

    def loss_of(number, key):
        at = start._replace(step=jnp.asarray(number, jnp.int32))
        return float(step(at, task.frozen, batch, key)[1].loss_sum)

    assert loss_of(1, KEY) == loss_of(1, KEY)
    assert len({loss_of(0, KEY), loss_of(1, KEY), loss_of(1, jax.random.key(5))}) == 3
    evaluate = make_evaluate(task, cross_entropy, batch_size=8)
    assert_same_bits(evaluate(state, task.frozen, "val").logits, evaluate(state, task.frozen, "val").logits)


def test_a_function_trains_as_a_backbone_in_micro_batches(shapes):
    """It has no batch_stats, so its last batch is padded, and some micro-batches of it hold no example."""
    task = on_all_layers(FINETUNE, init_head(KEY, 12, (), 10), BACKBONE, shapes.take(np.arange(36)))
    (whole, rows), (pieces, rows_of_pieces) = (fitted(task, TX, ORDER, 2, micro_batch=size) for size in (None, 6))
    assert_close(pieces.params, whole.params, rtol=1e-4, atol=1e-6)
    for row, other in zip(rows, rows_of_pieces, strict=True):
        np.testing.assert_allclose(row[1:5], other[1:5], rtol=1e-5)
    assert relative_difference(whole.params["backbone"]["kernel"], KERNEL) > 1e-3
