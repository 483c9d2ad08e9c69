"""Training of backbone and head together: the loss through the whole network, its compiled step, its evaluation.

The parameters are {"backbone": variables["params"], "head": head params}, the statistics those of the backbone, so what
a step changes is in `TrainState` and nowhere else.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, PRNGKeyArray, PyTree, UInt8

from cifar_jax.augment import Augmentation
from cifar_jax.config import TrainConfig
from cifar_jax.data import Dataset
from cifar_jax.evaluation import EvalResult, EvalSums, logits_sums
from cifar_jax.faults import make_fault_finder
from cifar_jax.features import extract
from cifar_jax.head import HeadParams, head_logits
from cifar_jax.optimizer import param_labels
from cifar_jax.parallel import make_mesh, rows_sharding
from cifar_jax.preprocess import Preprocessing, preprocess
from cifar_jax.pretrained.backbone import Backbone
from cifar_jax.resnet import ResNet, ResNetConfig, Variables
from cifar_jax.runners import EpochOrder, Runner, image_evaluator, step_runner
from cifar_jax.training import (
    Batch,
    LossFn,
    StepMetrics,
    TrainState,
    batch_loss,
    halting,
    init_state,
    make_train_step,
)

Params = dict[str, Any]  # {"backbone": ..., "head": ...}


def init_finetune(
    variables: Variables, head_params: HeadParams, tx: optax.GradientTransformation, zero_gamma: bool = False
) -> TrainState:
    """The state before the first step.

    Args:
      variables: of the backbone.
      head_params: from `init_head`.
      tx: the optimiser.
      zero_gamma: begin with zero scale in each block's last BatchNorm, so that every block starts as its shortcut.

    Reference:
      Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 5.1
    """
    backbone = variables["params"]
    if zero_gamma:
        backbone = {
            name: part | {"bn3": part["bn3"] | {"scale": np.zeros_like(part["bn3"]["scale"])}}
            if "bn3" in part
            else part
            for name, part in backbone.items()
        }
    return init_state({"backbone": backbone, "head": head_params}, tx, variables["batch_stats"])


def make_network(config: TrainConfig, network: ResNetConfig, platform: str | None = None) -> ResNet:
    """The network as it is trained, on a platform of JAX's; on the one that is here if None."""
    return ResNet(
        network,
        dtype=jnp.dtype(config.backbone.precision),
        bn_momentum=config.finetune.bn_momentum,
        # As matrix products the gradients of 3x3 convolutions are three to four times faster on a CPU.
        convs_as_dots=(platform or jax.default_backend()) == "cpu",
        frozen_stages=config.finetune.freeze_stages,
        remat=config.finetune.remat,
    )


def make_finetune_loss(
    network: ResNet,
    preprocessing: Preprocessing,
    image_size: int,
    bn_statistics: str = "batch",
    label_smoothing: float = 0.0,
    mesh: Mesh | None = None,
    has_fillers: bool = False,
) -> LossFn:
    """Loss of uint8 images, as a function of backbone and head.

    Args:
      network: from `make_network`; its frozen stages get no gradient and keep their statistics.
      preprocessing: the backbone's.
      image_size: side in pixels that images are upsampled to.
      bn_statistics: `batch`: BatchNorm normalises by the batch, and the running statistics become
        `momentum * old + (1 - momentum) * batch's`, the variance being the biased one, as in Keras 3. `frozen`:
        BatchNorm uses its running statistics and keeps them.
      label_smoothing: see `batch_loss`.
      mesh: the devices that each piece of a batch is divided between; None leaves it where it lies.
      has_fillers: whether examples may have weight 0, which are then left out of BatchNorm's statistics as well.
    """

    def loss_fn(
        params: Params, batch_stats: PyTree, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], tuple[StepMetrics, PyTree]]:
        del key  # nothing random: the images have been augmented before
        params = _stop_frozen(params, network.frozen_stages)
        if mesh:
            batch = jax.lax.with_sharding_constraint(batch, rows_sharding(mesh))
        real = batch.weights > 0 if has_fillers else None
        x = preprocess(batch.inputs, preprocessing, image_size)
        variables = {"params": params["backbone"], "batch_stats": batch_stats}
        if bn_statistics == "batch":
            output, changed = network.apply(variables, x, train=True, real=real, mutable=["batch_stats"])
            batch_stats = changed["batch_stats"]
        else:
            output = network.apply(variables, x, train=False)
        pooled: Any = output
        loss, metrics = batch_loss(head_logits(params["head"], pooled.pooled), batch, label_smoothing)
        return loss, (metrics, batch_stats)

    return loss_fn


def _stop_frozen(params: Params, frozen_stages: int) -> Params:
    """Without a gradient for what is frozen, nothing is computed for it on the way back either."""
    labels = param_labels(params, frozen_stages)
    return jax.tree.map(lambda p, label: jax.lax.stop_gradient(p) if label == "frozen" else p, params, labels)


def make_finetune_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    micro_batch: int | None = None,
    augmentation: Augmentation | None = None,
) -> Callable[..., tuple[tuple[TrainState, Bool[Array, ""]], StepMetrics]]:
    """The step as one compiled call: augmentation, preprocessing, network, head, update.

    Returns:
      `step((state, going), batch, key) -> ((state, going), metrics)`; the first argument is donated.
    """
    step = halting(make_train_step(loss_fn, tx, micro_batch))

    @partial(jax.jit, donate_argnums=0)
    def finetune_step(
        carry: tuple[TrainState, Bool[Array, ""]], batch: Batch, key: PRNGKeyArray
    ) -> tuple[tuple[TrainState, Bool[Array, ""]], StepMetrics]:
        # Before the batch is cut into pieces, so that their size does not move what is drawn.
        if augmentation:
            batch = batch._replace(inputs=augmentation(carry[0].step, batch.inputs))
        return step(carry, batch, jax.random.fold_in(key, carry[0].step))

    return finetune_step


def finetune_runner(
    config: TrainConfig,
    backbone: Backbone,
    dataset: Dataset,
    tx: optax.GradientTransformation,
    order: EpochOrder,
    image_size: int,
    augmentation: Augmentation | None = None,
    mesh: Mesh | None = None,
) -> Runner:
    """Epochs in which all layers train; see `step_runner`.

    The last batch of an epoch is run as short as it is, which compiles the step a second time, so that a piece of it
    has real examples. What is filled up to be divided between devices is left out of BatchNorm's statistics, which are
    those of the whole batch, over all devices.
    """
    mesh = mesh or make_mesh()
    counts = {config.optim.batch_size, len(dataset.labels) % config.optim.batch_size}
    loss_fn = make_finetune_loss(
        make_network(config, backbone.config),
        backbone.preprocessing,
        image_size,
        config.finetune.bn_statistics,
        config.optim.label_smoothing,
        mesh,
        has_fillers=any(count % mesh.size for count in counts),
    )
    step = make_finetune_step(loss_fn, tx, config.finetune.micro_batch, augmentation)
    find_fault = make_fault_finder(loss_fn, tx, config.finetune.micro_batch, augmentation)
    return step_runner(step, find_fault, dataset, order, mesh, fill_up=False)


def finetune_evaluator(
    backbone: Backbone,
    dataset: Dataset,
    image_size: int,
    precision: str,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., EvalResult]:
    """Evaluation of the network as it is now, with its running statistics, over all images.

    Returns:
      An `Evaluate` that takes a third argument, to be called with the number of examples done after each batch.
    """

    @jax.jit
    def step(now: tuple[Params, PyTree], batch: Batch) -> EvalSums:
        return logits_sums(_logits(backbone, *now, batch.inputs, image_size, precision), batch)

    on_images = image_evaluator(step, dataset, image_size, batch_size, mesh or make_mesh())
    return lambda params, batch_stats, on_examples=lambda _: None: on_images((params, batch_stats), on_examples)


def finetune_probabilities(
    backbone: Backbone,
    params: Params,
    batch_stats: PyTree,
    images_u8: UInt8[np.ndarray, "n 32 32 3"],
    image_size: int,
    precision: str,
) -> Float32[np.ndarray, "n classes"]:
    """Class probabilities of a few images by the network as it is now."""
    logits = jax.jit(partial(_logits, backbone, image_size=image_size, precision=precision))
    return np.asarray(jax.nn.softmax(logits(params, batch_stats, images_u8)))


def _logits(
    backbone: Backbone, params: Params, batch_stats: PyTree, images_u8: Array, image_size: int, precision: str
) -> Float[Array, "batch classes"]:
    now = backbone.replace(variables={"params": params["backbone"], "batch_stats": batch_stats})
    return head_logits(params["head"], extract(now, images_u8, image_size, precision))
