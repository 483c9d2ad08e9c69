"""Tasks: the trained variables, the inputs and the forward function, which are all that the training modes differ in.

A head is a `Head` or a function `(params, features, *, train, key) -> logits`, a frozen backbone a function
`(variables, images) -> features`, and a trainable backbone a function
`(params, batch_stats, images, *, train, mask) -> (features, batch_stats)`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, PRNGKeyArray, PyTree

from cifar_jax.train.losses import Labels


class Batch(NamedTuple):
    """The examples of one step."""

    inputs: Array  # features [batch, features], or uint8 images [batch, height, width, 3]
    labels: Labels
    mask: Float[Array, "batch"]  # 1 for an example, 0 for padding


class Forward(Protocol):
    """Computes the logits of a batch and the new BatchNorm statistics."""

    def __call__(
        self,
        params: PyTree,
        batch_stats: PyTree,
        frozen: PyTree,
        inputs: Array,
        *,
        train: bool,
        key: PRNGKeyArray | None,
        mask: Float[Array, "batch"],
    ) -> tuple[Float[Array, "batch classes"], PyTree]:
        """Returns the logits and the new batch_stats. `key` is None if `train` is False."""
        ...


class HeadFn(Protocol):
    """Computes logits from features; a `Head` is one."""

    def __call__(
        self, params: Any, features: Any, /, *, train: bool, key: PRNGKeyArray | None
    ) -> Float[Array, "batch classes"]:
        """Returns the logits [batch, classes] of features [batch, features]. `key` is None if `train` is False."""
        ...


# `(key, batch) -> batch` inside the compiled step. Rows whose mask is 0 are padding: copies of the first training
# example, which an augmentation that mixes examples may mix in.
Augment = Callable[[PRNGKeyArray, Batch], Batch]
FrozenFn = Callable[[PyTree, Array], Float[Array, "batch features"]]
TrainableFn = Callable[..., tuple[Float[Array, "batch features"], PyTree]]


class Split(NamedTuple):
    """Inputs and labels of the training, validation or test examples."""

    inputs: Any  # float32 [n, features] or uint8 [n, height, width, 3]
    labels: Int32[np.ndarray, "n"]
    resident: bool = False  # whether all inputs stay on the devices for the lifetime of the task


class Task(NamedTuple):
    """The definition of a training mode.

    Attributes:
      params: the trained parameters: {"head": ...} or {"backbone": ..., "head": ...}.
      batch_stats: the running BatchNorm statistics; {} if the backbone is frozen.
      frozen: the variables of a frozen backbone, or {}. They reside on the devices and are an argument of every step.
      forward: computes logits from inputs.
      splits: inputs and labels by name: `train`, `test`, and `val` if images are held out.
      augment: `(key, batch) -> batch`, applied in training only, before a batch is split into micro-batches; or None.
        Steps are built from functions, not from a task, so pass it on explicitly:
        `make_train_step(task.forward, ..., augment=task.augment)`.
    """

    params: dict[str, PyTree]
    batch_stats: PyTree
    frozen: PyTree
    forward: Forward
    splits: Mapping[str, Split]
    augment: Augment | None = None


def head_forward(head: HeadFn) -> Forward:
    """The forward function of a head on features."""
    return lambda params, batch_stats, frozen, inputs, *, train, key, mask: (
        head(params["head"], inputs, train=train, key=key),
        batch_stats,
    )


def cached_task(head_params: PyTree, head: HeadFn, features: Mapping[str, Split]) -> Task:
    """Makes the task that trains a head on precomputed features."""
    splits = {name: split._replace(resident=True) for name, split in features.items()}
    return Task({"head": head_params}, {}, {}, head_forward(head), splits)


def live_task(
    head_params: PyTree,
    head: HeadFn,
    variables: PyTree,
    backbone: FrozenFn,
    images: Mapping[str, Split],
    augment: Augment | None = None,
) -> Task:
    """Makes the task that trains a head through a frozen backbone, which runs on the images at every step.

    NumPy variables are put on a device once; otherwise every step would transfer them again.
    """
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, variables)
    # `stop_gradient` on the features keeps the backward pass out of the backbone.
    forward: Forward = lambda params, batch_stats, frozen, inputs, *, train, key, mask: (  # noqa: E731
        head(params["head"], jax.lax.stop_gradient(backbone(frozen, inputs)), train=train, key=key),
        batch_stats,
    )
    return Task({"head": head_params}, {}, variables, forward, images, augment)


def finetune_task(
    head_params: PyTree,
    head: HeadFn,
    variables: Mapping[str, PyTree],
    backbone: TrainableFn,
    images: Mapping[str, Split],
    augment: Augment | None = None,
) -> Task:
    """Makes the task that trains backbone and head; `variables` are {"params": ..., "batch_stats": ...}."""

    def forward(
        params: PyTree, batch_stats: PyTree, frozen: PyTree, inputs: Array, *, train: bool, key: Any, mask: Array
    ) -> tuple[Array, PyTree]:
        features, batch_stats = backbone(params["backbone"], batch_stats, inputs, train=train, mask=mask)
        return head(params["head"], features, train=train, key=key), batch_stats

    params = {"backbone": variables["params"], "head": head_params}
    return Task(params, variables.get("batch_stats", {}), {}, forward, images, augment)
