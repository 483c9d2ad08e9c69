"""The inputs of a training job: the images, the backbone, and the size that images are upsampled to."""

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from cifar_jax.config import TrainConfig
from cifar_jax.config.option_groups import OF_A_PROCESS
from cifar_jax.data import Dataset, RunData, load_data
from cifar_jax.data.describe import class_warnings, shared_warning
from cifar_jax.data.pipeline import read_batches
from cifar_jax.errors import UserError
from cifar_jax.pretrained import UNTRAINED, AnyBackbone, Backbone, FunctionBackbone, load_backbone, random_backbone
from cifar_jax.pretrained.formats.safetensors_file import to_bytes
from cifar_jax.pretrained.random_init import calibration_images
from cifar_jax.rng import stream_key
from cifar_jax.runtime.multihost import require_same
from cifar_jax.runtime.progress import Progress
from cifar_jax.runtime.timing import Clock

logger = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """The inputs of a training job."""

    data: RunData
    backbone: AnyBackbone
    image_size: int  # side in pixels of the network's input

    def digests(self) -> dict[str, str]:
        """Digests, by name, of the inputs that determine the results."""
        names = {"train": "training images", "test": "test images", "val": "validation images"}
        images = {names[split]: digests.examples for split, digests in self.data.digests.items()}
        found = images | {"weights": self.backbone.sha256}
        if isinstance(self.backbone, FunctionBackbone):
            found["program"] = self.backbone.program_sha256
        return found


def load_inputs(config: TrainConfig, clock: Clock, progress: Progress, backbone: AnyBackbone | None = None) -> Inputs:
    """Loads the images and the backbone of a configuration; an untrained backbone is calibrated on the images.

    `backbone` replaces the one that the configuration names, `progress` shows downloads, and `clock` records the
    seconds of the phases `weights` and `data`.

    Raises:
      UserError: if either cannot be loaded, or they are incompatible.
    """
    untrained = backbone is None and config.backbone.weights in UNTRAINED
    if untrained and config.backbone.variant is not None:
        raise UserError(
            f"--variant {config.backbone.variant} is for pretrained weights; leave it out with --weights "
            f"{config.backbone.weights}."
        )
    # Weights first, so that a misspelt name fails before a data set is downloaded.
    with clock("weights"):
        if backbone is None and not untrained:
            weights, variant = config.backbone.weights, config.backbone.variant
            backbone = load_backbone(weights, variant, cache_dir=config.run.cache_dir, progress=progress)
    image_size = network_image_size(config, backbone)
    with clock("data"):
        data = load_data(config, image_size, backbone.transform if backbone else None)
    with clock("weights"):
        backbone = with_digest(backbone or make_untrained(config, data.train))
    return Inputs(data, backbone, image_size)


def with_digest(backbone: AnyBackbone) -> AnyBackbone:
    """The backbone with its SHA-256; if it has no file, that of the file that `save_backbone` would write."""
    if backbone.sha256 or isinstance(backbone, FunctionBackbone):
        return backbone
    return backbone.replace(sha256=hashlib.sha256(to_bytes(backbone)).hexdigest())


def make_untrained(config: TrainConfig, train: Dataset) -> Backbone:
    """Makes a random backbone calibrated on the training images, and logs a warning that it is untrained."""
    logger.warning(
        f"--weights {config.backbone.weights} is an UNTRAINED network: random kernels, BatchNorm statistics calibrated "
        "on training images. Its accuracy is a baseline, not transfer learning."
    )
    network, image_size = UNTRAINED[config.backbone.weights]
    image_size = config.backbone.image_size or image_size
    num = min(len(train.labels), calibration_images(image_size))
    # The pictures of a folder are in the order of their classes.
    rows = np.arange(num) if isinstance(train.images, np.ndarray) else np.arange(num) * len(train.labels) // num
    (images,) = read_batches(train.images, [rows])
    key = stream_key(config.optim.seed, "backbone")
    return random_backbone(key, images, network, image_size, f"{config.backbone.weights} (seed {config.optim.seed})")


def network_image_size(config: TrainConfig, backbone: AnyBackbone | None) -> int:
    """The side in pixels of the network's input; `backbone` is None for an untrained one, which is made later."""
    if isinstance(backbone, FunctionBackbone):
        return backbone.image_size
    own = UNTRAINED[config.backbone.weights][1] if backbone is None else backbone.image_size
    return config.backbone.image_size or own


def require_same_inputs_everywhere(config: TrainConfig, inputs: Inputs, parts: Mapping[str, str]) -> None:
    """Checks that all processes of a run have the same options, data and weights; file paths may differ.

    Raises:
      UserError: in all processes, naming the differences.
    """
    if (processes := jax.process_count()) == 1:
        return
    fewest = min(len(part.labels) for part in inputs.data.parts.values())
    if fewest < processes:
        raise UserError(f"{fewest} images cannot be divided between {processes} processes; use more images.")
    options = {k: v for k, v in config.to_json().items() if k not in ("weights", *OF_A_PROCESS)}
    data = {name: digest for name, digest in inputs.digests().items() if name not in ("weights", "program")}
    about = {"options": options | dict(parts), "data": data, "weights": inputs.backbone.sha256}
    require_same({name: json.dumps(value) for name, value in about.items()})


def warn_of_shared_images(data: RunData) -> None:
    """Logs a warning if any validation images are also training images."""
    if warning := shared_warning(data.train, data.val, data.val_name):
        logger.warning(warning)


def warn_of_classes(config: TrainConfig, data: RunData) -> None:
    """Logs warnings of uneven classes, unless they have weights, and of classes with few training images."""
    labels, weighted = np.asarray(data.train.labels), config.optim.class_weights != "none"
    for warning in class_warnings(labels, data.splits.class_names, weighted):
        logger.warning(warning)
