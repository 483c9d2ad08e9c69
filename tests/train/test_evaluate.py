"""Exact counting: every example once, whatever the batch size."""

import jax
import numpy as np
import optax
import pytest

from cifar_jax.models.head import dense_logits, head_logits, init_head
from cifar_jax.train.evaluate import EvalResult, eval_step, evaluate, make_evaluate, wilson_interval
from cifar_jax.train.losses import cross_entropy
from cifar_jax.train.step import init_state
from cifar_jax.train.task import Split, cached_task


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(101, 6)).astype(np.float32)
    return {"head": init_head(jax.random.key(0), 6, (5,), 3)}, features, rng.integers(0, 3, 101).astype(np.int32)


@pytest.mark.parametrize("batch_size", [1, 7, 100, 101, 500])
def test_result_does_not_depend_on_the_batch_size(problem, batch_size):
    params, features, labels = problem
    result = evaluate(eval_step, params, features, labels, batch_size)
    logits = np.asarray(head_logits(params["head"], features), np.float64)
    np.testing.assert_allclose(result.logits, logits, rtol=1e-5, atol=1e-6)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    predicted = logits.argmax(1)
    expected = np.zeros((3, 3), int)
    np.add.at(expected, (labels, predicted), 1)
    np.testing.assert_array_equal(result.confusion, expected)
    assert result.num == 101
    assert result.accuracy == (predicted == labels).mean()
    assert result.loss == pytest.approx(-log_probs[np.arange(101), labels].mean(), rel=1e-5)
    np.testing.assert_allclose(result.class_accuracy, [(predicted == labels)[labels == c].mean() for c in range(3)])


def test_class_without_examples_has_no_accuracy(problem):
    params, features, _ = problem
    result = evaluate(eval_step, params, features, np.ones(101, np.int32))
    assert np.isnan(result.class_accuracy[[0, 2]]).all() and not np.isnan(result.class_accuracy[1])


def test_nothing_to_evaluate_is_refused(problem):
    params, features, labels = problem
    with pytest.raises(ValueError, match="no examples"):
        evaluate(eval_step, params, features[:0], labels[:0])


def test_a_task_without_a_split_to_evaluate_is_refused(problem):
    params, features, labels = problem
    task = cached_task(params["head"], dense_logits, {"train": Split(features, labels)})
    with pytest.raises(ValueError, match="no split to evaluate on: give it `val` or `test` beside `train`"):
        make_evaluate(task, cross_entropy)


@pytest.mark.parametrize("names", [("train", "test", "val"), ("train", "test")])
def test_the_split_is_the_validation_one_unless_named(problem, names):
    params, features, labels = problem
    splits = {name: Split(features[: 20 + n], labels[: 20 + n]) for n, name in enumerate(names)}
    task = cached_task(params["head"], dense_logits, splits)
    score, state = make_evaluate(task, cross_entropy), init_state(task.params, optax.sgd(0.1))
    assert score(state).num == 19 + len(names) and score(state, {}, "test").num == 21


def test_progress_ends_at_the_number_of_examples(problem):
    done: list[int] = []
    evaluate(eval_step, *problem, 40, done.append)
    assert done == [40, 80, 101]


def test_wilson_interval_of_known_cases():
    # Newcombe 1998, table I: 81 of 263 has the 95 % Wilson interval 0.2553 to 0.3662.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    low, high = wilson_interval(1.0, 20)
    assert low == pytest.approx(0.8389, abs=5e-5) and high == 1.0


def test_scores_by_class_are_those_of_scikit_learn():
    """Its `precision_recall_fscore_support` and `balanced_accuracy_score`: the third class is never predicted."""
    confusion = np.array([[6, 2, 0, 0], [1, 3, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0]])
    result = EvalResult(0.5, 9 / 17, confusion, np.zeros((17, 4), np.float32))
    np.testing.assert_array_equal(result.support, [8, 4, 5, 0])
    np.testing.assert_allclose(result.precision, [6 / 7, 3 / 10, np.nan, np.nan])
    np.testing.assert_allclose(result.recall, [6 / 8, 3 / 4, 0, np.nan])
    np.testing.assert_allclose(result.f1, [2 * 6 / 15, 2 * 3 / 14, 0, np.nan])
    assert result.balanced_accuracy == pytest.approx((6 / 8 + 3 / 4 + 0) / 3)
