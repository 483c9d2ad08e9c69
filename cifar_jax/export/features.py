"""Export of features to a file: of a data set's splits with their labels, or of image files."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.config import TrainConfig
from cifar_jax.data.resize import Resize
from cifar_jax.data.sources.images import read_image
from cifar_jax.errors import RunError, UserError
from cifar_jax.features.extraction import dataset_features
from cifar_jax.features.extractor import make_extractor
from cifar_jax.files import check_target, replacing
from cifar_jax.pretrained import UNTRAINED, AnyBackbone, load_backbone
from cifar_jax.runtime.progress import Reporter, Silent
from cifar_jax.runtime.timing import Clock
from cifar_jax.train.load_inputs import load_inputs, network_image_size

TRAINED_SIDE = 32  # side of the data sets' images in pixels
BATCH_SIZE = 1024  # image files in memory at a time


def is_data_set(sources: Sequence[str]) -> bool:
    """Whether the sources are the name of one data set rather than paths of image files."""
    return len(sources) == 1 and re.fullmatch(r"\w+", sources[0]) is not None and not os.path.isfile(sources[0])


def write_features(
    config: TrainConfig,
    out: str | Path,
    images: Sequence[str] = (),
    *,
    direct: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, str]:
    """Writes the features of image files or, if there are none, of the configuration's data set.

    An .npz file has `train_features`, `train_labels`, `test_features`, `test_labels` and `class_names` for a data set,
    or `features` and `paths` for image files, and about the backbone `backbone_sha256`, `backbone_source`,
    `preprocessing` (as JSON), `image_size` and `precision`. An .npy file has only the features of image files.

    Args:
      config: data set, backbone and settings of the extraction.
      out: the file to write, atomically.
      images: paths of image files.
      direct: whether to resize them directly to the network's input size instead of going through 32x32, the size of
        the data sets' images.
      overwrite: whether to replace an existing file.
      reporter: receives the progress.

    Returns:
      Descriptions of what was written, by name.

    Raises:
      UserError: if `out` is unsuitable, or the data set, images or weights cannot be loaded.
      RunError: if the file cannot be written, or the features are not finite.
    """
    path, reporter = Path(os.path.expanduser(out)), reporter or Silent()
    if path.suffix not in (".npz", ".npy"):
        raise UserError(f"--out must end in .npz or .npy, got {path}.")
    if path.suffix == ".npy" and not images:
        raise UserError(f"--out must end in .npz for a data set, as .npy cannot hold splits and labels, got {path}.")
    check_target(path, overwrite)
    backbone, arrays = _of_images(config, images, direct, reporter) if images else _of_data_set(config, reporter)
    about: dict[str, Any] = {
        "backbone_sha256": backbone.sha256,
        "backbone_source": backbone.source,
        "preprocessing": json.dumps(backbone.about()["preprocessing"]),
        "image_size": network_image_size(config, backbone),
        "precision": config.backbone.precision,
    }
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            if path.suffix == ".npy":
                np.save(file, arrays["features"])
            else:
                np.savez(file, **(about | arrays))
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error}); free disk space or choose another --out.") from error
    return _descriptions(path, arrays) | {name: str(value) for name, value in about.items()}


def _of_data_set(config: TrainConfig, reporter: Reporter) -> tuple[AnyBackbone, dict[str, np.ndarray]]:
    clock = Clock()
    (data, backbone, image_size) = load_inputs(config, clock, reporter.progress)
    parts, names = data.parts, {"train": "training images", "test": "test images"}
    digests = {name: data.digests[split].images for split, name in names.items()}
    datasets = {name: parts[split] for split, name in names.items()}
    features = dataset_features(
        config, backbone, image_size, datasets, digests=digests, reporter=reporter, clock=clock
    ).features
    return backbone, {
        "train_features": features["training images"],
        "train_labels": np.asarray(data.train.labels),
        "test_features": features["test images"],
        "test_labels": np.asarray(data.test.labels),
        "class_names": np.array(data.splits.class_names),
    }


def _of_images(
    config: TrainConfig, paths: Sequence[str], direct: bool, reporter: Reporter
) -> tuple[AnyBackbone, dict[str, np.ndarray]]:
    if config.backbone.weights in UNTRAINED:
        raise UserError(
            f"--weights {config.backbone.weights} needs a data set to calibrate on; give one, or other --weights."
        )
    backbone = load_backbone(
        config.backbone.weights, config.backbone.variant, cache_dir=config.run.cache_dir, progress=reporter.progress
    )
    image_size = network_image_size(config, backbone)
    resize = Resize("upsample", image_size if direct else TRAINED_SIDE)
    precision, batch_size = config.backbone.precision, config.backbone.extract_batch_size
    extractor = make_extractor(backbone, image_size, precision, batch_size, num_images=len(paths))
    features = np.empty((len(paths), backbone.num_features), np.float32)
    with reporter.progress("Features of image files", len(paths), compiles=True) as bar:
        bar(0)
        for start in range(0, len(paths), BATCH_SIZE):
            images = np.stack([read_image(path, resize) for path in paths[start : start + BATCH_SIZE]])
            features[start : start + len(images)] = extractor(images)
            bar(start + len(images))
    return backbone, {"features": features, "paths": np.array(paths)}


def _descriptions(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    def shape(array: np.ndarray) -> str:
        return " x ".join(f"{size:,}" for size in array.shape)

    if path.suffix == ".npy":
        return {"file": f"{path}, {shape(arrays['features'])} {arrays['features'].dtype}"}
    return {"file": str(path)} | {name: f"{shape(array)} {array.dtype}" for name, array in arrays.items()}
