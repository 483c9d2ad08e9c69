"""A custom network: random convolutions and pooling, as a plain function instead of the ResNet.

`FunctionBackbone` takes any pure function `(variables, images uint8 [batch, 32, 32, 3]) -> features`. The function does
its own preprocessing, and needs neither Flax nor a weights file. In `cached` and `live` mode it is frozen; with
`mode="finetune"` all its variables are trained too. From a checkout, after `pip install .`:

    python examples/another_network.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax import FunctionBackbone, TrainConfig, load_run
from cifar_jax.config import preset
from cifar_jax.experiment import train


def random_convolutions(variables: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    """Random convolution and relu, averaged over each cell of a 4 x 4 grid."""
    x = images.astype(jnp.float32) / 127.5 - 1
    x = x - x.mean(axis=(1, 2), keepdims=True)
    x = jax.lax.conv_general_dilated(
        x, variables["kernel"], window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    batch, side, _, filters = x.shape
    fields = jax.nn.relu(x).reshape(batch, 4, side // 4, 4, side // 4, filters)
    return fields.mean(axis=(2, 4)).reshape(batch, -1)


def make_backbone(seed: int = 0, filters: int = 64) -> FunctionBackbone:
    """Makes a backbone with random 5x5 filters.

    NumPy draws the same bits on every device, which matters because a run is only resumed with the same filters.
    """
    kernel = np.random.default_rng(seed).normal(0, 0.2, (5, 5, 3, filters)).astype(np.float32)
    return FunctionBackbone(random_convolutions, {"kernel": kernel}, "random convolutions")


def main(config: TrainConfig | None = None) -> Path:
    """Trains a head on the network, by default with the demo preset, and returns the run directory."""
    backbone = make_backbone()
    run_dir = train(config or preset("demo"), backbone=backbone)
    print(load_run(run_dir, backbone=backbone))
    return run_dir


if __name__ == "__main__":
    main()
