"""Export of features to a file: of a data set's splits with their labels, or of image files."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import Dataset
from cifar_jax.data.load import kind_of
from cifar_jax.data.pictures import resized, sizes_of
from cifar_jax.data.resize import Resize, choose_resize
from cifar_jax.data.sources.folder import fingerprinted, is_divided_by_class
from cifar_jax.data.sources.images import SUFFIXES
from cifar_jax.data.sources.paths import STDIN, is_pattern
from cifar_jax.errors import RunError, UserError
from cifar_jax.features.extraction import dataset_features
from cifar_jax.files import check_target, replacing
from cifar_jax.pretrained import UNTRAINED, AnyBackbone, load_backbone
from cifar_jax.runtime.progress import Reporter, Silent
from cifar_jax.runtime.timing import Clock
from cifar_jax.train.load_inputs import load_inputs, network_image_size

SHOWN = 5  # files that a message lists
# Of each split: its images in messages.
SPLITS = {"train": "training images", "test": "test images", "val": "validation images"}

logger = logging.getLogger(__name__)


def is_data_set(sources: Sequence[str]) -> bool:
    """Whether sources are one data set with labels rather than image files.

    A folder that has pictures directly in it is a list of images; one that has only folders, several of them or one of
    training images, is a data set. Whatever else `kind_of` knows is one too.

    Raises:
      UserError: if a folder cannot be read, or an .npz file does not exist.
    """
    (source, *more) = sources
    if more or source == STDIN or is_pattern(source):
        return False
    try:
        kind = kind_of(source)
    except UserError:
        if Path(source).suffix == ".npz":
            raise
        return False  # a file, or the path of a missing one
    if kind == "folder":
        return is_divided_by_class(Path(os.path.expanduser(source)))
    # What does not exist is the name of a TFDS set, unless it looks like that of a picture.
    return kind != "tfds" or not source.lower().endswith(SUFFIXES)


class _Extracted(NamedTuple):
    """Arrays to write, and where they come from."""

    arrays: dict[str, np.ndarray]
    backbone: AnyBackbone
    resize: Resize
    source: str


def write_features(
    config: TrainConfig,
    out: str | Path,
    images: Sequence[str] = (),
    *,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, str]:
    """Writes the features of image files or, if there are none, of the configuration's data set.

    An .npz file has `train_features`, `train_labels`, `test_features`, `test_labels`, the same of `val` where the set
    has validation images of its own, and `class_names` for a data set, or `features` and `paths` for image files, and
    about the backbone `backbone_sha256`, `backbone_source`, `preprocessing` and `resize` (as JSON), `image_size` and
    `precision`. An .npy file has only the features of image files.

    Args:
      config: data set, backbone, resize and settings of the extraction.
      out: the file to write, atomically.
      images: paths of image files. They are resized as those of a data set of the same pictures would be.
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
    arrays, backbone, resize, source = (
        _of_images(config, images, reporter) if images else _of_data_set(config, reporter)
    )
    image_size = network_image_size(config, backbone)
    about: dict[str, Any] = {
        "backbone_sha256": backbone.sha256,
        "backbone_source": backbone.source,
        "preprocessing": json.dumps(backbone.about()["preprocessing"]),
        "resize": json.dumps(resize.to_json()),
        "image_size": image_size,
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
    described = {"source": source} | _descriptions(path, arrays) | {name: str(value) for name, value in about.items()}
    return described | {"resize": resize.words(image_size)}


def _of_data_set(config: TrainConfig, reporter: Reporter) -> _Extracted:
    clock = Clock()
    (data, backbone, image_size) = load_inputs(config, clock, reporter.progress)
    features = dataset_features(
        config,
        backbone,
        image_size,
        {SPLITS[split]: part for split, part in data.parts.items()},
        digests={SPLITS[split]: data.digests[split].images for split in data.parts},
        reporter=reporter,
        clock=clock,
    ).features
    arrays = {}
    for split, part in data.parts.items():
        arrays[f"{split}_features"] = features[SPLITS[split]]
        arrays[f"{split}_labels"] = np.asarray(part.labels)
    names = data.splits.class_names
    notes = "".join(f"; {note}" for note in data.splits.notes)
    source = f"data set {config.data.dataset}, {len(names):,} classes{notes}"
    return _Extracted(arrays | {"class_names": np.array(names)}, backbone, data.resize, source)


def _of_images(config: TrainConfig, paths: Sequence[str], reporter: Reporter) -> _Extracted:
    if config.backbone.weights in UNTRAINED:
        raise UserError(
            f"--weights {config.backbone.weights} needs a data set to calibrate on; give one, or other --weights."
        )
    backbone = load_backbone(
        config.backbone.weights, config.backbone.variant, cache_dir=config.run.cache_dir, progress=reporter.progress
    )
    image_size = network_image_size(config, backbone)
    pictures, skipped = fingerprinted([(path, 0) for path in paths], config.data.skip_unreadable)
    if skipped and not len(pictures.labels):
        raise UserError(f"None of the {len(skipped):,} images can be read.")
    data = config.data
    resize = choose_resize(data.resize, data.interpolation, sizes_of(pictures.images), image_size, backbone.transform)
    files = Dataset(resized(pictures.images, resize), pictures.labels)
    features = dataset_features(config, backbone, image_size, {"image files": files}, reporter=reporter).features
    arrays = {"features": features["image files"], "paths": np.array(pictures.images.names)}
    if skipped:
        more = f" and {len(skipped) - SHOWN:,} more" if len(skipped) > SHOWN else ""
        logger.warning(f"Skipped {len(skipped):,} files that cannot be read: {', '.join(skipped[:SHOWN])}{more}.")
    return _Extracted(arrays, backbone, resize, f"{len(files.labels):,} image files")


def _descriptions(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    def shape(array: np.ndarray) -> str:
        return " x ".join(f"{size:,}" for size in array.shape)

    if path.suffix == ".npy":
        return {"file": f"{path}, {shape(arrays['features'])} {arrays['features'].dtype}"}
    return {"file": str(path)} | {name: f"{shape(array)} {array.dtype}" for name, array in arrays.items()}
