"""The project's own form of a backbone: a safetensors file whose metadata says how it is run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict

from cifar_jax.files import replacing, sha256_of_file
from cifar_jax.preprocess import Preprocessing
from cifar_jax.pretrained.backbone import Backbone
from cifar_jax.pretrained.errors import WeightsError
from cifar_jax.pretrained.merge import merge
from cifar_jax.resnet import ResNetConfig

FORMAT = "cifar_jax backbone 1"


def save_backbone(path: Path, backbone: Backbone, half: bool = False) -> str:
    """Writes a backbone, whole or not at all, and returns the file's SHA-256.

    Tensors are named `params/stage1_block1/conv1/kernel`; the metadata holds the configuration, the preprocessing and
    the image size, so nothing has to be guessed when it is read.

    Args:
      path: of the file.
      backbone: to write.
      half: keep kernels in float16, which halves the file; BatchNorm, whose variances may be tiny, stays float32.
    """
    tensors = {"/".join(at): np.asarray(leaf) for at, leaf in flatten_dict(backbone.variables).items()}
    if half:
        tensors |= {name: leaf.astype(np.float16) for name, leaf in tensors.items() if name.endswith("/kernel")}
    metadata = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(backbone.config)),
        "preprocessing": json.dumps(dataclasses.asdict(backbone.preprocessing)),
        "image_size": str(backbone.image_size),
        "source": backbone.source,
        "variant": backbone.variant,
    }
    with replacing(path) as temporary:
        try:
            safetensors.numpy.save_file(tensors, temporary, metadata)
        except safetensors.SafetensorError as error:  # a full disk, as all that is written here can be written
            raise OSError(str(error)) from error
        return sha256_of_file(temporary)


def read_backbone(path: Path) -> Backbone:
    """Reads what `save_backbone` wrote.

    Raises:
      WeightsError: when the file is damaged, of another program, or its tensors do not fill the network it describes.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}); get the file again.") from error
    if metadata.get("format") != FORMAT:
        raise WeightsError(
            f"{path} was not written by this project (its metadata does not say {FORMAT!r}), so how to run it is not "
            "known; give a file that this project wrote."
        )
    try:
        config = ResNetConfig(**_tuples(json.loads(metadata["config"])))
        preprocessing = Preprocessing(**_tuples(json.loads(metadata["preprocessing"])))
        image_size = int(metadata["image_size"])
        if not 1 <= image_size <= 4096:
            raise ValueError(f"an image size of {image_size}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} has metadata that cannot be read ({error}); get the file again.") from error
    names = {tuple(name.split("/")): name for name in tensors}
    variables = merge(tensors, names, config, what=str(path))
    return Backbone(
        config,
        preprocessing,
        image_size,
        variables,
        sha256=sha256_of_file(path),
        source=str(path),
        variant=metadata.get("variant", ""),
    )


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where the frozen dataclasses have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
