"""Training: a pure step, an epoch as one compiled scan over cached features, and the literal step through the network.

The state is a pytree that is passed, never hidden. Only `make_cached_epoch`, `make_live_step` and
`make_finetune_step` compile and donate; `make_train_step` gives a bare function, to be used, tested or wrapped as
one likes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, PyTree

from cifar_jax.augment import Augmentation
from cifar_jax.features import extract
from cifar_jax.head import HeadParams, head_logits
from cifar_jax.pretrained.backbone import Backbone


class Batch(NamedTuple):
    """Examples of one step. `weights` is 1 for a real example and 0 for one that only fills up the last batch."""

    inputs: Array  # features [batch, features], or uint8 images [batch, 32, 32, 3]
    labels: Int32[Array, "batch"]
    weights: Float[Array, "batch"]


class TrainState(NamedTuple):
    """All that training changes."""

    params: PyTree
    batch_stats: PyTree  # empty where the backbone is frozen
    opt_state: optax.OptState
    step: Int32[Array, ""]


class StepMetrics(NamedTuple):
    """Sums over the real examples of a step, as seen before its update; means are taken once, at the end."""

    loss_sum: Float[Array, ""]
    correct: Int32[Array, ""]
    num: Int32[Array, ""]
    finite: Bool[Array, ""]  # whether loss and gradients were, and the update was made


LossFn = Callable[[PyTree, PyTree, Batch, PRNGKeyArray], tuple[Float[Array, ""], tuple[StepMetrics, PyTree]]]
GradFn = Callable[[PyTree, PyTree, Batch, PRNGKeyArray], Any]  # -> ((loss, (metrics, batch_stats)), gradients)
TrainStep = Callable[[TrainState, Batch, PRNGKeyArray], tuple[TrainState, StepMetrics]]


def init_state(params: PyTree, tx: optax.GradientTransformation, batch_stats: PyTree = ()) -> TrainState:
    """The state before the first step. The parameters are copied, as compiled steps donate the state they are given."""
    params, batch_stats = jax.tree.map(jnp.array, (params, batch_stats))
    return TrainState(params, batch_stats, tx.init(params), jnp.zeros((), jnp.int32))


def batch_loss(
    logits: Float[Array, "batch classes"], batch: Batch, label_smoothing: float = 0.0
) -> tuple[Float[Array, ""], StepMetrics]:
    """Mean cross-entropy over the real examples of a batch, from logits, and the sums that metrics are made of.

    Keras's `SparseCategoricalCrossentropy` on softmax probabilities is the same number, computed with fewer digits.
    With `label_smoothing` that share of each label is spread evenly over all classes; the metrics have the loss
    with it, as Keras reports what it optimises.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    if label_smoothing:
        even = -jax.nn.log_softmax(logits).mean(axis=-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * even
    losses = losses * batch.weights
    correct = (jnp.argmax(logits, axis=-1) == batch.labels) & (batch.weights > 0)
    loss_sum, count = losses.sum(), batch.weights.sum()
    metrics = StepMetrics(loss_sum, correct.sum(dtype=jnp.int32), count.astype(jnp.int32), jnp.isfinite(loss_sum))
    return loss_sum / count, metrics


def head_loss(
    params: HeadParams, batch_stats: PyTree, batch: Batch, key: PRNGKeyArray, label_smoothing: float = 0.0
) -> tuple[Float[Array, ""], tuple[StepMetrics, PyTree]]:
    """Loss of the head on features."""
    del key  # nothing random: the head has no dropout
    loss, metrics = batch_loss(head_logits(params, batch.inputs), batch, label_smoothing)
    return loss, (metrics, batch_stats)


def make_train_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, micro_batch: int | None = None, guard: bool = True
) -> TrainStep:
    """One step of an optimiser on any loss, as a pure function.

    Args:
      loss_fn: `(params, batch_stats, batch, key) -> (loss, (metrics, new batch_stats))`.
      tx: the optimiser.
      micro_batch: examples at a time, their gradients added up; all at once if None. See `in_pieces`.
      guard: whether to look at all that a step is about to add. Without, `metrics.finite` is about the loss alone, and
        the step is made whatever it is.

    Returns:
      `train_step(state, batch, key) -> (state, metrics)`. A step whose loss or gradients are not finite leaves the
      state as it was, `step` included, and says so in `metrics.finite`.

    Example:
      >>> tx = optax.sgd(0.01)
      >>> train_step = jax.jit(make_train_step(head_loss, tx))
    """
    grad_fn = gradient_of(loss_fn, micro_batch)

    def train_step(state: TrainState, batch: Batch, key: PRNGKeyArray) -> tuple[TrainState, StepMetrics]:
        (loss, (metrics, batch_stats)), grads = grad_fn(state.params, state.batch_stats, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        stepped = TrainState(params, batch_stats, opt_state, state.step + 1)
        if not guard:
            return stepped, metrics
        # The norm is finite only if every update is, and no update of a gradient that is not finite is.
        # The statistics are looked at as well: compiled for a CPU, a relu behind them makes 0 of NaN.
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm((updates, batch_stats)))
        return _keep_if(finite, stepped, state), metrics._replace(finite=finite)

    return train_step


def gradient_of(loss_fn: LossFn, micro_batch: int | None) -> GradFn:
    """Loss and gradient, of the whole batch at once or in pieces."""
    grad_fn: GradFn = jax.value_and_grad(loss_fn, has_aux=True)
    return grad_fn if micro_batch is None else in_pieces(grad_fn, micro_batch)


def in_pieces(grad_fn: GradFn, micro_batch: int) -> GradFn:
    """Gradients of a batch in pieces of `micro_batch` examples, the last one shorter: the memory of a piece at a time.

    Each piece counts by its real examples, so loss and gradients are those of the whole batch, but for BatchNorm: a
    piece is normalised by its own statistics, and the running ones are updated piece after piece. The loop is unrolled:
    inside `jax.lax.scan` XLA:CPU runs convolutions many times slower.
    """

    def pieced(params: PyTree, batch_stats: PyTree, batch: Batch, key: PRNGKeyArray) -> Any:
        count, total = batch.weights.sum(), None
        for number, start in enumerate(range(0, batch.labels.shape[0], micro_batch)):
            piece: Batch = jax.tree.map(lambda leaf, at=start: leaf[at : at + micro_batch], batch)
            (loss, (metrics, batch_stats)), grads = grad_fn(params, batch_stats, piece, jax.random.fold_in(key, number))
            share = piece.weights.sum() / count
            part = jax.tree.map(lambda leaf, share=share: leaf * share, (loss, grads)), metrics
            total = part if total is None else jax.tree.map(jnp.add, total, part)
            # Nothing else keeps XLA from running all pieces side by side, in the memory of them all.
            params, batch_stats, total = jax.lax.optimization_barrier((params, batch_stats, total))
        assert total is not None, "a batch has examples"
        (loss, grads), metrics = total
        return (loss, (metrics._replace(finite=jnp.isfinite(loss)), batch_stats)), grads

    return pieced


def halting(train_step: TrainStep) -> Callable[..., tuple[tuple[TrainState, Bool[Array, ""]], StepMetrics]]:
    """A step that, once one was not finite, changes nothing any more.

    So the last good state is there when the host comes to look, which it does not have to after every step.
    """

    def step(
        carry: tuple[TrainState, Bool[Array, ""]], batch: Batch, key: PRNGKeyArray
    ) -> tuple[tuple[TrainState, Bool[Array, ""]], StepMetrics]:
        state, going = carry
        stepped, metrics = train_step(state, batch, key)
        going = going & metrics.finite
        return (_keep_if(going, stepped, state), going), metrics._replace(finite=going)

    return step


def make_cached_epoch(
    tx: optax.GradientTransformation, label_smoothing: float = 0.0
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """`cached_epoch` as one compiled call. The state that goes in is donated."""
    return jax.jit(cached_epoch(tx, label_smoothing), donate_argnums=0)


def cached_epoch(
    tx: optax.GradientTransformation, label_smoothing: float = 0.0
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """An epoch over features that lie on the device, as a pure function.

    A step takes little longer than to read and write the head, and the guard against what is not finite reads all that
    is to be added once more. So the epoch goes without it, as what is not finite stays in the parameters and is found
    there at the end. Only then is the epoch gone through again, from where it began, with the guard.

    Returns:
      `epoch(state, features [n, features], labels [n], indices [steps, batch], counts [steps], key)
      -> (state, metrics)`, where each metric has one entry a step. From the first step on whose loss or gradients are
      not finite, the state stays as it was.
    """
    loss_fn = partial(head_loss, label_smoothing=label_smoothing)
    fast, guarded = (halting(make_train_step(loss_fn, tx, guard=guard)) for guard in (False, True))

    def epoch(
        state: TrainState,
        features: Float[Array, "n features"],
        labels: Int32[Array, "n"],
        indices: Int32[Array, "steps batch"],
        counts: Int32[Array, "steps"],
        key: PRNGKeyArray,
    ) -> tuple[TrainState, StepMetrics]:
        def run(step: Callable[..., Any]) -> tuple[TrainState, StepMetrics]:
            def body(carry: Any, rows: tuple[Array, Array]) -> tuple[Any, StepMetrics]:
                index, count = rows
                batch = Batch(features[index], labels[index], real_weights(index.shape[0], count))
                return step(carry, batch, jax.random.fold_in(key, carry[0].step))

            (ended, _), metrics = jax.lax.scan(body, (state, jnp.array(True)), (indices, counts))
            return ended, metrics

        ended, metrics = run(fast)
        finite = jnp.isfinite(optax.tree.norm(ended.params))
        # A loop that runs once at most, as under vmap a cond would always run.
        _, ended, metrics = jax.lax.while_loop(
            lambda carry: ~carry[0], lambda _: (jnp.array(True), *run(guarded)), (finite, ended, metrics)
        )
        return ended, metrics

    return epoch


def live_loss(backbone: Backbone, image_size: int | None, precision: str, label_smoothing: float = 0.0) -> LossFn:
    """Loss of the head on uint8 images, through the frozen backbone."""

    def loss_fn(
        params: HeadParams, batch_stats: PyTree, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], tuple[StepMetrics, PyTree]]:
        features = extract(backbone, batch.inputs, image_size, precision)
        return head_loss(params, batch_stats, batch._replace(inputs=features), key, label_smoothing)

    return loss_fn


def make_live_step(
    tx: optax.GradientTransformation,
    image_size: int | None = None,
    precision: str = "float32",
    label_smoothing: float = 0.0,
    augmentation: Augmentation | None = None,
) -> Callable[..., tuple[tuple[TrainState, Bool[Array, ""]], StepMetrics]]:
    """The literal step, as one compiled call: uint8 pixels, upsampling, preprocessing, frozen backbone, head, update.

    Returns:
      `step((state, going), backbone, batch, key) -> ((state, going), metrics)`; the first argument is donated. The
      gradient goes through the whole network on paper; `stop_gradient` at its end is why it costs nothing.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(
        carry: tuple[TrainState, Bool[Array, ""]], backbone: Backbone, batch: Batch, key: PRNGKeyArray
    ) -> tuple[tuple[TrainState, Bool[Array, ""]], StepMetrics]:
        loss_fn = live_loss(backbone, image_size, precision, label_smoothing)
        if augmentation:
            batch = batch._replace(inputs=augmentation(carry[0].step, batch.inputs))
        return halting(make_train_step(loss_fn, tx))(carry, batch, jax.random.fold_in(key, carry[0].step))

    return step


def real_weights(batch_size: int, count: Int32[Array, ""]) -> Float[Array, "batch"]:
    """1 for the first `count` examples of a batch, 0 for those behind them."""
    return (jnp.arange(batch_size) < count).astype(jnp.float32)


def _keep_if(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
