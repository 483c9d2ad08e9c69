"""The training step: one pure function for every task, loss and optimiser."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, PyTree

from cifar_jax.rng import stream_of
from cifar_jax.train.losses import LossFn, losses_of
from cifar_jax.train.task import Augment, Batch, Forward


class TrainState(NamedTuple):
    """All arrays that training updates."""

    params: PyTree
    batch_stats: PyTree  # {} if the backbone is frozen
    opt_state: optax.OptState
    step: Int32[Array, ""]
    halted: Bool[Array, ""] | np.bool_ = np.False_  # True after a non-finite step: later steps change nothing


class StepMetrics(NamedTuple):
    """Sums over the examples of a step, computed before its update; means are taken once, at the end."""

    loss_sum: Float[Array, ""]
    correct: Int32[Array, ""]
    num: Int32[Array, ""]
    finite: Bool[Array, ""]  # whether this step and all steps before it were finite


TrainStep = Callable[[TrainState, PyTree, Batch, PRNGKeyArray], tuple[TrainState, StepMetrics]]


def init_state(params: PyTree, tx: optax.GradientTransformation, batch_stats: PyTree | None = None) -> TrainState:
    """Returns the state before the first step. Its arrays are copies, as compiled steps donate their state."""
    params, batch_stats = jax.tree.map(jnp.array, (params, {} if batch_stats is None else batch_stats))
    opt_state = jax.tree.map(jnp.array, tx.init(params))  # init may return arrays that tx itself holds, such as a key
    return TrainState(params, batch_stats, opt_state, jnp.zeros((), jnp.int32), jnp.zeros((), bool))


def make_train_step(
    forward: Forward,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    augment: Augment | None = None,
    micro_batch: int | None = None,
) -> TrainStep:
    """Makes the training step as a pure function: not compiled, and without donation.

    Args:
      forward: `(params, batch_stats, frozen, inputs, *, train, key, mask) -> (logits, batch_stats)`, of a `Task`.
      loss_fn: `(logits, labels) -> [batch]`, one loss per example.
      tx: the optimiser. Its update receives the loss of the step as the extra argument `value`.
      augment: `(key, batch) -> batch`, applied first. Pass `task.augment` here, as `forward` does not include it.
      micro_batch: number of examples per micro-batch; their gradients are accumulated, using the memory of one
        micro-batch. None processes the whole batch at once. Micro-batches are weighted by their number of examples, so
        loss and gradient are those of the whole batch, except for BatchNorm: each micro-batch is normalised by its own
        statistics and updates the running ones in turn.

    Returns:
      `train_step(state, frozen, batch, key) -> (state, metrics)`. Pass the same key at every step: the randomness of
      augmentation and forward depends on it and on `state.step`. A step whose loss, gradients or statistics are not
      finite sets `state.halted` and leaves the rest of the state unchanged, and so does every step after it.

      On a CPU this check takes 4 % of an epoch on cached features (medians of ten pairs 1.03 to 1.05; ResNet50's head,
      batch 64, two cores). Checking the optimiser's updates as well would take 13 to 19 %; instead, callers check a
      state with `is_finite` once, before they save it.

    Example:
      >>> head, tx = dense_head(), optax.sgd(0.01)
      >>> train_step = jax.jit(make_train_step(head_forward(head), cross_entropy, tx))
      >>> state = init_state({"head": head.init(jax.random.key(1), 2048, 10)}, tx)
      >>> state, metrics = train_step(state, {}, batch, jax.random.key(0))  # doctest: +SKIP
    """
    grad_fn = _make_grad_fn(forward, loss_fn)
    update = optax.with_extra_args_support(tx).update

    def train_step(
        state: TrainState, frozen: PyTree, batch: Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, StepMetrics]:
        batch, key = _prepared(state, batch, key, augment)
        params, batch_stats, total, count = state.params, state.batch_stats, None, batch.mask.sum()
        # Unrolled, as XLA:CPU runs convolutions many times slower inside `jax.lax.scan`.
        for piece, piece_key in _pieces(batch, key, micro_batch):
            (loss, (metrics, batch_stats)), grads = grad_fn(params, batch_stats, frozen, piece, piece_key)
            if micro_batch is not None:
                share = piece.mask.sum() / count
                loss, grads = jax.tree.map(lambda leaf, share=share: leaf * share, (loss, grads))
            part = (loss, grads, metrics)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
            if micro_batch is not None:
                # Without the barrier XLA may run all micro-batches concurrently, using the memory of all of them.
                params, batch_stats, total = jax.lax.optimization_barrier((params, batch_stats, total))
        assert total is not None, "a batch has examples"
        loss, grads, (loss_sum, correct, num) = total
        updates, opt_state = update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        # Check the statistics as well: compiled for a CPU, a relu after BatchNorm turns NaN into 0.
        finite = ~state.halted & jnp.isfinite(loss) & _all_finite((grads, batch_stats))
        stepped = TrainState(params, batch_stats, opt_state, state.step + 1, state.halted)
        kept: TrainState = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
        return kept._replace(halted=~finite), StepMetrics(loss_sum, correct, num, finite)

    return train_step


def scan_steps(train_step: TrainStep) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Makes a scan of a training step over inputs that reside on the devices, a pure function with metrics by step.

    Its `counts` are the numbers of indices of each step that are not padding.
    """

    def run(
        state: TrainState,
        frozen: PyTree,
        inputs: Float[Array, "n ..."],
        labels: Int32[Array, "n"],
        indices: Int32[Array, "steps batch"],
        counts: Int32[Array, "steps"],
        key: PRNGKeyArray,
    ) -> tuple[TrainState, StepMetrics]:
        def step(state: TrainState, rows: tuple[Array, Array]) -> tuple[TrainState, StepMetrics]:
            index, count = rows
            mask = (jnp.arange(index.shape[0]) < count).astype(jnp.float32)
            return train_step(state, frozen, Batch(inputs[index], labels[index], mask), key)

        return jax.lax.scan(step, state, (indices, counts))

    return run


def is_finite(tree: PyTree) -> bool:
    """Returns whether all values of a tree are finite, as a Python bool."""
    return bool(_all_finite_compiled(tree))


def first_not_finite(
    forward: Forward,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    state: TrainState,
    frozen: PyTree,
    batch: Batch,
    key: PRNGKeyArray,
    augment: Augment | None = None,
    micro_batch: int | None = None,
) -> str:
    """Names the first tensor of a step that is not finite, by running the step again.

    Takes the arguments of `make_train_step` and those of the step, with the state before it.
    """
    batch, key = _prepared(state, batch, key, augment)
    grad_fn = _make_grad_fn(forward, loss_fn)
    update = optax.with_extra_args_support(tx).update

    @jax.jit
    def look(batch_stats: PyTree, piece: Batch, key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
        (loss, (_, batch_stats)), grads = grad_fn(state.params, batch_stats, frozen, piece, key)
        updates, _ = update(grads, state.opt_state, state.params, value=loss)
        tensors = (piece.inputs, loss, grads, updates, batch_stats)
        return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tensors), batch_stats

    names, batch_stats = ("the inputs", "the loss", "the gradient", "the update", "the statistics"), state.batch_stats
    for piece, piece_key in _pieces(batch, key, micro_batch):
        finite, batch_stats = look(batch_stats, piece, piece_key)
        for (number, *path), ok in jax.tree_util.tree_leaves_with_path(finite):
            if not ok:
                place = jax.tree_util.keystr(tuple(path), simple=True, separator="/")
                return f"{names[number.idx]} of {place}" if place else names[number.idx]
    return "the sum of a gradient"


def _make_grad_fn(forward: Forward, loss_fn: LossFn) -> Callable[..., Any]:
    """Makes the function that returns `((mean loss, ((loss_sum, correct, num), batch_stats)), gradients)`."""

    def loss(
        params: PyTree, batch_stats: PyTree, frozen: PyTree, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], tuple[tuple[Array, Array, Array], PyTree]]:
        logits, batch_stats = forward(params, batch_stats, frozen, batch.inputs, train=True, key=key, mask=batch.mask)
        loss_sum, count = (losses_of(loss_fn, logits, batch.labels) * batch.mask).sum(), batch.mask.sum()
        correct = (jnp.argmax(logits, axis=-1) == classes_of(batch.labels)) & (batch.mask > 0)
        sums = (loss_sum, correct.sum(dtype=jnp.int32), count.astype(jnp.int32))
        return loss_sum / jnp.maximum(count, 1), (sums, batch_stats)  # a micro-batch may be all padding

    return jax.value_and_grad(loss, has_aux=True)


def classes_of(labels: Array) -> Int32[Array, "batch"]:
    """The class of each example, or the most likely class if the labels are distributions."""
    return labels if labels.ndim == 1 else jnp.argmax(labels, axis=-1).astype(jnp.int32)


def _prepared(
    state: TrainState, batch: Batch, key: PRNGKeyArray, augment: Augment | None
) -> tuple[Batch, PRNGKeyArray]:
    """The augmented batch of a step, and the key of the step's randomness."""
    if augment:
        batch = augment(jax.random.fold_in(stream_of(key, "augment"), state.step), batch)
    return batch, jax.random.fold_in(stream_of(key, "step"), state.step)


def _pieces(batch: Batch, key: PRNGKeyArray, micro_batch: int | None) -> list[tuple[Batch, PRNGKeyArray]]:
    """Splits a batch into micro-batches, each with its own key; the last may be shorter. None leaves it whole."""
    if micro_batch is None:
        return [(batch, key)]
    starts = enumerate(range(0, batch.labels.shape[0], micro_batch))
    return [
        (jax.tree.map(lambda leaf, at=at: leaf[at : at + micro_batch], batch), jax.random.fold_in(key, number))
        for number, at in starts
    ]


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    # A sum is finite only if all its terms are, and reads each value once. 16-bit types are summed in float32, as they
    # would overflow.
    sums = [leaf.sum(dtype=jnp.float32 if leaf.dtype.itemsize < 4 else None) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.array([jnp.isfinite(total) for total in sums] or [True]))


_all_finite_compiled = jax.jit(_all_finite)
