"""The frozen network for inference: BatchNorm and biases folded into kernels, each layer in its fastest form.

The results must equal those of `models.backbone.extract`. The fastest form depends on the platform, which is an
argument: a choice made while tracing would bake this machine's platform into a program exported for another.

Measured on a CPU with AVX-512 at 224 pixels in float32, as a ratio to the time of a matrix product with the same FLOPs:

| output side | 3x3 as `lax.conv` | 3x3 as a product over patches |
|---|---|---|
| 14 (4 images) | 1.15 | 1.30 |
| 7 (4 images) | 1.82 | 1.31 |
| 7 (16 images) | 1.66 | 1.18 |

So patches are used on CPUs for small feature maps. The max-pool as maxima of strided slices took 2.8 ms per image
including the stem, compared with 3.7 ms for `reduce_window` (two images at a time; at four they were equal). A batch
size per stage (2, 2, 8, 8) gained 7 % over four images throughout, too little for its complexity.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from cifar_jax.errors import RunError
from cifar_jax.models.backbone import Backbone
from cifar_jax.models.preprocess import Preprocessing, preprocess
from cifar_jax.models.resnet import ResNetConfig, block_name, patches, subsample

SMALL_MAP = 8  # pixels; on CPUs, 3x3 convolutions with outputs of at most this side run as products over patches

Activation = Float[Array, "batch h w c"]


class Layer(NamedTuple):
    """A convolution with folded BatchNorm: kernel [h, w, in, out], or [in, out] for 1x1, and bias [out]."""

    kernel: Float[Array, "..."]
    bias: Float[Array, "out"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prepared:
    """A network prepared for inference, as a pytree: the layers are leaves, everything else is static.

    Attributes:
      layers: layers by module name: `stem`, `stage1_block1` -> {conv1, conv2, conv3, conv_proj}.
      config: the network.
      preprocessing: the preprocessing of its input.
      image_size: side in pixels that images are upsampled to.
      platform: platform to run on: `cpu`, `gpu` or `tpu`.
    """

    layers: Mapping[str, Any]
    config: ResNetConfig = field(metadata={"static": True})
    preprocessing: Preprocessing = field(metadata={"static": True})
    image_size: int = field(metadata={"static": True})
    platform: str = field(metadata={"static": True})


def prepare(
    backbone: Backbone, image_size: int | None = None, precision: str = "float32", platform: str = "cpu"
) -> Prepared:
    """Folds a backbone's BatchNorm and biases into its kernels, in float64 on the host.

    Args:
      backbone: a backbone from `load_backbone`.
      image_size: side in pixels that images are upsampled to; the backbone's own if None.
      precision: dtype of kernels and activations, `float32` or `bfloat16`; sums and biases are always float32.
      platform: platform to run on.

    Raises:
      RunError: if a folded value is not finite in that precision; a relu could silently turn the NaN into 0.
    """
    params, stats = backbone.variables["params"], backbone.variables["batch_stats"]
    epsilon, dtype = backbone.config.bn_epsilon, jnp.dtype(precision)
    pairs = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "conv_proj": "bn_proj"}
    layers: dict[str, Any] = {"stem": _fold(params["stem_conv"], params["stem_bn"], stats["stem_bn"], epsilon, dtype)}
    for name in params.keys() - {"stem_conv", "stem_bn"}:
        block = params[name]
        layers[name] = {
            conv: _fold(block[conv], block[norm], stats[name][norm], epsilon, dtype)
            for conv, norm in pairs.items()
            if conv in block
        }
    _require_finite(layers, backbone.source)
    return Prepared(layers, backbone.config, backbone.preprocessing, image_size or backbone.image_size, platform)


def _require_finite(layers: Mapping[str, Any], source: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(layers):
        if not np.isfinite(leaf).all():
            raise RunError(
                f"The backbone {source} overflows in {jax.tree_util.keystr(path, simple=True, separator='/')} when its "
                "BatchNorm is folded into the kernels. Get a fresh copy of its weights."
            )


def _fold(
    conv: Mapping[str, Any], norm: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float, dtype: Any
) -> Layer:
    """Folds `(conv(x) + bias - mean) * scale / sqrt(var + epsilon) + shift` into one kernel and one bias."""
    scale = np.float64(norm["scale"]) / np.sqrt(np.float64(stats["var"]) + epsilon)
    bias = np.float64(norm["bias"]) + (np.float64(conv.get("bias", 0.0)) - np.float64(stats["mean"])) * scale
    with np.errstate(over="ignore"):  # `prepare` reports overflows by layer
        return Layer((np.float64(conv["kernel"]) * scale).astype(dtype), bias.astype(np.float32))


def features_of(prepared: Prepared, images_u8: UInt8[Array, "batch h w 3"]) -> Float[Array, "batch features"]:
    """Computes the pooled float32 features of one batch; pure, so it can be jitted, exported or sharded by batch."""
    layers, config = prepared.layers, prepared.config
    dtype = layers["stem"].kernel.dtype
    x = preprocess(images_u8, prepared.preprocessing, prepared.image_size).astype(dtype)
    x = _relu(_conv(x, layers["stem"], 2), dtype)
    x = _max_pool(x, config.pool_padding, prepared.platform)
    for (stage, block), stride in block_strides(config).items():
        x = _block(x, layers[block_name(stage, block)], stride, prepared.platform)
    return jax.lax.stop_gradient(jnp.mean(x, axis=(1, 2), dtype=jnp.float32))


def block_strides(config: ResNetConfig) -> dict[tuple[int, int], int]:
    """Returns the stride of each block's 3x3 convolution and shortcut, by (stage, block), in order.

    If a stage begins with a 1x1 convolution of stride 2, as in Keras's networks, that convolution and its shortcut read
    only a quarter of the previous block's outputs. Here the previous block computes only those, by striding in its 3x3
    and its shortcut instead. This saves a tenth of all multiplications and leaves the result unchanged.
    """
    strides = {}
    for stage, num_blocks in enumerate(config.stage_sizes):
        for block in range(num_blocks):
            narrows = stage > 0 and block == 0
            if config.stride_in_1x1:
                narrows = block == num_blocks - 1 and stage < len(config.stage_sizes) - 1
            strides[stage, block] = 2 if narrows else 1
    return strides


def _block(x: Activation, layers: Mapping[str, Layer], stride: int, platform: str) -> Activation:
    y = _relu(_dot(x, layers["conv1"]), x.dtype)
    y = _relu(_conv(y, layers["conv2"], stride, platform), x.dtype)
    shortcut = subsample(x, stride)
    if "conv_proj" in layers:
        # Cast to the activations' dtype: it is as large as the block's output, and bfloat16 halves the memory traffic.
        shortcut = _dot(shortcut, layers["conv_proj"]).astype(x.dtype)
    return _relu(_dot(y, layers["conv3"]) + shortcut.astype(jnp.float32), x.dtype)


def _relu(x: Float[Array, "batch h w c"], dtype: Any) -> Activation:
    return jnp.maximum(x, 0).astype(dtype)


def _precision(x: Array) -> jax.lax.Precision:
    # Full float32 products: by default JAX uses TF32 on recent GPUs and bfloat16 passes on TPU.
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _dot(x: Activation, layer: Layer) -> Float[Array, "batch h w out"]:
    kernel = layer.kernel.reshape(-1, layer.kernel.shape[-1])
    return jnp.dot(x, kernel, precision=_precision(x), preferred_element_type=jnp.float32) + layer.bias


def _conv(x: Activation, layer: Layer, stride: int, platform: str = "") -> Float[Array, "batch h w out"]:
    """Applies a convolution padded by half its kernel size on every side."""
    size = layer.kernel.shape[0]
    # On feature maps smaller than the kernel XLA:CPU falls back to a loop that is thirty times slower.
    if (platform == "cpu" and -(-x.shape[1] // stride) <= SMALL_MAP) or min(x.shape[1:3]) < size:
        return _dot(patches(x, size, stride), layer)
    pad = size // 2
    y = jax.lax.conv_general_dilated(
        x,
        layer.kernel,
        (stride, stride),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_precision(x),
        preferred_element_type=jnp.float32,
    )
    return y + layer.bias


def _max_pool(x: Activation, pad: int, platform: str) -> Activation:
    """Applies a 3x3 max-pool of stride 2; zero padding is safe because nothing is below zero after a relu."""
    if platform != "cpu":
        # With -inf as an array, JAX would not recognise this as a max-pool.
        padding = ((0, 0), (pad, pad), (pad, pad), (0, 0))
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = ((side - 3) // 2 * 2 + 1 for side in x.shape[1:3])
    x = jnp.maximum(jnp.maximum(*(x[:, :, at : at + width : 2] for at in (0, 1))), x[:, :, 2 : 2 + width : 2])
    return jnp.maximum(jnp.maximum(*(x[:, at : at + height : 2] for at in (0, 1))), x[:, 2 : 2 + height : 2])
