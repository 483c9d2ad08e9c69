"""How an epoch is run and evaluated: on cached features, or step by step through the whole network."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32, PRNGKeyArray, PyTree

from cifar_jax.augment import Augmentation
from cifar_jax.data import Dataset, epoch_batches
from cifar_jax.evaluation import (
    EvalResult,
    EvalSums,
    eval_batches,
    eval_step,
    evaluate,
    evaluate_batches,
    logits_sums,
)
from cifar_jax.faults import FaultFinder, make_fault_finder
from cifar_jax.features import default_batch_size, extract
from cifar_jax.head import HeadParams, head_logits
from cifar_jax.parallel import make_mesh, replicate, round_up, shard
from cifar_jax.pretrained.backbone import Backbone
from cifar_jax.training import (
    Batch,
    StepMetrics,
    TrainState,
    head_loss,
    live_loss,
    make_cached_epoch,
    make_live_step,
)

Evaluate = Callable[..., EvalResult]  # (params, batch_stats) -> EvalResult

# How many steps the host hands out before the device has done the first of them. It never waits for the step that
# runs, and what is waiting on the device stays within bounds.
AHEAD = 8


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

    def steps(self, num_examples: int) -> int:
        """Steps of an epoch, a short last one included."""
        return -(-num_examples // self.batch_size)


class Runner(NamedTuple):
    """How the steps of an epoch are run.

    Attributes:
      steps_per_epoch: a short last one included.
      run: `(state, epoch, steps, on_examples, stopping) -> (state, metrics)`, which donates the state, see `__call__`.
      fault: `(state, epoch, step) -> name` of the first tensor of a step, counted from zero, that is not finite.
    """

    steps_per_epoch: int
    run: Callable[..., tuple[TrainState, StepMetrics]]
    fault: Callable[[TrainState, int, int], str]

    def __call__(
        self,
        state: TrainState,
        epoch: int,
        steps: range | None = None,
        on_examples: Callable[[int], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> tuple[TrainState, StepMetrics]:
        """Runs steps of an epoch.

        Args:
          state: before them; donated.
          epoch: counted from zero.
          steps: which of the epoch's; all if None.
          on_examples: is called with the number of the epoch's examples that are done.
          stopping: whether to end after the step that runs; an epoch that is one compiled call goes to its end.

        Returns:
          The state, and metrics on the host with an entry for each step that was run, at least one. From the first step
          on that was not finite, the state stays as it was.
        """
        return self.run(state, epoch, steps or range(self.steps_per_epoch), on_examples, stopping)


def cached_runner(
    features: Float32[np.ndarray, "n features"],
    labels: Int32[np.ndarray, "n"],
    tx: optax.GradientTransformation,
    order: EpochOrder,
    label_smoothing: float = 0.0,
    mesh: Mesh | None = None,
) -> Runner:
    """Epochs over features that are put on the devices once, whole: their rows are drawn in any order."""
    epoch_fn, mesh = make_cached_epoch(tx, label_smoothing), mesh or make_mesh()
    on_device = replicate(mesh, (np.asarray(features), np.asarray(labels)))
    size = round_up(mesh, order.batch_size)

    def run(
        state: TrainState, epoch: int, steps: range, on_examples: Callable[[int], None], stopping: Callable[[], bool]
    ) -> tuple[TrainState, StepMetrics]:
        indices, counts = order.batches(epoch, len(labels))
        rows = slice(steps.start, steps.stop)
        own = shard(mesh, filled_up(indices[rows], size, axis=1), axis=1)
        state, metrics = epoch_fn(replicate(mesh, state), *on_device, own, counts[rows], order.step_key)
        metrics = jax.device_get(metrics)
        on_examples(int(counts[: steps.stop].sum()))
        return state, metrics

    def fault(state: TrainState, epoch: int, step: int) -> str:
        indices, counts = order.batches(epoch, len(labels))
        rows = indices[step, : counts[step]]
        batch = Batch(*jax.device_put((features[rows], labels[rows], np.ones(len(rows), np.float32))))
        return make_fault_finder(partial(head_loss, label_smoothing=label_smoothing), tx)(state, batch, order.step_key)

    return Runner(order.steps(len(labels)), run, fault)


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
) -> Runner:
    """Epochs of the literal step: every image goes through the whole network every time; see `step_runner`."""
    step, mesh = make_live_step(tx, image_size, precision, label_smoothing, augmentation), mesh or make_mesh()
    on_device = replicate(mesh, backbone)
    find_fault = make_fault_finder(live_loss(backbone, image_size, precision, label_smoothing), tx, None, augmentation)
    return step_runner(lambda carry, batch, key: step(carry, on_device, batch, key), find_fault, dataset, order, mesh)


def step_runner(
    step: Callable[..., Any],
    find_fault: FaultFinder,
    dataset: Dataset,
    order: EpochOrder,
    mesh: Mesh,
    fill_up: bool = True,
) -> Runner:
    """Epochs as a loop over compiled steps on uint8 images.

    Args:
      step: `((state, going), batch, key) -> ((state, going), metrics)`.
      find_fault: from `make_fault_finder`, for the loss of the step.
      dataset: the training images.
      order: how they are gone through.
      mesh: the devices that a batch is divided between.
      fill_up: whether the last batch is filled up to the others' shape, its examples weighted; else it is shorter, and
        filled up as far as it must be to be divided.
    """
    labels = dataset.labels

    def batch_of(index: Int32[np.ndarray, "batch"], count: int) -> Batch:
        index = filled_up(index[:count], round_up(mesh, order.batch_size if fill_up else count))
        weights = (np.arange(len(index)) < count).astype(np.float32)
        return Batch(*shard(mesh, (dataset.images[index], labels[index], weights)))

    def run(
        state: TrainState, epoch: int, steps: range, on_examples: Callable[[int], None], stopping: Callable[[], bool]
    ) -> tuple[TrainState, StepMetrics]:
        indices, counts = order.batches(epoch, len(labels))
        carry, metrics = replicate(mesh, (state, np.array(True))), []
        for number in steps:
            carry, step_metrics = step(carry, batch_of(indices[number], counts[number]), order.step_key)
            metrics.append(step_metrics)
            # What diverged changes nothing any more, so it need not be noticed at once.
            if len(metrics) > AHEAD and not metrics[-1 - AHEAD].finite:
                break
            on_examples(min((number + 1) * order.batch_size, len(labels)))
            if stopping():
                break
        return carry[0], jax.tree.map(lambda *leaves: np.stack(jax.device_get(leaves)), *metrics)

    def fault(state: TrainState, epoch: int, number: int) -> str:
        indices, counts = order.batches(epoch, len(labels))
        return find_fault(state, batch_of(indices[number], counts[number]), order.step_key)

    return Runner(order.steps(len(labels)), run, fault)


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


def probabilities(params: HeadParams, features: Array | np.ndarray) -> Float32[np.ndarray, "n classes"]:
    """Class probabilities of features."""
    return np.asarray(_probabilities(params, jnp.asarray(features)))


_probabilities = jax.jit(lambda params, features: jax.nn.softmax(head_logits(params, features)))
