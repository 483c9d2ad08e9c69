"""The project's own backbone format: a safetensors file whose metadata describes the network."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict

from cifar_jax.errors import WeightsError
from cifar_jax.files import replacing, sha256_of_arrays
from cifar_jax.models.backbone import Backbone
from cifar_jax.models.preprocess import EvalTransform, Preprocessing
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained.merge import ParsedWeights

# The only metadata key: safetensors writes several keys in random order, and equal networks must make equal files.
KEY, FORMAT = "cifar_jax", "backbone 1"
TOP = "top/"  # name prefix of the classifier's tensors


def save_backbone(path: Path, backbone: Backbone, half: bool = False) -> str:
    """Writes a backbone atomically and returns the file's SHA-256; equal backbones make equal files.

    Tensors are named like `params/stage1_block1/conv1/kernel`. The metadata holds the configuration, the preprocessing,
    the image size and the evaluation transform, so loading needs no guesses. A classifier is stored as `top/kernel`,
    `top/bias`.

    Args:
      path: path of the file.
      backbone: the backbone to write.
      half: store kernels in float16, which halves the file; BatchNorm, whose variances may be tiny, stays float32.
    """
    content = to_bytes(backbone, half)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def to_bytes(backbone: Backbone, half: bool = False) -> bytes:
    """Serialises a backbone; see `save_backbone`."""
    # safetensors ignores the strides of a view, so arrays must be contiguous.
    tensors = {"/".join(at): np.ascontiguousarray(leaf) for at, leaf in flatten_dict(backbone.variables).items()}
    if half:
        tensors |= {name: leaf.astype(np.float16) for name, leaf in tensors.items() if name.endswith("/kernel")}
    tensors |= {f"{TOP}{name}": np.ascontiguousarray(leaf) for name, leaf in (backbone.top or {}).items()}
    about: dict[str, Any] = {
        "format": FORMAT,
        "config": dataclasses.asdict(backbone.config),
        "preprocessing": dataclasses.asdict(backbone.preprocessing),
        "image_size": backbone.image_size,
        "source": backbone.source,
        "variant": backbone.variant,
    }
    if backbone.transform != EvalTransform():  # left out otherwise, so that files and digests stay what they were
        about["transform"] = dataclasses.asdict(backbone.transform)
    return safetensors.numpy.save(tensors, {KEY: json.dumps(about | {"sha256": _digest(about, tensors)})})


def _digest(about: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of a file's metadata and tensors, because safetensors has no checksum of its own."""
    names = sorted(tensors)
    header = json.dumps([{key: about[key] for key in sorted(about) if key != "sha256"}, names], sort_keys=True)
    return hashlib.sha256((header + sha256_of_arrays(*(tensors[name] for name in names))).encode()).hexdigest()


class SafeFile(NamedTuple):
    """The content of a safetensors file of any origin."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


def read_safetensors(path: Path) -> SafeFile:
    """Reads all tensors and the metadata of a file.

    Raises:
      WeightsError: if the file is corrupt or truncated.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return SafeFile(tensors, file.metadata() or {})
    except (OSError, safetensors.SafetensorError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path} is not a valid safetensors file, or is truncated ({error}). Get a fresh copy of the file."
        ) from error


def is_ours(path: Path) -> bool:
    """Returns whether a file is in this project's own format; reads only its header."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return KEY in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


def parse_native(path: Path, file: SafeFile) -> ParsedWeights:
    """Parses the metadata of a file written by `save_backbone`.

    Raises:
      WeightsError: if the metadata is corrupt, or was not written by this project.
    """
    tensors, metadata = file.tensors, file.metadata
    if KEY not in metadata:
        raise WeightsError(
            f"{path} was not written by this project (its metadata has no {KEY!r}), and its tensor names are not those "
            "of a known ResNet. Use a file of this project, torchvision, timm or transformers."
        )
    try:
        about = json.loads(metadata[KEY])
        if about["format"] != FORMAT:
            raise ValueError(f"format is {about['format']!r}, expected {FORMAT!r}")
        config = ResNetConfig(**_tuples(about["config"]))
        preprocessing = Preprocessing(**_tuples(about["preprocessing"]))
        image_size = about["image_size"]
        if type(image_size) is not int or not 1 <= image_size <= 4096:
            raise ValueError(f"image_size must be 1 to 4096, got {image_size!r}")
        transform = EvalTransform(**about.get("transform", {}))
        variant, sha256 = str(about["variant"]), str(about["sha256"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} has invalid metadata ({error}). Get a fresh copy of the file.") from error
    intact = sha256 == _digest(about, tensors)
    return ParsedWeights(
        path,
        "ours",
        tensors,
        {tuple(name.split("/")): name for name in tensors if not name.startswith(TOP)},
        (f"{TOP}kernel", f"{TOP}bias"),
        config,
        preprocessing,
        image_size,
        variant,
        transform,
        refusal="" if intact else f"{path} is corrupt (checksum mismatch). Get a fresh copy of the file.",
    )


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Converts JSON's lists to the tuples of the frozen dataclasses."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
