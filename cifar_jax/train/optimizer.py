"""The optimiser of a run, composed from Optax transformations, and the labels of its parameter groups."""

import re

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from cifar_jax.config import TrainConfig


def make_schedule(config: TrainConfig, peak: float, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate by step: constant, or a linear warm-up to `peak` followed by cosine decay to zero.

    Reference:
      Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983; warm-up: Goyal et al. 2017,
      https://arxiv.org/abs/1706.02677
    """
    if config.optim.schedule == "constant":
        return optax.constant_schedule(peak)
    steps = config.optim.epochs * steps_per_epoch
    # Leave at least one step to the cosine.
    warmup = min(round(config.optim.warmup_epochs * steps_per_epoch), steps - 1)
    if warmup:
        schedule = optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, steps)
    else:
        schedule = optax.cosine_decay_schedule(peak, steps)
    # Optax divides the count without converting it, which strict dtype promotion forbids for an integer.
    return lambda count: schedule(jnp.asarray(count, jnp.float32))


def make_optimizer(
    config: TrainConfig, steps_per_epoch: int, instead: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """Makes Keras's SGD with the configured clipping, weight decay, momentum, schedule and parameter groups.

    Keras folds the learning rate into its velocity, whereas Optax multiplies by it afterwards; with a constant rate
    both take the same steps.

    Args:
      config: the configuration. The parameters are {"head"}, or in `finetune` mode {"backbone", "head"}, each group
        with its own learning rate; frozen parameters are not updated.
      steps_per_epoch: number of steps per epoch, for the schedule.
      instead: an optimiser that replaces SGD and everything added to it; frozen parameters remain frozen.
    """
    optim = config.optim
    if instead is not None:
        if not config.finetune.freeze_stages:
            return instead

        # One group, so that an operation over all parameters, such as clipping by global norm, covers all trained ones.
        def labels(params: PyTree) -> PyTree:
            groups = param_labels(params, config.finetune.freeze_stages)
            return jax.tree.map(lambda group: group if group == "frozen" else "trained", groups)

        return optax.partition({"trained": instead, "frozen": optax.set_to_zero()}, labels)

    def sgd(rate: float) -> optax.GradientTransformation:
        descent = optax.sgd(
            make_schedule(config, rate, steps_per_epoch) if optim.schedule != "constant" else rate,
            momentum=optim.momentum or None,
            nesterov=optim.nesterov,
        )
        decay = [optax.add_decayed_weights(optim.weight_decay, mask=is_kernel)] if optim.weight_decay else []
        return optax.chain(*decay, descent)

    tx = sgd(optim.learning_rate)
    if optim.mode == "finetune":
        groups = {
            "head": tx,
            "backbone": sgd(config.finetune.backbone_learning_rate or optim.learning_rate),
            "frozen": optax.set_to_zero(),
        }
        tx = optax.partition(groups, lambda params: param_labels(params, config.finetune.freeze_stages))
    # Clip outside the partition: the global norm covers all groups.
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), tx) if optim.clip_norm else tx


def is_kernel(params: PyTree) -> PyTree:
    """Mask of the parameters that weight decay applies to: kernels, but not biases or BatchNorm scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path[-1]) == "kernel", params)


def param_labels(params: PyTree, freeze_stages: int) -> PyTree:
    """Labels each parameter of {"backbone", "head"} with its group: `backbone`, `head` or `frozen`.

    Args:
      params: the parameters.
      freeze_stages: number of frozen stages, in addition to the stem; 0 freezes nothing.

    Raises:
      ValueError: if the name of a parameter belongs to no part of the network.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _label([_name(key) for key in path], freeze_stages), params)


def _label(path: list[str], freeze_stages: int) -> str:
    if path[0] == "head" or (path[0] == "backbone" and not freeze_stages):
        return path[0]
    part = re.match(r"stem_|stage(\d+)_block", path[1]) if path[0] == "backbone" and len(path) > 1 else None
    if part is None:
        raise ValueError(f"the parameter {'/'.join(path)} belongs to no part of the network")
    # The stem is frozen with the first stage: a frozen stage above a trained stem makes no sense.
    return "frozen" if int(part[1] or 1) <= freeze_stages else "backbone"


def _name(key: object) -> str:
    return str(getattr(key, "key", getattr(key, "idx", "")))
