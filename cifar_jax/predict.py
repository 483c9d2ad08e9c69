"""Class probabilities of images: for the library's user as a pure function, for the command line from files."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from cifar_jax.data import load_problem
from cifar_jax.errors import UserError
from cifar_jax.evaluation import wilson_interval
from cifar_jax.features import extract, extraction_batch_size, make_extractor
from cifar_jax.head import HeadParams, head_logits
from cifar_jax.images import ImageError, read_image
from cifar_jax.pretrained.backbone import Backbone
from cifar_jax.reporter import Reporter, Silent
from cifar_jax.runners import cached_evaluator, probabilities
from cifar_jax.saved_run import Run, load_run

TRAINED_SIDE = 32  # pixels: what the training images had
AT_ONCE = 256  # image files that are in memory together


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
    """What a run says of an image: class names with their probabilities, the likeliest first; or why it cannot."""

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str = ""


def predict_files(
    run: Run, paths: Sequence[str | Path], direct: bool = False, top: int = 3, at_once: int = AT_ONCE
) -> Iterator[Prediction]:
    """Predicts image files of any size, one after the other in their order, whatever their number.

    Args:
      run: from `load_run`.
      paths: of image files.
      direct: resize straight to the network's size. By default an image goes through 32x32, as the training images did:
        sharper pictures than the head has ever seen are another kind of input, not a better one.
      top: how many classes to name.
      at_once: how many files are in memory together.

    Yields:
      A prediction for each path; of a file that cannot be read it has the reason.
    """
    image_size = run.backbone.image_size
    side = image_size if direct else TRAINED_SIDE
    extractor = make_extractor(run.backbone, image_size, run.config.backbone.precision)
    # Later batches are no smaller than the first, or than the devices take at a time: another size is compiled again.
    devices = jax.local_devices()
    compiled = min(at_once, extraction_batch_size(image_size, devices[0].platform) * len(devices))
    least = 0
    for start in range(0, len(paths), at_once):
        read = [_read(path, side) for path in paths[start : start + at_once]]
        images = [image for image in read if not isinstance(image, ImageError)]
        probs: Iterator[Any] = iter(())
        if images:
            black = [np.zeros_like(images[0])] * (least - len(images))
            probs = iter(probabilities(run.head_params, extractor(np.stack(images + black))))
            least = compiled
        for path, image in zip(paths[start : start + at_once], read, strict=True):
            if isinstance(image, ImageError):
                yield Prediction(str(path), error=image.reason)
            else:
                yield Prediction(str(path), _top(next(probs), run.class_names, top))


def _read(path: str | Path, side: int) -> UInt8[np.ndarray, "side side 3"] | ImageError:
    try:
        return read_image(path, side)
    except ImageError as error:
        return error


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
    config = replace(run.config, run=replace(run.config.run, data_dir=data_dir or run.config.run.data_dir))
    problem = load_problem(config, reporter.say)
    if problem.test.fingerprint() != run.summary["dataset"].get("test_sha256"):
        raise UserError(
            f"The test images of {config.data.dataset} are not those that the run {run.path} was scored on; name the "
            "directory of the same version with --data-dir."
        )
    extractor = make_extractor(
        run.backbone, run.backbone.image_size, config.backbone.precision, config.backbone.extract_batch_size
    )
    with reporter.progress("Features of test images", len(problem.test.labels), compiles=True) as bar:
        bar(0)
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
