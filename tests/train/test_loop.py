"""`fit` and the compiled steps of an epoch: against a computation by hand, stopped and resumed, and diverging."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import make_examples, reference_step
from tasks import assert_close, assert_same_bits, fitted, on_features, start_of, steps_of

from cifar_jax.train.evaluate import make_evaluate
from cifar_jax.train.loop import Diverged, EpochOrder, fit
from cifar_jax.train.losses import cross_entropy, smoothed_cross_entropy
from cifar_jax.train.step import first_not_finite

TX = optax.sgd(0.05, momentum=0.9)
ORDER = EpochOrder(jax.random.key(1), jax.random.key(2), batch_size=16)  # 70 examples make four batches and one of 6


def task_on(features, labels, params, resident=True, val=None):
    """A head's task, whose epoch is one compiled call if its inputs are resident, else one call per step."""
    task = on_features(params["head"], (features, labels), val)
    return task._replace(splits={name: part._replace(resident=resident) for name, part in task.splits.items()})


@pytest.mark.parametrize("resident", [True, False])
def test_fit_is_the_reference_over_all_batches(resident):
    """With momentum, a learning rate of each step, a short last batch, label smoothing, and running means as Keras."""
    features, labels, params = make_examples(70)
    val = make_examples(30)[:2]
    rates, smoothing = [0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.02, 0.02, 0.01, 0.01], 0.1
    tx = optax.sgd(lambda count: jnp.asarray(rates)[count], momentum=0.9)
    task = task_on(features, labels, params, resident, val)
    state, rows = fitted(task, tx, ORDER, 2, smoothed_cross_entropy(smoothing), batch_size=16)

    head, trace = params["head"], jax.tree.map(np.zeros_like, params["head"])
    for epoch, row in enumerate(rows):
        indices, counts = ORDER.batches(epoch, 70)
        assert counts.tolist() == [16, 16, 16, 16, 6] and row.epoch == epoch + 1
        loss_sum = correct = 0
        for number, (index, count) in enumerate(zip(indices, counts, strict=True)):
            sums, gradient = reference_step(head, features[index[:count]], labels[index[:count]], smoothing)
            trace = jax.tree.map(lambda t, g: 0.9 * t + g, trace, gradient)
            rate = rates[5 * epoch + number]
            head = jax.tree.map(lambda p, t, rate=rate: p - rate * t, head, trace)
            loss_sum, correct = loss_sum + sums.loss_sum, correct + sums.correct
        assert (row.train_loss, row.train_accuracy) == pytest.approx((loss_sum / 70, correct / 70), rel=1e-5)
        sums, _ = reference_step(head, *val, smoothing)
        assert (row.val_loss, row.val_accuracy) == pytest.approx((sums.loss_sum / 30, sums.correct / 30), rel=1e-5)
    assert_close(state.params["head"], head, rtol=1e-4, atol=1e-6)
    assert int(state.step) == 10 and len(rows) == 2


@pytest.mark.parametrize("resident", [True, False])
def test_wherever_training_stops_the_rest_of_it_gives_the_same_bits(resident):
    """In parts of two steps; stopped within the first epoch, within the second, and while the second is evaluated."""
    task = task_on(*make_examples(70), resident)
    advance, evaluate = steps_of(task, TX, ORDER), make_evaluate(task, cross_entropy, batch_size=64)

    def run(state, evaluate=evaluate, **more):
        return fit(state, {}, advance, evaluate, 3, checkpoint_every=2, **more)

    whole, expected = run(start_of(task, TX))
    expected = [row._replace(seconds=0) for row in expected]
    calls, first = (3, 2) if resident else (5, 1)  # compiled calls of an epoch, and steps in the first of them
    # Stops at a poll of `stopping`, once after each call and once after an epoch, or when an epoch is evaluated.
    for polls, at_evaluation, completed in ((1, 0, first), (calls + 2, 0, first), (0, 2, 5)):
        polled, parts, rows = [], [], []

        def stopping(polled=polled, polls=polls):
            polled.append(None)
            return len(polled) == polls

        def evaluate_or_stop(state, rows=rows, at_evaluation=at_evaluation):
            if len(rows) + 1 == at_evaluation:
                raise KeyboardInterrupt
            return evaluate(state)

        with pytest.raises(KeyboardInterrupt):
            run(
                start_of(task, TX),
                evaluate_or_stop,
                on_epoch=lambda row, result, state, rows=rows: rows.append(row._replace(seconds=0)),
                on_part=lambda part, state, parts=parts: parts.append((part, jax.device_get(state))),
                stopping=stopping,
            )
        part, state = parts[-1]
        assert len(rows) == (0 if polls == 1 else 1) and len(part.metrics.num) == completed
        assert int(state.step) == 5 * len(rows) + completed
        resumed, rest = run(state, first_epoch=len(rows), part=part)
        assert_same_bits(resumed, whole)
        assert rows + [row._replace(seconds=0) for row in rest] == expected


@pytest.mark.parametrize("resident", [True, False])
def test_no_steps_change_nothing_and_parts_of_an_epoch_are_the_epoch(resident):
    task = task_on(*make_examples(70), resident)
    advance = steps_of(task, TX, ORDER)
    state, metrics = advance(start_of(task, TX), {}, 0, range(3, 3))
    assert_same_bits(state, start_of(task, TX))
    assert [leaf.shape for leaf in metrics] == [(0,)] * 4
    parts, sums = start_of(task, TX), []
    for steps in (range(2), range(2, 5)):
        parts, metrics = advance(parts, {}, 1, steps)
        sums.extend(metrics.loss_sum)
    whole, metrics = advance(start_of(task, TX), {}, 1, range(5))
    assert_same_bits(parts, whole)
    assert sums == metrics.loss_sum.tolist() and metrics.num.tolist() == [16, 16, 16, 16, 6]


def test_epoch_is_compiled_once_for_all_epochs():
    task = task_on(*make_examples(70))
    advance, state = steps_of(task, TX, ORDER), start_of(task, TX)
    for epoch in range(3):
        state, _ = advance(state, {}, epoch, range(5))
    assert advance.run._cache_size() == 1


def test_same_seed_same_bits_other_seed_other_order():
    examples = make_examples(70)

    def losses(order):
        return [row.train_loss for row in fitted(task_on(*examples), TX, order, 2)[1]]

    assert losses(ORDER) == losses(ORDER) != losses(ORDER._replace(order_key=jax.random.key(9)))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(np.nan, id="gradient"),  # of NaN the relu makes 0, so that no loss shows it
        pytest.param(3e38, id="loss"),
    ],
)
def test_epoch_stops_at_the_first_bad_step_and_keeps_the_state_before_it(resident, broken):
    features, labels, params = make_examples(64)
    order, spoiled = ORDER._replace(shuffle=False), features.copy()
    spoiled[37] = broken  # in the third step of four
    task, good = (task_on(data, labels, params, resident) for data in (spoiled, features))
    advance = steps_of(task, TX, order)
    state, metrics = advance(start_of(task, TX), {}, 0, range(4))
    assert metrics.finite.tolist() == [True, True, False, False] and state.halted
    two_steps, _ = steps_of(good, TX, order)(start_of(good, TX), {}, 0, range(2))
    assert_same_bits(state._replace(halted=two_steps.halted), two_steps)

    with pytest.raises(Diverged, match=r"epoch 1, step 3\.") as raised:
        fitted(task, TX, order, 2)
    error = raised.value
    assert (error.epoch, error.step, int(error.state.step)) == (1, 3, 2)
    batch = advance.batch(error.epoch - 1, error.step - 1)
    name = first_not_finite(task.forward, cross_entropy, TX, error.state, {}, batch, order.step_key)
    assert name == ("the inputs" if np.isnan(broken) else "the loss")


def test_steps_after_a_bad_one_are_not_all_dispatched():
    features, labels, params = make_examples(200)
    features[20] = np.nan  # in the second step
    task, order, dispatched = task_on(features, labels, params, False), ORDER._replace(batch_size=4, shuffle=False), []
    advance = steps_of(task, TX, order)

    def run(*arguments):
        dispatched.append(arguments)
        return advance.run(*arguments)

    with pytest.raises(Diverged, match=r"epoch 1, step 6\."):
        fit(start_of(task, TX), {}, advance._replace(run=run), lambda state: None, 1)
    assert 6 <= len(dispatched) < 20


def at_step(number, factor):
    """Scales the update after `number` steps."""
    return optax.scale_by_schedule(lambda count: jnp.where(count == number, factor, 1.0))


@pytest.mark.parametrize(
    ("resident", "spoils", "checkpoint_every", "step"),
    [
        pytest.param(True, optax.scale(jnp.nan), 1, 1, id="always"),
        pytest.param(True, at_step(2, jnp.inf), 1, 3, id="found when the state is saved"),
        pytest.param(True, at_step(2, jnp.inf), None, 4, id="found by the next step"),
        pytest.param(False, at_step(2, jnp.inf), None, 4, id="found by the next step, one by one"),
        pytest.param(True, at_step(4, jnp.nan), None, 5, id="in the last step of an epoch"),
    ],
)
def test_updates_that_are_not_finite_diverge_and_no_callback_is_given_a_bad_state(
    resident, spoils, checkpoint_every, step
):
    task, seen = task_on(*make_examples(70), resident), []

    def record(state):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.batch_stats)))
        seen.append(int(state.step))

    with pytest.raises(Diverged, match=rf"epoch 1, step {step}[ .]") as raised:
        fitted(
            task,
            optax.chain(TX, spoils),
            ORDER,
            3,
            checkpoint_every=checkpoint_every,
            on_epoch=lambda row, result, state: record(state),
            on_part=lambda part, state: record(state),
        )
    assert raised.value.fault == ("an update" if checkpoint_every or step == 5 else "")
    assert seen == (list(range(1, step)) if checkpoint_every else [])
