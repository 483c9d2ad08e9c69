"""What was not finite in a step that went wrong: looked for afterwards, at no cost to steps that go well."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray, PyTree

from cifar_jax.augment import Augmentation
from cifar_jax.training import Batch, LossFn, TrainState, gradient_of

FaultFinder = Callable[[TrainState, Batch, PRNGKeyArray], str]


class _Finite(NamedTuple):
    """Which tensors of a step are finite, in the order in which they come about."""

    inputs: PyTree
    loss: PyTree
    gradient: PyTree
    update: PyTree
    statistics: PyTree


def make_fault_finder(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    micro_batch: int | None = None,
    augmentation: Augmentation | None = None,
) -> FaultFinder:
    """Makes a function that goes through a step once more and names its first tensor that is not finite.

    It takes what the step takes that `make_train_step` makes of the same arguments, with the augmentation in front, and
    is compiled when it is first called, after a step that went wrong.
    """
    grad_fn = gradient_of(loss_fn, micro_batch)

    @jax.jit
    def look(state: TrainState, batch: Batch, key: PRNGKeyArray) -> _Finite:
        if augmentation:
            batch = batch._replace(inputs=augmentation(state.step, batch.inputs))
        key = jax.random.fold_in(key, state.step)
        (loss, (_, batch_stats)), grads = grad_fn(state.params, state.batch_stats, batch, key)
        updates, _ = tx.update(grads, state.opt_state, state.params)
        tensors = _Finite(batch.inputs, loss, grads, updates, batch_stats)
        return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tensors)

    def find(state: TrainState, batch: Batch, key: PRNGKeyArray) -> str:
        # The paths begin with the names of `_Finite`, in its order.
        for path, finite in jax.tree_util.tree_leaves_with_path(jax.device_get(look(state, batch, key))):
            if not finite:
                return "the " + " of ".join(jax.tree_util.keystr(path, simple=True, separator="/").split("/", 1))
        return "the norm of the update"

    return find
