"""ResNet with bottleneck blocks (He et al. 2015, https://arxiv.org/abs/1512.03385) in flax.linen, without its top.

One module covers every published ResNet50; their differences are in `ResNetConfig`. All paddings are explicit, because
`SAME` at stride 2 pads one side only: published weights would load without an error and give different results.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Variables = dict[str, Any]  # {"params": ..., "batch_stats": ...}, nested dicts of float32 arrays


@dataclass(frozen=True)
class ResNetConfig:
    """The shape of the network and the details in which published ResNet50s differ. The defaults are Keras's.

    Attributes:
      stage_sizes: bottleneck blocks in each stage; (3, 4, 6, 3) is ResNet50.
      width: channels of the stem and of the first stage's 3x3 convolutions; stage s outputs `4 * width * 2**s`.
      stride_in_1x1: whether a stage's first block strides in its first 1x1 convolution (the paper, Keras) or in the
        3x3 (torchvision, "v1.5").
      conv_bias: whether convolutions have biases (Keras) or leave them to the following BatchNorm.
      bn_epsilon: epsilon added to the variance by every BatchNorm.
      pool_padding: zero padding of the max-pool: 1 (112 -> 56), or 0 to run Keras files of before 2018-08-31 as they
        were run then (112 -> 55).
    """

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    stride_in_1x1: bool = True
    conv_bias: bool = True
    bn_epsilon: float = 1.001e-5
    pool_padding: int = 1

    def __post_init__(self) -> None:
        """Refuses invalid values, which a corrupt file may contain."""
        counts = all(type(n) is int and n >= 1 for n in (self.width, *self.stage_sizes))
        flags = type(self.stride_in_1x1) is type(self.conv_bias) is bool and self.pool_padding in (0, 1)
        if not (counts and self.stage_sizes and flags and 0 < self.bn_epsilon < 1):
            raise ValueError(f"invalid network configuration {self}")

    @property
    def features(self) -> int:
        """Width of the pooled features: 2048 for ResNet50."""
        return 4 * self.width * 2 ** (len(self.stage_sizes) - 1)

    @property
    def downsampling(self) -> int:
        """Ratio of the input's side to that of the last stage: 32 for four stages."""
        return 2 ** (len(self.stage_sizes) + 1)


# Published networks by stage sizes.
DEPTHS: dict[tuple[int, ...], str] = {(3, 4, 6, 3): "ResNet50", (3, 4, 23, 3): "ResNet101", (3, 8, 36, 3): "ResNet152"}


def network_name(config: ResNetConfig) -> str:
    """Returns a display name such as `ResNet50`, with the width if it is not the default."""
    name = DEPTHS.get(config.stage_sizes, f"a ResNet with {config.stage_sizes} blocks")
    return f"{name} of width {config.width}" if config.width != ResNetConfig.width else name


class ResNetOutput(NamedTuple):
    """The network's outputs: the last activation of each stage, and the last stage's mean over positions."""

    stages: tuple[Float[Array, "batch h w c"], ...]
    pooled: Float[Array, "batch features"]


class ResNet(nn.Module):
    """The backbone: stem, stages of bottleneck blocks, global average pooling.

    Attributes:
      config: shape and variant.
      dtype: dtype of the activations, float32 or bfloat16; params and batch_stats stay float32.
      bn_momentum: decay of the running statistics per training step (Keras's 0.99).
      convs_as_dots: whether 3x3 convolutions run as matrix products over patches; the params are the same.
      frozen_stages: if positive, the stem and this many stages use fixed running statistics even with `train`.
      remat: whether to recompute a block's activations in the backward pass instead of storing them.
    """

    config: ResNetConfig
    dtype: jnp.dtype = jnp.dtype("float32")
    bn_momentum: float = 0.99
    convs_as_dots: bool = False
    frozen_stages: int = 0
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch size size 3"], train: bool = False, real: Bool[Array, "batch"] | None = None
    ) -> ResNetOutput:
        """Runs the network.

        Args:
          x: images from `preprocess`.
          train: whether BatchNorm uses and updates batch statistics (make `batch_stats` mutable).
          real: mask of the examples that count in batch statistics; all if None.
        """
        config = self.config
        trained = _Layers(config, self.dtype, self.bn_momentum, self.convs_as_dots, train)
        frozen = replace(trained, train=False)
        layers = frozen if self.frozen_stages else trained
        make_block = nn.remat(Bottleneck) if self.remat else Bottleneck
        x = x.astype(self.dtype)
        x = layers.conv(config.width, 7, 2, "stem_conv")(x)
        x = nn.relu(layers.norm("stem_bn")(x, real))
        # After a relu nothing is below zero, so Keras's zero padding and torch's -inf padding give the same maximum.
        pad = config.pool_padding
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((pad, pad), (pad, pad)))
        stages = []
        for stage, num_blocks in enumerate(config.stage_sizes):
            layers = frozen if stage < self.frozen_stages else trained
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = make_block(layers, config.width * 2**stage, stride, name=block_name(stage, block))(x, real)
            stages.append(x)
        return ResNetOutput(tuple(stages), jnp.mean(x, axis=(1, 2), dtype=jnp.float32))


def block_name(stage: int, block: int) -> str:
    """Returns the name of a block's module; the arguments count from zero, the name from one."""
    return f"stage{stage + 1}_block{block + 1}"


@dataclass(frozen=True)
class _Layers:
    """A factory for the layers of one network, so that shared settings are written once."""

    config: ResNetConfig
    dtype: jnp.dtype
    bn_momentum: float
    convs_as_dots: bool
    train: bool

    @property
    def precision(self) -> jax.lax.Precision:
        # Full float32 products: by default JAX uses TF32 on recent GPUs and bfloat16 passes on TPU.
        return jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def conv(self, features: int, size: int, stride: int, name: str) -> "Conv":
        """Returns a convolution padded by half its kernel size on every side."""
        as_dot = self.convs_as_dots and size == 3
        return Conv(features, size, stride, self.config.conv_bias, as_dot, self.dtype, self.precision, name=name)

    def conv1x1(self, features: int, name: str) -> nn.Dense:
        """Returns a 1x1 convolution as a matrix product over channels, which XLA:CPU runs much faster."""
        return nn.Dense(
            features,
            use_bias=self.config.conv_bias,
            dtype=self.dtype,
            precision=self.precision,
            name=name,
        )

    def norm(self, name: str) -> Callable[[Array, Array | None], Array]:
        """Returns a BatchNorm, always in float32: in bfloat16, `x - mean` would lose too many digits."""
        # use_fast_variance computes E[x^2] - E[x]^2, which cancels catastrophically if the mean is large.
        norm = nn.BatchNorm(
            use_running_average=not self.train,
            momentum=self.bn_momentum,
            epsilon=self.config.bn_epsilon,
            dtype=jnp.float32,
            use_fast_variance=False,
            name=name,
        )

        def normalise(x: Float[Array, "batch h w c"], real: Bool[Array, "batch"] | None) -> Float[Array, "batch h w c"]:
            mask = None if real is None else real[:, None, None, None]
            return norm(x.astype(jnp.float32), mask=mask).astype(self.dtype)

        return normalise


class Conv(nn.Module):
    """A convolution padded by half its kernel size on every side, with the params of `nn.Conv`.

    It runs as XLA's convolution, or as a matrix product over patches: with `as_dot`, and on feature maps smaller than
    the kernel, for which XLA:CPU falls back to a loop that is thirty times slower.
    """

    features: int
    size: int
    stride: int
    use_bias: bool
    as_dot: bool
    dtype: jnp.dtype
    precision: jax.lax.Precision

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h2 w2 features"]:
        """Runs the layer."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        if self.as_dot or min(x.shape[1:3]) < self.size:
            y = jnp.dot(patches(x, self.size, self.stride), kernel.reshape(-1, self.features), precision=self.precision)
        else:
            pad = self.size // 2
            padding = ((pad, pad), (pad, pad))
            layout = ("NHWC", "HWIO", "NHWC")
            strides = (self.stride, self.stride)
            y = jax.lax.conv_general_dilated(
                x, kernel, strides, padding, dimension_numbers=layout, precision=self.precision
            )
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), (self.features,)).astype(self.dtype)
        return y


class Bottleneck(nn.Module):
    """1x1 down to `features`, 3x3, 1x1 up to `4 * features`, and the shortcut, projected if the shape changes."""

    layers: _Layers
    features: int
    stride: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w c"], real: Bool[Array, "batch"] | None = None
    ) -> Float[Array, "batch h2 w2 c2"]:
        """Runs the block."""
        layers, out = self.layers, 4 * self.features
        first, second = (self.stride, 1) if layers.config.stride_in_1x1 else (1, self.stride)
        y = layers.conv1x1(self.features, "conv1")(subsample(x, first))
        y = nn.relu(layers.norm("bn1")(y, real))
        y = layers.conv(self.features, 3, second, "conv2")(y)
        y = nn.relu(layers.norm("bn2")(y, real))
        y = layers.norm("bn3")(layers.conv1x1(out, "conv3")(y), real)
        if self.stride > 1 or x.shape[-1] != out:
            x = layers.norm("bn_proj")(layers.conv1x1(out, "conv_proj")(subsample(x, self.stride)), real)
        return nn.relu(x + y)


def subsample(x: Float[Array, "batch h w c"], stride: int) -> Float[Array, "batch h2 w2 c"]:
    """Returns the positions of the input that a strided 1x1 convolution reads."""
    return x if stride == 1 else x[:, ::stride, ::stride]


def patches(x: Float[Array, "batch h w c"], size: int, stride: int) -> Float[Array, "batch h2 w2 size*size*c"]:
    """Returns the input patch of each output position of a convolution, in the order of the kernel's rows."""
    pad, (height, width) = size // 2, x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    shifts = [(i, j) for i in range(size) for j in range(size)]
    return jnp.concatenate([x[:, i : i + height : stride, j : j + width : stride] for i, j in shifts], axis=-1)
