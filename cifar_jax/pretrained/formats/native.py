"""The project's own form of a backbone: a safetensors file whose metadata says how it is run."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict

from cifar_jax.errors import WeightsError
from cifar_jax.files import replacing, sha256_of_arrays
from cifar_jax.models.backbone import Backbone
from cifar_jax.models.preprocess import Preprocessing
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained.reading import Reading, backbone_of

# The one key of the metadata. With several, safetensors would write them in another order each time, so that equal
# networks made unequal files.
KEY, FORMAT = "cifar_jax", "backbone 1"
TOP = "top/"  # in front of the names of the classifier's tensors, where the weights had one


def save_backbone(path: Path, backbone: Backbone, half: bool = False) -> str:
    """Writes a backbone, whole or not at all, and returns the file's SHA-256; equal backbones make equal files.

    Tensors are named `params/stage1_block1/conv1/kernel`; the metadata holds the configuration, the preprocessing and
    the image size, so nothing has to be guessed when it is read. A classifier goes along as `top/kernel`, `top/bias`.

    Args:
      path: of the file.
      backbone: to write.
      half: keep kernels in float16, which halves the file; BatchNorm, whose variances may be tiny, stays float32.
    """
    content = to_bytes(backbone, half)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def to_bytes(backbone: Backbone, half: bool = False) -> bytes:
    """The content of a backbone's file; see `save_backbone`."""
    # safetensors writes the bytes of a view as they lie, whatever its strides.
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
    return safetensors.numpy.save(tensors, {KEY: json.dumps(about | {"sha256": _digest(about, tensors)})})


def _digest(about: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over all that a file says and holds, as safetensors has no checksum of its own."""
    names = sorted(tensors)
    said = json.dumps([{key: about[key] for key in sorted(about) if key != "sha256"}, names], sort_keys=True)
    return hashlib.sha256((said + sha256_of_arrays(*(tensors[name] for name in names))).encode()).hexdigest()


@dataclass(frozen=True)
class SafeFile:
    """What a safetensors file holds, whoever wrote it."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


def read_safetensors(path: Path) -> SafeFile:
    """Reads all tensors of a file and what is said of them.

    Raises:
      WeightsError: when the file is damaged or cut short.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return SafeFile(tensors, file.metadata() or {})
    except (OSError, safetensors.SafetensorError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}); get the file again.") from error


def is_ours(path: Path) -> bool:
    """Whether a file is of this project's own form; nothing is read but its header."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return KEY in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


def read_backbone(path: Path) -> Backbone:
    """Reads what `save_backbone` wrote.

    Raises:
      WeightsError: when the file is damaged, of another program, or its tensors do not fill the network it describes.
    """
    return backbone_of(reading_of_ours(path, read_safetensors(path)))


def reading_of_ours(path: Path, file: SafeFile) -> Reading:
    """Tells what a file of this project holds; see `read_backbone`."""
    tensors, metadata = file.tensors, file.metadata
    if KEY not in metadata:
        raise WeightsError(
            f"{path} was not written by this project (its metadata has no {KEY!r}), and its tensors have the "
            "names of no known ResNet; give a file of this project, of timm or of transformers."
        )
    try:
        about = json.loads(metadata[KEY])
        if about["format"] != FORMAT:
            raise ValueError(f"it is {about['format']!r}, not {FORMAT!r}")
        config = ResNetConfig(**_tuples(about["config"]))
        preprocessing = Preprocessing(**_tuples(about["preprocessing"]))
        image_size = about["image_size"]
        if type(image_size) is not int or not 1 <= image_size <= 4096:
            raise ValueError(f"an image size of {image_size!r}")
        variant, sha256 = str(about["variant"]), str(about["sha256"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} has metadata that cannot be read ({error}); get the file again.") from error
    whole = sha256 == _digest(about, tensors)
    return Reading(
        path,
        "ours",
        tensors,
        {tuple(name.split("/")): name for name in tensors if not name.startswith(TOP)},
        (f"{TOP}kernel", f"{TOP}bias"),
        config,
        preprocessing,
        image_size,
        variant,
        refusal="" if whole else f"{path} is damaged: it does not have the digest kept inside it; get the file again.",
    )


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where the frozen dataclasses have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
