"""The step and the epoch: exact arithmetic, partial batches, the guard, cached against live, frozen to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_difference
from flax import linen as nn
from tasks import assert_same_bits, fitted, on_all_layers, on_features, on_images, start_of, steps_of

import cifar_jax as cj
from cifar_jax.config import TrainConfig
from cifar_jax.errors import UserError
from cifar_jax.features.extractor import make_extractor
from cifar_jax.models.head import dense_logits, flax_head, head_logits, init_head
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained import FunctionBackbone, random_backbone
from cifar_jax.runtime.sharding import make_mesh
from cifar_jax.train.evaluate import make_eval_step, make_evaluate
from cifar_jax.train.loop import Diverged, EpochOrder, fit
from cifar_jax.train.losses import cross_entropy, smoothed_cross_entropy
from cifar_jax.train.step import first_not_finite, init_state, make_train_step, scan_steps
from cifar_jax.train.task import Batch, head_forward

TX = optax.sgd(0.05)
KEY = jax.random.key(7)
ORDER = EpochOrder(jax.random.key(1), jax.random.key(2), batch_size=16)
FORWARD = head_forward(dense_logits)
FINETUNE = TrainConfig(mode="finetune", batch_size=16)
MODES = ["cached", "live", "finetune"]


def problem(num=70, width=12, classes=4):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, num).astype(np.int32)
    features = rng.normal(size=(num, width)).astype(np.float32) + 2 * np.eye(classes, width, dtype=np.float32)[labels]
    return features, labels, {"head": init_head(jax.random.key(3), width, (8,), classes)}


def batch_of(inputs, labels):
    return Batch(jnp.asarray(inputs), jnp.asarray(labels), jnp.ones(len(labels)))


def train_step(tx=TX, loss_fn=cross_entropy):
    return make_train_step(FORWARD, loss_fn, tx)


def assert_close(a, b, rtol, atol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def is_finite(state):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.batch_stats)))


def test_step_is_gradient_descent_on_the_mean_loss():
    features, labels, params = problem(8)
    state, metrics = train_step()(init_state(params, TX), {}, batch_of(features, labels), KEY)

    def mean_loss(params):
        log_probs = jax.nn.log_softmax(head_logits(params["head"], features))
        return -log_probs[np.arange(8), labels].mean()

    expected = jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(mean_loss)(params))
    assert_close(state.params, expected, rtol=1e-5, atol=1e-7)
    assert int(state.step) == 1 and int(metrics.num) == 8
    assert float(metrics.loss_sum) / 8 == pytest.approx(float(mean_loss(params)), rel=1e-6)


@pytest.mark.parametrize("micro_batch", [None, 4])  # the last piece holds no example at all
def test_padding_of_a_batch_does_not_count(micro_batch):
    features, labels, params = problem(16)
    padded = batch_of(features, labels)._replace(mask=jnp.asarray([1.0] * 5 + [0.0] * 11))
    step = make_train_step(FORWARD, cross_entropy, TX, micro_batch=micro_batch)
    (a, metrics_a), (b, metrics_b) = (
        step(init_state(params, TX), {}, batch, KEY) for batch in (batch_of(features[:5], labels[:5]), padded)
    )
    assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert metrics_a.finite and metrics_b.finite and int(metrics_a.num) == int(metrics_b.num) == 5
    assert int(metrics_a.correct) == int(metrics_b.correct)
    np.testing.assert_allclose(metrics_a.loss_sum, metrics_b.loss_sum, rtol=1e-6)


def test_loss_of_logits_is_that_of_probabilities():
    logits = jax.random.normal(KEY, (6, 4))
    labels = jnp.arange(6, dtype=jnp.int32) % 4
    probs = np.asarray(jax.nn.softmax(logits), np.float64)
    expected = -np.log(probs[np.arange(6), np.asarray(labels)])
    np.testing.assert_allclose(cross_entropy(logits, labels), expected, rtol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_labels_may_be_distributions_over_the_classes(label_smoothing):
    features, labels, params = problem(70)
    loss_fn, one_hot = smoothed_cross_entropy(label_smoothing), np.eye(4, dtype=np.float32)[labels]
    (a, rows_a), (b, rows_b) = (
        fitted(on_features(params["head"], (features, which)), TX, ORDER, 2, loss_fn) for which in (labels, one_hot)
    )
    assert_close(a.params, b.params, rtol=1e-5, atol=1e-6)
    for x, y in zip(rows_a, rows_b, strict=True):
        np.testing.assert_allclose(x[1:5], y[1:5], rtol=1e-6)
    logits, mixed = head_logits(params["head"], features), 0.5 * one_hot + 0.5 * one_hot[::-1]
    np.testing.assert_allclose(
        cross_entropy(logits, mixed),
        0.5 * cross_entropy(logits, labels) + 0.5 * cross_entropy(logits, labels[::-1]),
        rtol=1e-5,
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_halts_and_leaves_the_rest_of_the_state_as_it_was(bad):
    features, labels, params = problem(8)
    broken = features.copy()
    broken[3, 2] = bad
    tx = optax.sgd(0.05, momentum=0.9)
    before, step = init_state(params, tx), jax.jit(train_step(tx))
    assert not before.halted
    after, metrics = step(before, {}, batch_of(broken, labels), KEY)
    assert after.halted and not metrics.finite
    assert_same_bits(after._replace(halted=before.halted), before)
    good = batch_of(features, labels)
    again, metrics = step(after, {}, good, KEY)
    assert_same_bits(again, after)
    assert not metrics.finite
    assert step(before, {}, good, KEY)[1].finite


def steep(logits, labels):
    """A loss that is finite and whose gradient is not: the square root has none at zero."""
    return cross_entropy(logits, labels) + jnp.sqrt(jnp.square(logits - jax.lax.stop_gradient(logits)).sum(-1))


@pytest.mark.parametrize(
    ("inputs", "bias", "loss_fn", "name"),
    [
        (jnp.nan, 0.0, cross_entropy, "the inputs"),
        (1.0, jnp.inf, cross_entropy, "the loss"),
        (1.0, 0.0, steep, "the gradient of head/0/bias"),
    ],
)
def test_the_first_tensor_that_is_not_finite_is_named(inputs, bias, loss_fn, name):
    features, labels, params = problem(8)
    features[3, 2] = inputs
    state, batch = init_state(params, TX), batch_of(features, labels)
    state.params["head"][1]["bias"] += bias
    _, metrics = train_step(loss_fn=loss_fn)(state, {}, batch, KEY)
    assert not metrics.finite
    assert first_not_finite(FORWARD, loss_fn, TX, state, {}, batch, KEY) == name
    assert first_not_finite(FORWARD, loss_fn, TX, state, {}, batch, KEY, micro_batch=4) == name


def test_an_update_that_is_not_finite_is_named():
    features, labels, params = problem(8)
    tx = optax.chain(TX, optax.scale(jnp.inf))
    state, batch = init_state(params, tx), batch_of(features, labels)
    assert first_not_finite(FORWARD, cross_entropy, tx, state, {}, batch, KEY) == "the update of head/0/bias"


@pytest.mark.parametrize(
    ("loss_fn", "shape"),
    [
        (lambda logits, labels: cross_entropy(logits, labels)[:, None], r"\[8, 1\]"),
        (lambda logits, labels: cross_entropy(logits, labels).mean(), r"\[\]"),
        (lambda logits, labels: jax.nn.log_softmax(logits), r"\[8, 4\]"),
    ],
)
def test_a_loss_that_is_not_one_an_example_is_refused(loss_fn, shape):
    features, labels, params = problem(8)
    message = rf"returns shape {shape} for a batch of 8, expected \[8\]: one loss for each example"
    with pytest.raises(UserError, match=message):
        train_step(loss_fn=loss_fn)(init_state(params, TX), {}, batch_of(features, labels), KEY)
    with pytest.raises(UserError, match=message):
        make_eval_step(FORWARD, loss_fn)(params, {}, {}, batch_of(features, labels))


def test_an_optimiser_that_asks_for_the_loss_is_given_it():
    features, labels, params = problem(8)
    given = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()), lambda updates, state, params=None, *, value, **_: (updates, value)
    )
    tx = optax.chain(TX, given)
    state, metrics = train_step(tx)(init_state(params, tx), {}, batch_of(features, labels), KEY)
    assert float(state.opt_state[1]) == pytest.approx(float(metrics.loss_sum) / 8)
    assert first_not_finite(FORWARD, cross_entropy, tx, state, {}, batch_of(features, labels), KEY)
    plateau = optax.chain(TX, optax.contrib.reduce_on_plateau(patience=1, rtol=1.0))
    with jax.numpy_dtype_promotion("standard"):  # as users have it, and Optax needs it here
        state, _ = fitted(on_features(params["head"], (features, labels)), plateau, ORDER, 9)
    assert float(state.opt_state[1].scale) < 1


def test_an_optimiser_that_keeps_a_key_trains_twice_to_the_same_bits():
    features, labels, params = problem(40)
    tx = optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(5)), TX)
    with jax.numpy_dtype_promotion("standard"):  # as users have it, and Optax needs it here
        one, other = (fitted(on_features(params["head"], (features, labels)), tx, ORDER, 2)[0] for _ in range(2))
    assert_same_bits(one.params, other.params)


def test_gradients_of_16_bits_that_are_finite_are_taken_as_such():
    """Their sum is beyond float16, whose largest number is 65504."""
    params, tx = {"head": jnp.zeros((40, 50), jnp.float16)}, optax.sgd(1e-3)

    def forward(params, batch_stats, frozen, inputs, *, train, key, mask):
        return 100 * jnp.full((8, 2), params["head"].sum(dtype=jnp.float32)), batch_stats

    step = make_train_step(forward, lambda logits, labels: logits[:, 0], tx)
    state, metrics = step(init_state(params, tx), {}, batch_of(np.zeros((8, 1)), np.zeros(8, np.int32)), KEY)
    assert metrics.finite and not state.halted
    np.testing.assert_allclose(state.params["head"], -0.1, rtol=1e-3)


def test_epoch_is_its_steps_one_after_the_other():
    features, labels, params = problem(70)
    indices, counts = ORDER.batches(0, 70)
    assert counts.tolist() == [16, 16, 16, 16, 6]
    run = jax.jit(scan_steps(train_step()))
    state, metrics = run(init_state(params, TX), {}, features, labels, indices, counts, KEY)
    step, expected = train_step(), init_state(params, TX)
    losses = []
    for index, count in zip(indices, counts, strict=True):
        rows = index[:count]
        expected, step_metrics = step(expected, {}, batch_of(features[rows], labels[rows]), KEY)
        losses.append(step_metrics.loss_sum)
    assert int(state.step) == 5 and metrics.num.tolist() == counts.tolist()
    np.testing.assert_allclose(metrics.loss_sum, losses, rtol=1e-5)
    assert_close(state.params, expected.params, rtol=1e-4, atol=1e-6)


def test_epoch_stops_at_the_first_bad_step_and_keeps_the_state_before_it():
    features, labels, params = problem(64)
    order = ORDER._replace(shuffle=False)
    broken = features.copy()
    broken[37] = np.nan  # in the third step of four
    task, good = (on_features(params["head"], (data, labels), (features, labels)) for data in (broken, features))
    advance = steps_of(task, TX, order)
    state, metrics = advance(start_of(task, TX), {}, 0, range(4))
    assert metrics.finite.tolist() == [True, True, False, False] and state.halted
    two_steps, _ = steps_of(good, TX, order)(start_of(good, TX), {}, 0, range(2))
    assert_same_bits(state._replace(halted=two_steps.halted), two_steps)

    with pytest.raises(Diverged, match=r"epoch 1, step 3\.") as raised:
        fitted(task, TX, order, 2)
    error = raised.value
    assert (error.epoch, error.step, int(error.state.step)) == (1, 3, 2)
    where = advance.batch(error.epoch - 1, error.step - 1)
    assert first_not_finite(FORWARD, cross_entropy, TX, error.state, {}, where, order.step_key) == "the inputs"


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(np.nan, id="gradient"),  # of NaN the relu makes 0, so that no loss shows it
        pytest.param(3e38, id="loss"),
    ],
)
def test_epoch_is_its_guarded_steps_whatever_is_not_finite(broken):
    tx = optax.sgd(0.05, momentum=0.9)
    features, labels, params = problem(64)
    indices, counts = ORDER._replace(shuffle=False).batches(0, 64)
    features[37] = broken  # in the third step of four
    run = jax.jit(scan_steps(train_step(tx)))
    state, metrics = run(init_state(params, tx), {}, features, labels, indices, counts, KEY)

    expected, step = init_state(params, tx), jax.jit(train_step(tx))
    for index in indices:
        expected, _ = step(expected, {}, batch_of(features[index], labels[index]), KEY)
    assert metrics.finite.tolist() == [True, True, False, False] and int(state.step) == 2
    assert is_finite(state) and state.halted and expected.halted
    assert_close(state, expected, rtol=1e-5, atol=1e-6)


def at_step(number, factor):
    """Scales the update after that many steps."""
    return optax.scale_by_schedule(lambda count: jnp.where(count == number, factor, 1.0))


@pytest.mark.parametrize(
    ("spoils", "checkpoint_every", "step"),
    [
        pytest.param(optax.scale(jnp.nan), 1, 1, id="always"),
        pytest.param(at_step(2, jnp.inf), 1, 3, id="looked at where it is saved"),
        pytest.param(at_step(2, jnp.inf), None, 4, id="met by the next step"),
        pytest.param(at_step(4, jnp.nan), None, 5, id="in the last step of an epoch"),
    ],
)
@pytest.mark.parametrize("mode", ["cached", "live"])
def test_an_optimiser_that_makes_nan_of_finite_gradients_diverges_and_hands_out_no_bad_state(
    mode, spoils, checkpoint_every, step
):
    features, labels, params = problem(70)
    tx, seen = optax.chain(optax.sgd(0.05, momentum=0.9), spoils), []
    task = on_features(params["head"], (features, labels))
    if mode == "live":  # step by step, not one scan
        task = task._replace(splits={name: part._replace(resident=False) for name, part in task.splits.items()})

    def hand_out(state):
        assert is_finite(state)
        seen.append(int(state.step))

    with pytest.raises(Diverged, match=rf"epoch 1, step {step}[ .]") as raised:
        fitted(
            task,
            tx,
            ORDER,
            3,
            checkpoint_every=checkpoint_every,
            on_epoch=lambda row, result, state: hand_out(state),
            on_part=lambda part, state: hand_out(state),
        )
    assert raised.value.fault == ("an update" if checkpoint_every or step == 5 else "")
    assert seen == (list(range(1, step)) if checkpoint_every else [])


def test_epoch_is_compiled_once_for_all_epochs():
    features, labels, params = problem(70)
    task = on_features(params["head"], (features, labels))
    advance, state = steps_of(task, TX, ORDER), start_of(task, TX)
    for number in range(3):
        state, _ = advance(state, {}, number, range(5))
    assert advance.run._cache_size() == 1


@pytest.mark.parametrize("resident", [True, False])
def test_no_steps_change_nothing_and_parts_of_an_epoch_are_the_epoch(resident):
    features, labels, params = problem(70)
    task = on_features(params["head"], (features, labels))
    task = task._replace(splits={name: part._replace(resident=resident) for name, part in task.splits.items()})
    advance = steps_of(task, TX, ORDER)
    for none in (range(0), range(3, 3), range(5, 5)):
        state, metrics = advance(start_of(task, TX), {}, 0, none)
        assert_same_bits(state, start_of(task, TX))
        assert [leaf.shape for leaf in metrics] == [(0,)] * 4
    parts, sums = start_of(task, TX), []
    for steps in (range(2), range(2, 2), range(2, 5)):
        parts, metrics = advance(parts, {}, 1, steps)
        sums.extend(metrics.loss_sum)
    whole, metrics = advance(start_of(task, TX), {}, 1, range(5))
    assert_same_bits(parts, whole)
    assert sums == metrics.loss_sum.tolist() and metrics.num.tolist() == [16, 16, 16, 16, 6]


def test_training_learns():
    features, labels, params = problem(200)
    task = on_features(params["head"], (features, labels))
    before = make_evaluate(task, cross_entropy, make_mesh(), 64)(start_of(task, TX), {}, "val")
    _, history = fitted(task, TX, ORDER, 10)
    assert history[-1].val_loss < 0.5 * before.loss and history[-1].val_accuracy > before.accuracy
    assert [row.epoch for row in history] == list(range(1, 11))


@pytest.fixture(scope="module")
def small_backbone(shapes):
    return random_backbone(jax.random.key(0), shapes.images[:64], ResNetConfig(stage_sizes=(1, 1), width=8), 32)


@pytest.fixture(scope="module")
def features(small_backbone, shapes):
    return make_extractor(small_backbone)(shapes.images)


def head_of(backbone, hidden=(16,)):
    return init_head(jax.random.key(3), backbone.num_features, hidden, 10)


@pytest.fixture
def make(small_backbone, shapes, features):
    """Makes the task of a mode, on 40 images to train on and 30 to validate on."""
    train, val = slice(0, 40), slice(40, 70)

    def make(mode, params=None, head=dense_logits):
        params = head_of(small_backbone) if params is None else params
        inputs = features if mode == "cached" else shapes.images
        data = [(inputs[rows], shapes.labels[rows]) for rows in (train, val)]
        if mode == "cached":
            return on_features(params, *data, head)
        if mode == "live":
            return on_images(params, small_backbone, *data, head)
        return on_all_layers(FINETUNE, params, small_backbone, *data, head)

    return make


def test_cached_and_live_give_the_same_head(small_backbone, shapes):
    train, val = shapes.take(np.arange(150)), shapes.take(np.arange(150, 200))
    params = head_of(small_backbone)
    tx = optax.sgd(0.1, momentum=0.5)

    extractor = make_extractor(small_backbone)
    cached = on_features(params, (extractor(train.images), train.labels), (extractor(val.images), val.labels))
    state_cached, rows_cached = fitted(cached, tx, ORDER, 2)
    state_live, rows_live = fitted(on_images(params, small_backbone, train, val), tx, ORDER, 2)

    for x, y, start in zip(
        *map(jax.tree.leaves, (state_cached.params, state_live.params, {"head": params})), strict=True
    ):
        assert relative_difference(x, y) < 1e-4
        assert np.abs(np.asarray(x) - np.asarray(start)).max() > 1e-3  # it has moved
    for a, b in zip(rows_cached, rows_live, strict=True):
        np.testing.assert_allclose(a[1:5], b[1:5], rtol=1e-4)
    assert state_live.batch_stats == {}


def test_a_live_step_moves_the_head_and_no_bit_of_the_backbone(small_backbone, shapes):
    before = jax.tree.map(np.array, small_backbone.variables)
    on_device = jax.tree.map(jnp.array, small_backbone)
    task = on_images(head_of(small_backbone), on_device, shapes)
    step, state = jax.jit(make_train_step(task.forward, cross_entropy, TX), donate_argnums=0), start_of(task, TX)
    for _ in range(3):
        state, metrics = step(state, task.frozen, batch_of(shapes.images[:8], shapes.labels[:8]), KEY)
        assert metrics.finite
    assert np.abs(state.params["head"][0]["kernel"] - task.params["head"][0]["kernel"]).max() > 1e-3
    assert_same_bits(jax.tree.map(np.array, on_device.variables), before)


def test_live_stops_at_the_first_bad_step(small_backbone, shapes):
    tx, handed_out = optax.sgd(1e30), []
    task = on_images(head_of(small_backbone), small_backbone, shapes)
    advance = steps_of(task, tx, ORDER)

    def run(*arguments):
        state, metrics = advance.run(*arguments)
        handed_out.append(metrics.finite)
        return state, metrics

    with pytest.raises(Diverged) as raised:
        fit(start_of(task, tx), task.frozen, advance._replace(run=run), lambda state: None, 1)
    finite = np.stack(handed_out)
    assert not finite.all() and len(finite) < 13
    assert int(raised.value.state.step) == int(np.argmin(finite)) == finite.sum() == raised.value.step - 1
    assert is_finite(raised.value.state)


def test_same_seed_same_bits_other_seed_other_order():
    features, labels, params = problem(70)

    def losses(order):
        _, rows = fitted(on_features(params["head"], (features, labels)), TX, order, 2)
        return [row.train_loss for row in rows]

    assert losses(ORDER) == losses(ORDER)
    assert losses(ORDER) != losses(ORDER._replace(order_key=jax.random.key(9)))


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
def test_validation_has_the_smoothed_loss_and_the_logits_of_the_split_in_its_order(make, features, mode):
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
    (result,), val = results, task.splits["val"]
    mask = jnp.ones(len(val.labels))
    expected, _ = task.forward(
        state.params, state.batch_stats, task.frozen, val.inputs, train=False, key=None, mask=mask
    )
    assert result.logits.shape == (30, 10) and relative_difference(result.logits, expected) < 1e-5
    if mode == "cached":
        np.testing.assert_allclose(result.logits, head_logits(state.params["head"], features[40:70]), rtol=1e-5)
    log_probs = np.asarray(jax.nn.log_softmax(expected), np.float64)
    plain = -log_probs[np.arange(30), val.labels].mean()
    smoothed = (1 - smoothing) * plain - smoothing * log_probs.mean()
    assert rows[0].val_loss == pytest.approx(smoothed, rel=1e-5) and abs(smoothed - plain) > 1e-3
    assert result.accuracy == (result.logits.argmax(1) == val.labels).mean()


@pytest.mark.parametrize("mode", ["cached", "live"])
def test_the_pieces_of_the_library_fit_together(small_backbone, shapes, features, mode):
    """With nothing but what `import cifar_jax` offers, and no argument that could be left out."""
    head, tx = cj.dense_head((16,)), optax.sgd(0.1)
    params = head.init(jax.random.key(3), small_backbone.num_features, 10)
    inputs = features if mode == "cached" else shapes.images
    splits = {"train": cj.Split(inputs[:40], shapes.labels[:40]), "val": cj.Split(inputs[40:70], shapes.labels[40:70])}
    if mode == "cached":
        task = cj.cached_task(params, head, splits)
    else:
        task = cj.live_task(params, head, small_backbone, cj.extract, splits)
    step = cj.make_train_step(task.forward, cj.cross_entropy, tx, augment=task.augment)
    advance, evaluate = cj.make_advance(task, step, ORDER), cj.make_evaluate(task, cj.cross_entropy)
    state, rows = cj.fit(cj.init_state(task.params, tx), task.frozen, advance, evaluate, 3)
    assert rows[-1].train_loss < rows[0].train_loss
    again = make_evaluate(task, cross_entropy, make_mesh(), 30)(state, task.frozen, "val")
    assert evaluate(state).loss == pytest.approx(again.loss, rel=1e-6) == rows[-1].val_loss


class Dropping(nn.Module):
    """A head that drops half of its hidden units."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(10)(nn.Dropout(0.5, deterministic=not train)(x))


@pytest.mark.parametrize("mode", MODES)
def test_a_flax_head_with_dropout_trains(make, small_backbone, mode):
    head = flax_head(Dropping())
    params = head.init(jax.random.key(3), small_backbone.num_features, 10)
    assert set(params) == {"Dense_0", "Dense_1"} and head.name == "Dropping()"
    task = make(mode, params, head.logits)
    state, rows = fitted(task, optax.sgd(0.1), ORDER, 4)
    again, same_rows = fitted(task, optax.sgd(0.1), ORDER, 4)
    other, _ = fitted(task, optax.sgd(0.1), ORDER._replace(step_key=jax.random.key(5)), 4)
    assert_same_bits(state, again)
    assert [row[:5] for row in rows] == [row[:5] for row in same_rows]
    assert relative_difference(other.params["head"]["Dense_0"]["kernel"], state.params["head"]["Dense_0"]["kernel"]) > 0
    assert rows[-1].train_loss < rows[0].train_loss

    # Without an update the loss of the same batch differs by the dropout alone; evaluation has none.
    still = optax.sgd(0.0)
    step, held = jax.jit(make_train_step(task.forward, cross_entropy, still)), start_of(task, still)
    batch, losses = steps_of(task, still, ORDER).batch(0, 0), []
    for number in (0, 1, 1):
        at = held._replace(step=jnp.asarray(number, jnp.int32))
        losses.append(float(step(at, task.frozen, batch, KEY)[1].loss_sum))
    assert losses[0] != losses[1] == losses[2]
    evaluate = make_evaluate(task, cross_entropy, make_mesh(), 8)
    assert_same_bits(evaluate(state, task.frozen, "val").logits, evaluate(state, task.frozen, "val").logits)


def test_a_function_trains_as_a_backbone_in_pieces(shapes):
    """It carries no statistics, so its last batch is padded, and some pieces of it hold no example."""

    def function(variables, images):
        x = images.astype(jnp.float32).reshape(images.shape[0], -1) / 255
        return jnp.tanh(x @ variables["kernel"])

    kernel = np.asarray(0.02 * jax.random.normal(KEY, (32 * 32 * 3, 6)))
    backbone = FunctionBackbone(function, {"kernel": kernel}, "a product")
    task = on_all_layers(FINETUNE, init_head(KEY, 6, (), 10), backbone, shapes.take(np.arange(36)))
    (whole, rows), (pieces, rows_of_pieces) = (fitted(task, TX, ORDER, 2, micro_batch=size) for size in (None, 3))
    assert_close(pieces.params, whole.params, rtol=1e-4, atol=1e-6)
    for row, other in zip(rows, rows_of_pieces, strict=True):
        np.testing.assert_allclose(row[1:5], other[1:5], rtol=1e-5)
    assert relative_difference(whole.params["backbone"]["kernel"], kernel) > 1e-3
