"""A step against a computation by hand, the guard against values that are not finite, and the loss functions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import make_examples, reference_step
from tasks import assert_close, assert_same_bits, batch_of

from cifar_jax.errors import UserError
from cifar_jax.models.head import dense_logits
from cifar_jax.train.evaluate import make_eval_step
from cifar_jax.train.losses import cross_entropy, smoothed_cross_entropy
from cifar_jax.train.step import first_not_finite, init_state, make_train_step
from cifar_jax.train.task import head_forward

TX = optax.sgd(0.05)
KEY = jax.random.key(7)
FORWARD = head_forward(dense_logits)


@pytest.mark.parametrize(
    ("micro_batch", "num_examples", "label_smoothing"),
    [
        (None, 16, 0.0),
        (None, 5, 0.1),
        (7, 16, 0.1),  # the last micro-batch has two examples
        (4, 5, 0.0),  # the last two hold only padding
    ],
)
def test_step_is_the_reference_whatever_its_padding_and_micro_batches(micro_batch, num_examples, label_smoothing):
    features, labels, params = make_examples(16)
    step = make_train_step(FORWARD, smoothed_cross_entropy(label_smoothing), TX, micro_batch=micro_batch)
    batch = batch_of(features, labels, num_examples)
    state, metrics = jax.jit(step)(init_state(params, TX), {}, batch, KEY)
    real = slice(0, num_examples)
    expected, gradient = reference_step(params["head"], features[real], labels[real], label_smoothing)
    moved = jax.tree.map(lambda p, g: p - 0.05 * g, params["head"], gradient)
    assert_close(state.params["head"], moved, rtol=1e-5, atol=1e-7)
    assert float(metrics.loss_sum) == pytest.approx(expected.loss_sum, rel=1e-5)
    assert (int(metrics.correct), int(metrics.num)) == (expected.correct, num_examples)
    assert metrics.finite and not state.halted and int(state.step) == 1


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_losses_are_those_of_optax_for_classes_and_distributions(label_smoothing):
    logits, labels = jax.random.normal(KEY, (6, 4)), jnp.arange(6, dtype=jnp.int32) % 4
    one_hot, loss_fn = jax.nn.one_hot(labels, 4), smoothed_cross_entropy(label_smoothing)
    mixed = 0.7 * one_hot + 0.3 * one_hot[::-1]
    for given, targets in ((labels, one_hot), (mixed, mixed)):
        expected = optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))
        np.testing.assert_allclose(loss_fn(logits, given), expected, rtol=1e-5)


def test_a_step_on_distributions_counts_the_most_likely_class():
    features, labels, params = make_examples(16)
    step = jax.jit(make_train_step(FORWARD, cross_entropy, TX))
    of_classes, metrics = step(init_state(params, TX), {}, batch_of(features, labels), KEY)
    one_hot = np.eye(4, dtype=np.float32)[labels]
    of_distributions, same = step(init_state(params, TX), {}, batch_of(features, one_hot), KEY)
    assert_close((of_distributions, same), (of_classes, metrics), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_halts_and_leaves_the_rest_of_the_state_as_it_was(bad):
    features, labels, params = make_examples(8)
    broken = features.copy()
    broken[3, 2] = bad
    tx = optax.sgd(0.05, momentum=0.9)
    before, step = init_state(params, tx), jax.jit(make_train_step(FORWARD, cross_entropy, tx))
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
    """A finite loss with an infinite gradient: that of the square root at zero."""
    return cross_entropy(logits, labels) + jnp.sqrt(jnp.square(logits - jax.lax.stop_gradient(logits)).sum(-1))


@pytest.mark.parametrize(
    ("feature", "bias", "loss_fn", "tx", "name"),
    [
        (jnp.nan, 0.0, cross_entropy, TX, "the inputs"),
        (1.0, jnp.inf, cross_entropy, TX, "the loss"),
        (1.0, 0.0, steep, TX, "the gradient of head/0/bias"),
        (1.0, 0.0, cross_entropy, optax.scale(jnp.inf), "the update of head/0/bias"),
    ],
)
def test_the_first_tensor_that_is_not_finite_is_named(feature, bias, loss_fn, tx, name):
    features, labels, params = make_examples(8)
    features[3, 2] = feature
    state, batch = init_state(params, tx), batch_of(features, labels)
    state.params["head"][1]["bias"] += bias
    for micro_batch in (None, 4):
        assert first_not_finite(FORWARD, loss_fn, tx, state, {}, batch, KEY, micro_batch=micro_batch) == name
    _, metrics = jax.jit(make_train_step(FORWARD, loss_fn, tx))(state, {}, batch, KEY)
    assert metrics.finite == name.startswith("the update")  # updates are checked before a state is saved


@pytest.mark.parametrize(
    ("loss_fn", "shape"),
    [
        (lambda logits, labels: cross_entropy(logits, labels)[:, None], r"\[8, 1\]"),
        (lambda logits, labels: cross_entropy(logits, labels).mean(), r"\[\]"),
        (lambda logits, labels: jax.nn.log_softmax(logits), r"\[8, 4\]"),
    ],
)
def test_a_loss_that_is_not_one_per_example_is_refused(loss_fn, shape):
    features, labels, params = make_examples(8)
    message = rf"returns shape {shape} for a batch of 8, expected \[8\]: one loss for each example"
    batch = batch_of(features, labels)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(make_train_step(FORWARD, loss_fn, TX), init_state(params, TX), {}, batch, KEY)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(make_eval_step(FORWARD, loss_fn), params, {}, {}, batch)


def test_an_optimiser_that_takes_the_loss_is_given_it():
    features, labels, params = make_examples(8)
    keeps_loss = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()), lambda updates, state, params=None, *, value, **_: (updates, value)
    )
    state, batch = init_state(params, keeps_loss), batch_of(features, labels)
    after, metrics = jax.jit(make_train_step(FORWARD, cross_entropy, keeps_loss))(state, {}, batch, KEY)
    assert float(after.opt_state) == pytest.approx(float(metrics.loss_sum) / 8)
    assert first_not_finite(FORWARD, cross_entropy, keeps_loss, state, {}, batch, KEY)


def test_the_state_holds_copies_so_that_donation_takes_nothing_from_the_optimiser():
    features, labels, params = make_examples(8)
    tx = optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(5)), TX)
    step = jax.jit(make_train_step(FORWARD, cross_entropy, tx), donate_argnums=0)
    with jax.numpy_dtype_promotion("standard"):  # which users have, and Optax needs here
        one, other = (step(init_state(params, tx), {}, batch_of(features, labels), KEY)[0] for _ in range(2))
    assert_same_bits(one.params, other.params)


def test_finite_gradients_of_16_bits_whose_sum_overflows_are_finite():
    """Their sum is beyond float16, whose largest number is 65504."""
    params, tx = {"head": jnp.zeros((40, 50), jnp.float16)}, optax.sgd(1e-3)

    def forward(params, batch_stats, frozen, inputs, *, train, key, mask):
        return 100 * jnp.full((8, 2), params["head"].sum(dtype=jnp.float32)), batch_stats

    step = jax.jit(make_train_step(forward, lambda logits, labels: logits[:, 0], tx))
    state, metrics = step(init_state(params, tx), {}, batch_of(np.zeros((8, 1)), np.zeros(8, np.int32)), KEY)
    assert metrics.finite and not state.halted
    np.testing.assert_allclose(state.params["head"], -0.1, rtol=1e-3)
