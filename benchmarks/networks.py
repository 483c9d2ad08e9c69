"""The networks that all peers run, from one seed: a ResNet50 as torchvision builds it, and one as Keras does.

They stride and bias differently, so a peer is compared with ours of its own kind. The weights are random, their
BatchNorm statistics those of real images: what a network computes does not change how long it takes, but dead features
would agree about everything.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

IMAGE_SIZE = 224
KINDS = ("torchvision", "keras")


class Networks(NamedTuple):
    """Files of the same networks: this project's own by kind, and what the other libraries load."""

    ours: dict[str, Path]
    torchvision: Path
    keras: Path


def networks_in(directory: Path) -> Networks:
    """Where `write_networks` puts them."""
    ours = {kind: directory / f"{kind}.safetensors" for kind in KINDS}
    return Networks(ours, directory / "state_dict.safetensors", directory / "weights.h5")


def write_networks(directory: Path, images_u8: np.ndarray, tiny: bool = False) -> Networks:
    """Makes the networks and writes their files.

    Args:
      directory: where to.
      images_u8: uint8 [n, 32, 32, 3], which BatchNorm is calibrated on.
      tiny: two narrow blocks for a test, which no other library builds; only the files of this project are written.
    """
    import jax

    from cifar_jax import random_backbone, save_backbone
    from cifar_jax.pretrained.convert import convert
    from cifar_jax.pretrained.variants import VARIANTS

    files = networks_in(directory)
    for kind, path in files.ours.items():
        config = VARIANTS[kind].config
        config = replace(config, stage_sizes=(1, 1), width=4) if tiny else config
        image_size = 32 if tiny else IMAGE_SIZE
        backbone = random_backbone(jax.random.key(0), images_u8, config, image_size)
        save_backbone(path, as_for_keras(backbone) if kind == "keras" else backbone)
    if not tiny:
        convert(files.ours["torchvision"], files.torchvision, "torchvision")
        convert(files.ours["keras"], files.keras, "keras")
    return files


def as_for_keras(backbone: Any) -> Any:
    """The same network but for a constant, for pixels that went through Keras's preprocessing: BGR, not scaled.

    `random_backbone` has calibrated it for RGB divided by 255 and by ImageNet's deviation, so its first kernel does
    that now.
    """
    from cifar_jax.models.preprocess import CAFFE, TORCH

    params = backbone.variables["params"]
    kernel = params["stem_conv"]["kernel"] / (TORCH.scale * np.asarray(TORCH.std, np.float32))[:, None]
    params = params | {"stem_conv": params["stem_conv"] | {"kernel": np.ascontiguousarray(kernel[:, :, ::-1])}}
    return backbone.replace(variables=backbone.variables | {"params": params}, preprocessing=CAFFE)
