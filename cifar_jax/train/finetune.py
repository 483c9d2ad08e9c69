"""The backbone as a trainable function: BatchNorm statistics, frozen stages, and convolutions that are fast on CPUs."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, UInt8

from cifar_jax.config import TrainConfig
from cifar_jax.errors import UserError
from cifar_jax.models.backbone import AnyBackbone, Backbone, FunctionBackbone
from cifar_jax.models.preprocess import preprocess
from cifar_jax.models.resnet import ResNet, ResNetConfig
from cifar_jax.runtime.sharding import rows_sharding
from cifar_jax.train.optimizer import param_labels
from cifar_jax.train.task import TrainableFn


def make_network(config: TrainConfig, network: ResNetConfig, platform: str | None = None) -> ResNet:
    """The network configured for training on a JAX platform, the default backend's if None."""
    return ResNet(
        network,
        dtype=jnp.dtype(config.backbone.precision),
        bn_momentum=config.finetune.bn_momentum,
        # On a CPU, gradients of 3x3 convolutions are three to four times faster as matrix products.
        convs_as_dots=(platform or jax.default_backend()) == "cpu",
        frozen_stages=config.finetune.freeze_stages,
        remat=config.finetune.remat,
    )


def trainable(
    network: ResNet,
    backbone: Backbone,
    image_size: int,
    bn_statistics: str = "batch",
    mesh: Mesh | None = None,
    has_padding: bool = False,
) -> TrainableFn:
    """Makes the trainable backbone function of a `finetune_task`.

    In evaluation (`train=False`) it computes what `extract` does, with the current variables.

    Args:
      network: from `make_network`; its frozen stages get no gradient and keep their statistics.
      backbone: defines the preprocessing and the network used in evaluation.
      image_size: side in pixels that images are upsampled to.
      bn_statistics: `batch`: BatchNorm normalises by the batch statistics and updates the running ones to
        `momentum * old + (1 - momentum) * batch`, with the biased variance, as in Keras 3. `frozen`: BatchNorm uses
        its running statistics and does not update them.
      mesh: the devices that each micro-batch is sharded over; None leaves its placement unchanged.
      has_padding: whether batches may contain padding, which is then excluded from the BatchNorm statistics.
    """

    def features(
        params: PyTree, batch_stats: PyTree, images: UInt8[Array, "batch h w 3"], *, train: bool, mask: Array
    ) -> tuple[Float[Array, "batch features"], PyTree]:
        variables = {"params": params, "batch_stats": batch_stats}
        if not train:
            plain = ResNet(backbone.config, dtype=network.dtype)
            evaluated: Any = plain.apply(variables, preprocess(images, backbone.preprocessing, image_size), train=False)
            return evaluated.pooled, batch_stats
        # The backward pass skips frozen parameters.
        groups = param_labels({"backbone": params}, network.frozen_stages)["backbone"]
        variables["params"] = jax.tree.map(
            lambda leaf, group: jax.lax.stop_gradient(leaf) if group == "frozen" else leaf, params, groups
        )
        if mesh:
            images, mask = jax.lax.with_sharding_constraint((images, mask), rows_sharding(mesh))
        x = preprocess(images, backbone.preprocessing, image_size)
        if bn_statistics == "frozen":
            output: Any = network.apply(variables, x, train=False)
            return output.pooled, batch_stats
        real = mask > 0 if has_padding else None
        output, changed = network.apply(variables, x, train=True, real=real, mutable=["batch_stats"])
        return output.pooled, changed["batch_stats"]

    return features


def trainable_backbone(
    config: TrainConfig, backbone: AnyBackbone, image_size: int, mesh: Mesh | None = None, has_padding: bool = False
) -> tuple[dict[str, PyTree], TrainableFn]:
    """The variables {"params", "batch_stats"} and the function of the trainable backbone of a configuration.

    Raises:
      UserError: if a variable of a `FunctionBackbone` is not floating-point and so has no gradient.
    """
    if isinstance(backbone, FunctionBackbone):
        for path, leaf in jax.tree_util.tree_leaves_with_path(backbone.variables):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise UserError(
                    f"{backbone!r} cannot train: variables{jax.tree_util.keystr(path)} is {jnp.result_type(leaf)}, and "
                    "--mode finetune trains all variables; put it into the function, or use --mode cached or live."
                )

        def features(
            params: PyTree, batch_stats: PyTree, images: UInt8[Array, "batch h w 3"], *, train: bool, mask: Array
        ) -> tuple[Float[Array, "batch features"], PyTree]:
            return backbone.function(params, images), batch_stats

        return {"params": backbone.variables, "batch_stats": {}}, features
    network = make_network(config, backbone.config)
    variables = dict(backbone.variables)
    if config.finetune.zero_gamma:
        variables = with_zero_gamma(variables, config.finetune.freeze_stages)
    return variables, trainable(network, backbone, image_size, config.finetune.bn_statistics, mesh, has_padding)


def with_zero_gamma(variables: Mapping[str, PyTree], frozen_stages: int = 0) -> dict[str, PyTree]:
    """Zeroes the scale of each block's last BatchNorm, so that every block starts as its shortcut.

    Frozen stages keep their scales, as training could not change a zero there.

    Reference:
      Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 5.1
    """
    params = dict(variables["params"])
    groups = param_labels({"backbone": params}, frozen_stages)["backbone"]
    for name, part in params.items():
        if "bn3" in part and groups[name]["bn3"]["scale"] != "frozen":
            params[name] = part | {"bn3": part["bn3"] | {"scale": np.zeros_like(part["bn3"]["scale"])}}
    return dict(variables) | {"params": params}
