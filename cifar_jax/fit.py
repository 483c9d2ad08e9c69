"""The loop over epochs, and how one is run: on cached features, or step by step through the whole network."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32, PRNGKeyArray, PyTree

from cifar_jax.augment import Augmentation
from cifar_jax.data import Dataset, epoch_batches
from cifar_jax.errors import RunError
from cifar_jax.evaluation import (
    EvalResult,
    EvalSums,
    eval_batches,
    eval_step,
    evaluate,
    evaluate_batches,
    logits_sums,
)
from cifar_jax.features import default_batch_size, extract
from cifar_jax.head import HeadParams, head_logits
from cifar_jax.parallel import make_mesh, replicate, round_up, shard
from cifar_jax.pretrained.backbone import Backbone
from cifar_jax.training import Batch, StepMetrics, TrainState, make_cached_epoch, make_live_step

RunEpoch = Callable[[TrainState, int], tuple[TrainState, StepMetrics]]
Evaluate = Callable[..., EvalResult]  # (params, batch_stats) -> EvalResult


class EpochRow(NamedTuple):
    """A line of metrics.jsonl. Training figures are running means over the epoch, as Keras reports them."""

    epoch: int  # counted from one
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float


class Diverged(RunError):
    """Training met a loss or gradient that is not finite. `state` is the last good one."""

    def __init__(self, state: TrainState, epoch: int, step: int, learning_rate: float | None = None):
        """Takes the last good state, the epoch counted from one, the step within it, and its rate where it is known."""
        self.state, self.epoch, self.step = state, epoch, step
        rate = f"the learning rate was {learning_rate:.3g}, and " if learning_rate is not None else ""
        super().__init__(
            f"Loss or gradient was not finite in epoch {epoch}, step {step}; {rate}training stopped with "
            "the parameters of the step before. A lower --learning-rate usually helps."
        )

    def at(self, learning_rate: float) -> "Diverged":
        """The same, with the learning rate of the step in its message."""
        return Diverged(self.state, self.epoch, self.step, learning_rate)


class EpochOrder(NamedTuple):
    """How the training images are gone through, and the key that random steps draw from."""

    order_key: PRNGKeyArray
    step_key: PRNGKeyArray
    batch_size: int
    shuffle: bool = True

    def batches(
        self, epoch: int, num_examples: int
    ) -> tuple[Int32[np.ndarray, "steps batch"], Int32[np.ndarray, "steps"]]:
        """Indices and counts of an epoch's steps; see `epoch_batches`."""
        return epoch_batches(self.order_key, epoch, num_examples, self.batch_size, self.shuffle)


def cached_runner(
    features: Float32[np.ndarray, "n features"],
    labels: Int32[np.ndarray, "n"],
    tx: optax.GradientTransformation,
    order: EpochOrder,
    label_smoothing: float = 0.0,
    mesh: Mesh | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Epochs over features that are put on the devices once, whole: their rows are drawn in any order.

    Returns:
      A `RunEpoch` that takes a third argument, to be called with the number of examples done at its end.
    """
    epoch_fn, mesh = make_cached_epoch(tx, label_smoothing), mesh or make_mesh()
    on_device = replicate(mesh, (np.asarray(features), np.asarray(labels)))

    def run_epoch(
        state: TrainState, epoch: int, on_examples: Callable[[int], None] = lambda _: None
    ) -> tuple[TrainState, StepMetrics]:
        indices, counts = order.batches(epoch, len(labels))
        indices = shard(mesh, filled_up(indices, round_up(mesh, order.batch_size), axis=1), axis=1)
        state, metrics = epoch_fn(replicate(mesh, state), *on_device, indices, counts, order.step_key)
        metrics = jax.device_get(metrics)
        on_examples(len(labels))
        return state, metrics

    return run_epoch


def live_runner(
    backbone: Backbone,
    dataset: Dataset,
    tx: optax.GradientTransformation,
    order: EpochOrder,
    image_size: int,
    precision: str,
    label_smoothing: float = 0.0,
    augmentation: Augmentation | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Epochs of the literal step: every image goes through the whole network every time; see `step_runner`."""
    step, mesh = make_live_step(tx, image_size, precision, label_smoothing, augmentation), mesh or make_mesh()
    on_device = replicate(mesh, backbone)
    return step_runner(lambda carry, batch, key: step(carry, on_device, batch, key), dataset, order, mesh)


def step_runner(
    step: Callable[..., Any], dataset: Dataset, order: EpochOrder, mesh: Mesh, fill_up: bool = True
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Epochs as a loop over compiled steps on uint8 images.

    Args:
      step: `((state, going), batch, key) -> ((state, going), metrics)`.
      dataset: the training images.
      order: how they are gone through.
      mesh: the devices that a batch is divided between.
      fill_up: whether the last batch is filled up to the others' shape, its examples weighted; else it is shorter, and
        filled up as far as it must be to be divided.

    Returns:
      A `RunEpoch` that takes a third argument, to be called with the number of examples done after each step.
    """

    def run_epoch(
        state: TrainState, epoch: int, on_examples: Callable[[int], None] = lambda _: None
    ) -> tuple[TrainState, StepMetrics]:
        indices, counts = order.batches(epoch, len(dataset.labels))
        carry, metrics = replicate(mesh, (state, np.array(True))), []
        for number, (index, count) in enumerate(zip(indices, counts, strict=True)):
            index = filled_up(index[:count], round_up(mesh, order.batch_size if fill_up else count))
            weights = (np.arange(len(index)) < count).astype(np.float32)
            batch = shard(mesh, Batch(dataset.images[index], dataset.labels[index], weights))
            carry, step_metrics = step(carry, batch, order.step_key)
            metrics.append(step_metrics)
            # Looking one step back keeps the device busy and still stops a diverged run at once.
            if number and not metrics[-2].finite:
                break
            on_examples(int(counts[: number + 1].sum()))
        return carry[0], jax.tree.map(lambda *leaves: np.stack(jax.device_get(leaves)), *metrics)

    return run_epoch


def filled_up(indices: Int32[np.ndarray, "..."], size: int, axis: int = 0) -> Int32[np.ndarray, "..."]:
    """Indices with that many along an axis; those that are added are 0."""
    return np.pad(indices, [(0, size - indices.shape[axis] if at == axis else 0) for at in range(indices.ndim)])


def cached_evaluator(
    features: Float32[np.ndarray, "n features"],
    labels: Int32[np.ndarray, "n"],
    batch_size: int = 2048,
    mesh: Mesh | None = None,
) -> Evaluate:
    """Evaluation of head parameters on features that are put on the devices once, divided between them."""
    mesh = mesh or make_mesh()
    batches = list(eval_batches(np.asarray(features), np.asarray(labels), batch_size, mesh))
    return lambda params, batch_stats=(): evaluate_batches(eval_step, replicate(mesh, params), batches, len(labels))


def live_evaluator(
    backbone: Backbone,
    dataset: Dataset,
    image_size: int,
    precision: str,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., EvalResult]:
    """Evaluation of head parameters through the whole network.

    Returns:
      An `Evaluate` that takes a third argument, to be called with the number of examples done after each batch.
    """
    mesh = mesh or make_mesh()
    on_device = replicate(mesh, backbone)

    @jax.jit
    def step(params: tuple[Backbone, HeadParams], batch: Batch) -> EvalSums:
        features = extract(params[0], batch.inputs, image_size, precision)
        return logits_sums(head_logits(params[1], features), batch)

    on_images = image_evaluator(step, dataset, image_size, batch_size, mesh)
    return lambda params, batch_stats=(), on_examples=lambda _: None: on_images((on_device, params), on_examples)


def image_evaluator(
    step: Callable[[PyTree, Batch], EvalSums], dataset: Dataset, image_size: int, batch_size: int | None, mesh: Mesh
) -> Callable[[PyTree, Callable[[int], None]], EvalResult]:
    """Evaluation of all of a data set's images, as many at a time as suits the devices unless `batch_size` says."""
    at_once = batch_size or default_batch_size(image_size) * mesh.size
    labels = np.asarray(dataset.labels)
    return lambda params, on_examples: evaluate(step, params, dataset.images, labels, at_once, on_examples, mesh)


def fit(
    state: TrainState,
    run_epoch: RunEpoch,
    evaluate_params: Evaluate,
    num_epochs: int,
    on_epoch: Callable[[EpochRow, TrainState], None] = lambda *_: None,
    first_epoch: int = 0,
) -> tuple[TrainState, list[EpochRow]]:
    """Trains for a number of epochs, evaluating after each.

    Args:
      state: from `init_state`; donated.
      run_epoch: from `cached_runner`, `live_runner` or `finetune_runner`.
      evaluate_params: from the evaluator of the same name.
      num_epochs: how many in all.
      on_epoch: is called after each with its figures and the state, whose memory the next epoch takes over.
      first_epoch: how many of them `state` has behind it already.

    Raises:
      Diverged: when a loss or gradient was not finite; it carries the last good state.
    """
    history = []
    for epoch in range(first_epoch, num_epochs):
        start = time.perf_counter()
        state, metrics = run_epoch(state, epoch)
        _check_finite(state, metrics, epoch)
        result = evaluate_params(state.params, state.batch_stats)
        count = metrics.num.sum()
        row = EpochRow(
            epoch=epoch + 1,
            train_loss=float(metrics.loss_sum.sum(dtype=np.float64) / count),
            train_accuracy=float(metrics.correct.sum() / count),
            val_loss=result.loss,
            val_accuracy=result.accuracy,
            seconds=time.perf_counter() - start,
        )
        history.append(row)
        on_epoch(row, state)
    return state, history


def _check_finite(state: TrainState, metrics: StepMetrics, epoch: int) -> None:
    if not metrics.finite.all():
        raise Diverged(state, epoch + 1, int(np.argmin(metrics.finite)) + 1)


def probabilities(params: HeadParams, features: Array | np.ndarray) -> Float32[np.ndarray, "n classes"]:
    """Class probabilities of features."""
    return np.asarray(_probabilities(params, jnp.asarray(features)))


_probabilities = jax.jit(lambda params, features: jax.nn.softmax(head_logits(params, features)))
