"""A task: what trains, what goes in, and how logits come of it. The ways to train differ in nothing else.

A head is a `Head` or a function `(params, features, *, train, key) -> logits`, a frozen backbone one of
`(variables, images) -> features`, and one that trains one of
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
    """Examples of one step."""

    inputs: Array  # features [batch, features], or uint8 images [batch, height, width, 3]
    labels: Labels
    mask: Float[Array, "batch"]  # 1 for an example, 0 for padding


class Forward(Protocol):
    """Logits of a batch, and what BatchNorm carries along."""

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
        """Logits and new batch_stats. `key` is None where `train` is False."""
        ...


class HeadFn(Protocol):
    """Logits of features; a `Head` is one too."""

    def __call__(
        self, params: Any, features: Any, /, *, train: bool, key: PRNGKeyArray | None
    ) -> Float[Array, "batch classes"]:
        """Logits [batch, classes] of features [batch, features]. `key` is None where `train` is False."""
        ...


# `(key, batch) -> batch` inside the compiled step. Rows whose mask is 0 are padding: copies of the first example of the
# training set, which an augmentation that mixes examples may meet.
Augment = Callable[[PRNGKeyArray, Batch], Batch]
FrozenFn = Callable[[PyTree, Array], Float[Array, "batch features"]]
TrainableFn = Callable[..., tuple[Float[Array, "batch features"], PyTree]]


class Split(NamedTuple):
    """Inputs and labels of the training, validation or test examples."""

    inputs: Any  # float32 [n, features] or uint8 [n, height, width, 3]
    labels: Int32[np.ndarray, "n"]
    resident: bool = False  # whether the inputs lie on the devices, whole, for as long as the task


class Task(NamedTuple):
    """A way to train.

    Attributes:
      params: what trains: {"head": ...} or {"backbone": ..., "head": ...}.
      batch_stats: what BatchNorm carries along; {} where the backbone is frozen.
      frozen: what does not train: the variables of the backbone, or {}. On the devices, and an argument of every step.
      forward: logits of inputs.
      splits: by name: `train`, `test`, and `val` where images are held out.
      augment: `(key, batch) -> batch`, for training only, before a batch is cut into pieces; or None. Steps are made
        of functions and know no task, so pass it on: `make_train_step(task.forward, ..., augment=task.augment)`.
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
    """Trains a head on features, which every image was turned into once."""
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
    """Trains a head through a frozen backbone, which every image passes at every step.

    Variables that are NumPy arrays are put on a device, where they would else go at every step anew.
    """
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, variables)
    # The gradient goes through the whole network on paper; `stop_gradient` at its end is why it costs nothing.
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
    """Trains backbone and head together; `variables` of the backbone are {"params": ..., "batch_stats": ...}."""

    def forward(
        params: PyTree, batch_stats: PyTree, frozen: PyTree, inputs: Array, *, train: bool, key: Any, mask: Array
    ) -> tuple[Array, PyTree]:
        features, batch_stats = backbone(params["backbone"], batch_stats, inputs, train=train, mask=mask)
        return head(params["head"], features, train=train, key=key), batch_stats

    params = {"backbone": variables["params"], "head": head_params}
    return Task(params, variables.get("batch_stats", {}), {}, forward, images, augment)
