"""Tasks as tests train them: on features, on images through a frozen backbone, and with a backbone that trains."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from cifar_jax.config import TrainConfig
from cifar_jax.models.backbone import extract
from cifar_jax.models.head import dense_logits
from cifar_jax.runtime.sharding import make_mesh
from cifar_jax.train.evaluate import EvalResult, make_evaluate
from cifar_jax.train.finetune import trainable_backbone
from cifar_jax.train.loop import Advance, EpochOrder, fit, make_advance
from cifar_jax.train.losses import cross_entropy
from cifar_jax.train.step import TrainState, init_state, make_train_step
from cifar_jax.train.task import Batch, Split, Task, cached_task, finetune_task, live_task


def on_features(params: Any, train: Any, val: Any = None, head: Any = dense_logits) -> Task:
    """A head on (features, labels), which are the validation examples too if there are no others."""
    return cached_task(params, head, {"train": Split(*train), "val": Split(*(val or train))})


def on_images(
    params: Any, backbone: Any, train: Any, val: Any = None, head: Any = dense_logits, size: int = 32, **more: Any
) -> Task:
    """A head through a frozen backbone on uint8 images."""
    splits = {"train": Split(*train), "val": Split(*(val or train))}
    function = partial(extract, image_size=size, precision="float32")
    return live_task(params, head, backbone, function, splits, **more)


def on_all_layers(
    config: TrainConfig,
    params: Any,
    backbone: Any,
    train: Any,
    val: Any = None,
    head: Any = dense_logits,
    size: int = 32,
    **more: Any,
) -> Task:
    """Backbone and head together, as a configuration says."""
    splits = {"train": Split(*train), "val": Split(*(val or train))}
    variables, function = trainable_backbone(config, backbone, size, **more)
    return finetune_task(params, head, variables, function, splits)


def start_of(task: Task, tx: optax.GradientTransformation) -> TrainState:
    """The state of a task before its first step."""
    return init_state(task.params, tx, task.batch_stats)


def steps_of(
    task: Task,
    tx: optax.GradientTransformation,
    order: EpochOrder,
    loss_fn: Any = cross_entropy,
    mesh: Mesh | None = None,
    micro_batch: int | None = None,
) -> Advance:
    """The compiled steps of a task."""
    step = make_train_step(task.forward, loss_fn, tx, augment=task.augment, micro_batch=micro_batch)
    return make_advance(task, step, order, mesh or make_mesh())


def fitted(
    task: Task,
    tx: optax.GradientTransformation,
    order: EpochOrder,
    epochs: int,
    loss_fn: Any = cross_entropy,
    mesh: Mesh | None = None,
    micro_batch: int | None = None,
    batch_size: int = 2048,
    **more: Any,
) -> Any:
    """State and rows of `fit`."""
    advance = steps_of(task, tx, order, loss_fn, mesh, micro_batch)
    evaluate = make_evaluate(task, loss_fn, advance.mesh, batch_size)

    def validate(state: TrainState) -> EvalResult:
        return evaluate(state, task.frozen, "val")

    return fit(start_of(task, tx), task.frozen, advance, validate, epochs, **more)


def assert_same_bits(a: Any, b: Any) -> None:
    """Two trees hold the same values."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_close(a: Any, b: Any, rtol: float, atol: float | None = None) -> None:
    """Two trees hold the same values up to tolerances; `atol` defaults to `rtol`."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol if atol is None else atol)


def batch_of(inputs: Any, labels: Any, num_examples: int | None = None) -> Batch:
    """A batch of examples; those after the first `num_examples`, if given, are padding."""
    mask = np.arange(len(labels)) < (len(labels) if num_examples is None else num_examples)
    return Batch(jnp.asarray(inputs), jnp.asarray(labels), jnp.asarray(mask, jnp.float32))
