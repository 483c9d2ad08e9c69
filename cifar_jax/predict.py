"""Class probabilities of images: for the library's user as a pure function, for the command line from files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from cifar_jax.data import load_problem
from cifar_jax.errors import UserError
from cifar_jax.evaluation import wilson_interval
from cifar_jax.features import extract, make_extractor
from cifar_jax.head import HeadParams, head_logits
from cifar_jax.images import read_image
from cifar_jax.pretrained.backbone import Backbone
from cifar_jax.reporter import Reporter, Silent
from cifar_jax.runners import cached_evaluator, probabilities
from cifar_jax.saved_run import Run, load_run

TRAINED_SIDE = 32  # pixels: what the training images had


def predict_probs(
    backbone: Backbone,
    head_params: HeadParams,
    images_u8: UInt8[Array, "batch h w 3"],
    image_size: int | None = None,
    precision: str = "float32",
) -> Float[Array, "batch classes"]:
    """Class probabilities of a batch of images, plainly: `extract`, head, softmax. Pure; jit it as you like."""
    return jax.nn.softmax(head_logits(head_params, extract(backbone, images_u8, image_size, precision)))


class Prediction(NamedTuple):
    """What a run says of an image: class names with their probabilities, the likeliest first."""

    path: str
    top: tuple[tuple[str, float], ...]


def predict_files(run: Run, paths: Sequence[str | Path], direct: bool = False, top: int = 3) -> list[Prediction]:
    """Predicts image files of any size.

    Args:
      run: from `load_run`.
      paths: of image files.
      direct: resize straight to the network's size. By default an image goes through 32x32, as the training images did:
        sharper pictures than the head has ever seen are another kind of input, not a better one.
      top: how many classes to name.

    Raises:
      UserError: when a file cannot be read.
    """
    side = run.backbone.image_size if direct else TRAINED_SIDE
    images = np.stack([read_image(path, side) for path in paths])
    features = make_extractor(run.backbone, run.backbone.image_size, run.config.precision)(images)
    probs = probabilities(run.head_params, features)
    return [Prediction(str(path), _top(row, run.class_names, top)) for path, row in zip(paths, probs, strict=True)]


def _top(probs: Float[np.ndarray, "classes"], class_names: Sequence[str], top: int) -> tuple[tuple[str, float], ...]:
    order = np.argsort(-probs, kind="stable")[:top]
    return tuple((class_names[label], float(probs[label])) for label in order)


def evaluate_run(
    path: str | Path,
    data_dir: str | None = None,
    weights: str | None = None,
    reporter: Reporter | None = None,
    allow_incomplete: bool = False,
) -> dict[str, Any]:
    """Scores a run's head on its test images again, through the backbone.

    Args:
      path: of the run directory.
      data_dir: where the data set is, if it has moved since.
      weights: a copy of the backbone, if it has moved since.
      reporter: who is told about the progress.
      allow_incomplete: see `load_run`.

    Raises:
      UserError: when the run, its backbone or its data cannot be had, or the data are others than then.
    """
    reporter = reporter or Silent()
    run = load_run(path, weights, allow_incomplete=allow_incomplete, warn=reporter.warn)
    config = replace(run.config, data_dir=data_dir or run.config.data_dir)
    problem = load_problem(config, reporter.say)
    if problem.test.fingerprint() != run.summary["dataset"].get("test_sha256"):
        raise UserError(
            f"The test images of {config.dataset} are not those that the run {run.path} was scored on; name the "
            "directory of the same version with --data-dir."
        )
    extractor = make_extractor(run.backbone, run.backbone.image_size, config.precision, config.extract_batch_size)
    with reporter.progress("Features of test images", len(problem.test.labels)) as bar:
        features = extractor(problem.test.images, bar)
    result = cached_evaluator(features, problem.test.labels)(run.head_params)
    low, high = wilson_interval(result.accuracy, result.num)
    return {
        "run": str(run.path),
        "test_loss": result.loss,
        "test_accuracy": result.accuracy,
        "test_accuracy_interval_95": [low, high],
        "num_test": result.num,
        "test_class_accuracy": dict(zip(run.class_names, result.class_accuracy.tolist(), strict=True)),
    }
