"""Features in a file, for use elsewhere: of a data set's splits with their labels, or of image files."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.config import TrainConfig
from cifar_jax.data.sources.images import read_image
from cifar_jax.errors import RunError, UserError
from cifar_jax.features.dataset import dataset_features
from cifar_jax.features.extractor import make_extractor
from cifar_jax.files import replacing
from cifar_jax.pretrained import UNTRAINED, AnyBackbone, load_backbone
from cifar_jax.runs.predict import TRAINED_SIDE
from cifar_jax.runtime.reporter import Reporter, Silent
from cifar_jax.runtime.timing import Clock
from cifar_jax.train.inputs import load_inputs, network_image_size

AT_ONCE = 1024  # image files that are in memory together


def is_data_set(sources: Sequence[str]) -> bool:
    """Whether the sources are the name of one data set; otherwise they are image files."""
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
    """Writes the features of image files, or without any those of the data set of a configuration.

    An .npz holds `train_features`, `train_labels`, `test_features`, `test_labels` and `class_names` of a data set, or
    `features` and `paths` of image files; and of the backbone `backbone_sha256`, `backbone_source`, `preprocessing` (as
    JSON), `image_size` and `precision`. An .npy holds nothing but the features of image files.

    Args:
      config: says which data set and backbone, and how they are run.
      out: the file to write, whole or not at all.
      images: paths of image files.
      direct: resize them straight to the network's size, not through 32x32 as the images of the data sets.
      overwrite: replace a file that is there.
      reporter: who is told about it.

    Returns:
      What was written, in words, by name.

    Raises:
      UserError: when the file cannot be, or what goes into it cannot be had.
      RunError: when it cannot be written, or the features are not finite.
    """
    path, reporter = Path(os.path.expanduser(out)), reporter or Silent()
    _check_target(path, bool(images), overwrite)
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
        raise RunError(f"{path} cannot be written ({error}); make room or choose another --out.") from error
    return _in_words(path, arrays) | {name: str(value) for name, value in about.items()}


def _check_target(path: Path, of_images: bool, overwrite: bool) -> None:
    """Finds out before any work is done whether the file can be written."""
    if path.suffix not in (".npz", ".npy"):
        raise UserError(f"--out {path} ends in neither .npz nor .npy; name it so.")
    if path.suffix == ".npy" and not of_images:
        raise UserError(f"--out {path} would hold one matrix, and a data set has splits and labels; name an .npz file.")
    if os.path.isdir(path) or not os.path.isdir(path.parent):
        raise UserError(f"--out {path} cannot be a file: it is a directory, or its own is not there; name another.")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"--out {path} is there already; give --overwrite to replace it.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {path} cannot be written, as {path.parent} is read-only; choose another directory.")


def _of_data_set(config: TrainConfig, reporter: Reporter) -> tuple[AnyBackbone, dict[str, np.ndarray]]:
    clock = Clock()
    (problem, backbone, image_size) = load_inputs(config, clock, reporter.progress)
    parts, names = problem.parts, {"train": "training images", "test": "test images"}
    digests = {name: problem.digests[split].images for split, name in names.items()}
    datasets = {name: parts[split] for split, name in names.items()}
    how: dict[str, Any] = {"digests": digests, "reporter": reporter, "started": clock.started}
    features = dataset_features(config, backbone, image_size, datasets, **how).features
    return backbone, {
        "train_features": features["training images"],
        "train_labels": np.asarray(problem.train.labels),
        "test_features": features["test images"],
        "test_labels": np.asarray(problem.test.labels),
        "class_names": np.array(problem.splits.class_names),
    }


def _of_images(
    config: TrainConfig, paths: Sequence[str], direct: bool, reporter: Reporter
) -> tuple[AnyBackbone, dict[str, np.ndarray]]:
    if config.backbone.weights in UNTRAINED:
        raise UserError(
            f"--weights {config.backbone.weights} is made from the images of a data set; name one, or others."
        )
    backbone = load_backbone(
        config.backbone.weights, config.backbone.variant, cache_dir=config.run.cache_dir, progress=reporter.progress
    )
    image_size = network_image_size(config, backbone)
    side = image_size if direct else TRAINED_SIDE
    extractor = make_extractor(backbone, image_size, config.backbone.precision, config.backbone.extract_batch_size)
    features = np.empty((len(paths), backbone.num_features), np.float32)
    with reporter.progress("Features of image files", len(paths), compiles=True) as bar:
        bar(0)
        for start in range(0, len(paths), AT_ONCE):
            images = np.stack([read_image(path, side) for path in paths[start : start + AT_ONCE]])
            features[start : start + len(images)] = extractor(images)
            bar(start + len(images))
    return backbone, {"features": features, "paths": np.array(paths)}


def _in_words(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    def shape(array: np.ndarray) -> str:
        return " x ".join(f"{size:,}" for size in array.shape)

    if path.suffix == ".npy":
        return {"file": f"{path}, {shape(arrays['features'])} {arrays['features'].dtype}"}
    return {"file": str(path)} | {name: f"{shape(array)} {array.dtype}" for name, array in arrays.items()}
