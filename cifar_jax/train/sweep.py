"""Training of many heads on the same cached features in one compiled call, to compare seeds or learning rates."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from cifar_jax.models.head import HeadParams, dense_logits, init_head
from cifar_jax.train.loop import EpochOrder
from cifar_jax.train.losses import smoothed_cross_entropy
from cifar_jax.train.step import StepMetrics, init_state, make_train_step, scan_steps
from cifar_jax.train.task import head_forward

MakeOptimizer = Callable[[Float[Array, ""]], optax.GradientTransformation]


def train_heads(
    keys: PRNGKeyArray,
    learning_rates: float | Float[Array, "heads"],
    features: Float[Array, "n features"],
    labels: Int32[Array, "n"],
    order: EpochOrder | Sequence[EpochOrder],
    epochs: int,
    *,
    hidden: Sequence[int] = (1024, 512),
    num_classes: int = 10,
    make_tx: MakeOptimizer = optax.sgd,
    label_smoothing: float = 0.0,
    at_once: int | None = None,
) -> tuple[HeadParams, StepMetrics]:
    """Trains heads independently of each other, compiled once for all of them.

    Args:
      keys: keys that initialise the heads' parameters; one for all heads, or one per head.
      learning_rates: one for all heads, or one per head; `keys` or `learning_rates` must be given per head.
      features: from `make_extractor`; transferred to the device once.
      labels: labels in 0..num_classes - 1.
      order: order of the examples; one for all heads, or one per head, all with the same batch size.
      epochs: number of epochs.
      hidden: widths of the hidden layers, as in `init_head`.
      num_classes: width of the logits.
      make_tx: makes the optimiser for a learning rate. A different function object is compiled again, even if it is
        equal.
      label_smoothing: see `smoothed_cross_entropy`.
      at_once: number of heads trained in parallel, batched with `vmap`. None means one on a CPU, where a single head
        uses all cores and its parameters should stay in their caches, and all of them elsewhere.

    Returns:
      Parameters whose leaves have the heads as their first axis, and metrics [heads, epochs, steps]. A head whose loss
      or gradients are not finite keeps its last good parameters, and its metric `finite` becomes False; the others
      continue.

    Raises:
      ValueError: if the orders have different batch sizes, or their number is neither one nor the number of heads.

    Example:
      >>> keys = jax.random.split(jax.random.key(0), 16)
      >>> order = EpochOrder(jax.random.key(1), jax.random.key(2), batch_size=64)
      >>> params, metrics = train_heads(keys, 0.01, features, labels, order, epochs=4)  # doctest: +SKIP
      >>> results = [evaluate(eval_step, {"head": head}, *val) for head in unstacked(params)]  # doctest: +SKIP
      >>> sums = jax.vmap(eval_step, in_axes=(0, None))({"head": params}, batch)  # doctest: +SKIP
    """
    (num_heads,) = np.broadcast_shapes(jnp.shape(keys), jnp.shape(learning_rates), (1,))
    orders = [order] if isinstance(order, EpochOrder) else order
    if len(orders) not in (1, num_heads) or len({each.batch_size for each in orders}) != 1:
        raise ValueError(f"{len(orders)} orders for {num_heads} heads: give one, or one each of the same batch size")
    steps = [[each.batches(epoch, len(labels)) for epoch in range(epochs)] for each in orders]
    indices = np.stack([np.concatenate([rows for rows, _ in own]) for own in steps])
    counts = np.concatenate([count for _, count in steps[0]])
    params, metrics = _train(
        (
            jnp.broadcast_to(keys, num_heads),
            jnp.broadcast_to(jnp.asarray(learning_rates, jnp.float32), num_heads),
            jnp.broadcast_to(jnp.arange(len(orders)), num_heads),
        ),
        (jnp.asarray(features), jnp.asarray(labels)),
        (indices, counts, jnp.stack([each.step_key for each in orders])),
        hidden=tuple(hidden),
        num_classes=num_classes,
        make_tx=make_tx,
        label_smoothing=label_smoothing,
        at_once=at_once or (1 if jax.default_backend() == "cpu" else num_heads),
    )
    return params, jax.tree.map(lambda leaf: leaf.reshape(num_heads, epochs, -1), metrics)


def unstacked(params: HeadParams) -> list[HeadParams]:
    """Splits the stacked parameters of `train_heads` into a list of heads."""
    num_heads = jax.tree.leaves(params)[0].shape[0]
    return [jax.tree.map(lambda leaf, at=at: leaf[at], params) for at in range(num_heads)]


@partial(jax.jit, static_argnames=("hidden", "num_classes", "make_tx", "label_smoothing", "at_once"))
def _train(
    heads: tuple[PRNGKeyArray, Float[Array, "heads"], Int32[Array, "heads"]],  # key, learning rate, index of the order
    data: tuple[Float[Array, "n features"], Int32[Array, "n"]],
    orders: tuple[Int32[Array, "orders steps batch"], Int32[Array, "steps"], PRNGKeyArray],
    hidden: tuple[int, ...],
    num_classes: int,
    make_tx: MakeOptimizer,
    label_smoothing: float,
    at_once: int,
) -> tuple[HeadParams, StepMetrics]:
    def train_one(
        head: tuple[PRNGKeyArray, Float[Array, ""], Int32[Array, ""]],
    ) -> tuple[HeadParams, StepMetrics]:
        key, learning_rate, number = head
        (features, labels), (indices, counts, step_keys) = data, orders
        tx = make_tx(learning_rate)
        state = init_state({"head": init_head(key, features.shape[1], hidden, num_classes)}, tx)
        train_step = make_train_step(head_forward(dense_logits), smoothed_cross_entropy(label_smoothing), tx)
        # One scan over all epochs, so that a head that halts in one epoch stays halted in the later ones.
        epochs = scan_steps(train_step)
        state, metrics = epochs(state, {}, features, labels, indices[number], counts, step_keys[number])
        return state.params["head"], metrics

    return jax.lax.map(train_one, heads, batch_size=at_once if at_once > 1 else None)
