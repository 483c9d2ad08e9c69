"""Out of memory: evaluation goes on with smaller batches, and training names a step that fits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY

from cifar_jax.cli.options import parse_train
from cifar_jax.errors import RunError
from cifar_jax.experiment import train
from cifar_jax.train.evaluate import make_evaluate
from cifar_jax.train.loop import EpochOrder, make_advance
from cifar_jax.train.losses import cross_entropy
from cifar_jax.train.memory import largest_fitting, step_bytes
from cifar_jax.train.step import init_state, make_train_step
from cifar_jax.train.task import Split, Task

FULL = "RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."


@pytest.mark.parametrize(
    ("size", "limit", "multiple", "expected"),
    [(64, 40, 1, 32), (64, 20, 1, 16), (64, 20, 8, 16), (24, 11, 8, 8), (64, 0.5, 1, None), (1, 100, 1, None)],
)
def test_the_largest_half_that_fits(size, limit, multiple, expected):
    asked = []
    assert largest_fitting(lambda size: asked.append(size) or size, size, limit, multiple) == expected
    assert size not in asked and all(size % multiple == 0 for size in asked)


def images_task(num_features=4096):
    """A task on images, each step of which needs memory in proportion to its images."""

    def forward(params, batch_stats, frozen, inputs, *, train, key, mask):
        wide = jnp.tanh(inputs.reshape(len(inputs), -1).astype(jnp.float32) @ params["wide"])
        return wide[:, :10], batch_stats

    images = np.zeros((256, 8, 8, 3), np.uint8)
    labels = np.zeros(256, np.int32)
    params = {"wide": np.full((192, num_features), 1e-3, np.float32)}
    splits = {"train": Split(images, labels), "test": Split(images, labels)}
    return Task(params=params, batch_stats={}, frozen={}, forward=forward, splits=splits)


def test_step_bytes_count_what_a_step_reads_and_computes():
    task, tx = images_task(), optax.sgd(0.1)
    state = init_state(task.params, tx)
    step = make_train_step(task.forward, cross_entropy, tx)
    order = EpochOrder(jax.random.key(0), jax.random.key(0), 128)
    advance = make_advance(task, step, order)
    small, large = (step_bytes(step, state, task, advance, size) for size in (16, 128))
    params = 192 * 4096 * 4
    assert small > params and large - small >= 112 * 4096 * 4  # at least one activation for each further image


def test_evaluation_begins_again_with_smaller_batches(log_messages):
    task, sizes = images_task(), []

    def forward(params, batch_stats, frozen, inputs, **how):
        sizes.append(len(inputs))
        if len(inputs) > 40:
            raise jax.errors.JaxRuntimeError(FULL)
        return task.forward(params, batch_stats, frozen, inputs, **how)

    state = init_state(task.params, optax.sgd(0.1))
    result = make_evaluate(task._replace(forward=forward), cross_entropy, batch_size=128)(state)
    expected = make_evaluate(task, cross_entropy)(state)
    assert result.loss == pytest.approx(expected.loss) and (result.confusion == expected.confusion).all()
    assert sizes == [128, 64, 32]
    assert log_messages == [
        f"Out of memory in the evaluation; repeating it with batches of {size}." for size in (64, 32)
    ]


def test_other_errors_of_a_device_end_the_evaluation():
    def forward(*_, **__):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: device is gone")

    state = init_state(images_task().params, optax.sgd(0.1))
    with pytest.raises(jax.errors.JaxRuntimeError, match="device is gone"):
        make_evaluate(images_task()._replace(forward=forward), cross_entropy)(state)


@pytest.mark.parametrize(("mode", "option"), [("live", "--batch-size 32"), ("finetune", "--micro-batch 32")])
def test_training_names_a_size_that_fits(tmp_path, narrow, quick_compile, mode, option):
    traced = []

    def loss_fn(logits, labels):
        traced.append(len(logits))
        if len(traced) == 2:  # the first is traced before the run, to check it
            raise jax.errors.JaxRuntimeError(FULL)
        return cross_entropy(logits, labels)

    config = parse_train(
        [*TINY, "--mode", mode, "--out", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    )
    with pytest.raises(RunError, match=f"^Out of memory. Start again with {option}, with which a step fits") as raised:
        train(config, loss_fn=loss_fn)
    assert FULL in str(raised.value)
