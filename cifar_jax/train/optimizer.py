"""The optimiser of a run, composed from Optax, and the names of what it trains."""

import re

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from cifar_jax.config import TrainConfig


def make_schedule(config: TrainConfig, peak: float, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate by step: constant, or a linear warm-up to `peak` and from there a cosine that ends at zero.

    Reference:
      Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983; warm-up: Goyal et al. 2017,
      https://arxiv.org/abs/1706.02677
    """
    if config.optim.schedule == "constant":
        return optax.constant_schedule(peak)
    steps = config.optim.epochs * steps_per_epoch
    # The last step lies below `epochs`, so at least one is left to the cosine.
    warmup = min(round(config.optim.warmup_epochs * steps_per_epoch), steps - 1)
    if warmup:
        schedule = optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, steps)
    else:
        schedule = optax.cosine_decay_schedule(peak, steps)
    # Optax divides the count as it comes, which strict dtype promotion does not let it do with an integer.
    return lambda count: schedule(jnp.asarray(count, jnp.float32))


def make_optimizer(
    config: TrainConfig, steps_per_epoch: int, instead: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """SGD as Keras has it, with what the configuration adds: clipping, weight decay, momentum, a schedule, groups.

    Keras folds the learning rate into its velocity and Optax multiplies by it afterwards; with a constant rate both
    take the same steps.

    Args:
      config: its options. The parameters are {"head"}, or in the mode finetune {"backbone", "head"}, each group with a
        rate of its own, and what is frozen is left alone.
      steps_per_epoch: what the schedule counts in.
      instead: an optimiser in the place of SGD and of all that is added to it; what is frozen stays so.
    """
    optim = config.optim
    if instead is not None:
        if not config.finetune.freeze_stages:
            return instead

        # As one group: what it does over all parameters, as clipping by their norm, it does over all that train.
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
    # Over all groups at once: the norm of a step does not depend on how it is divided.
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), tx) if optim.clip_norm else tx


def is_kernel(params: PyTree) -> PyTree:
    """Which parameters weight decay is for: kernels, neither biases nor BatchNorm's scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path[-1]) == "kernel", params)


def param_labels(params: PyTree, freeze_stages: int) -> PyTree:
    """The group of each parameter of {"backbone", "head"}, by its name: `backbone`, `head` or `frozen`.

    Args:
      params: the parameters.
      freeze_stages: the stem and that many stages are frozen; at 0 nothing is.

    Raises:
      ValueError: for a parameter whose name belongs to no part of the network.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _label([_name(key) for key in path], freeze_stages), params)


def _label(path: list[str], freeze_stages: int) -> str:
    if path[0] == "head" or (path[0] == "backbone" and not freeze_stages):
        return path[0]
    part = re.match(r"stem_|stage(\d+)_block", path[1]) if path[0] == "backbone" and len(path) > 1 else None
    if part is None:
        raise ValueError(f"the parameter {'/'.join(path)} belongs to no part of the network")
    # The stem goes with the first stage: below a trained stem no frozen stage makes sense.
    return "frozen" if int(part[1] or 1) <= freeze_stages else "backbone"


def _name(key: object) -> str:
    return str(getattr(key, "key", getattr(key, "idx", "")))
