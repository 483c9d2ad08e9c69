"""Class probabilities of images: a pure function for library users, and prediction of files for the command line."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from cifar_jax.data import load_data
from cifar_jax.data.resize import Resize
from cifar_jax.data.sources.images import ImageError, read_image
from cifar_jax.errors import UserError
from cifar_jax.features.extractor import make_extractor
from cifar_jax.models.backbone import AnyBackbone, extract
from cifar_jax.models.head import Head, dense_logits
from cifar_jax.models.preprocess import EvalTransform
from cifar_jax.runs.reader import Run, load_run
from cifar_jax.runtime.progress import Reporter, Silent
from cifar_jax.train.evaluate import evaluate, make_eval_step, wilson_interval
from cifar_jax.train.losses import LossFn, smoothed_cross_entropy
from cifar_jax.train.task import HeadFn, head_forward

logger = logging.getLogger(__name__)

AT_ONCE = 256  # maximum number of image files in memory


def predict_probs(
    backbone: AnyBackbone,
    head_params: PyTree,
    images_u8: UInt8[Array, "batch h w 3"],
    image_size: int | None = None,
    precision: str = "float32",
    logits_fn: HeadFn = dense_logits,
) -> Float[Array, "batch classes"]:
    """Computes class probabilities of a batch of images: `extract`, head, softmax. Pure; wrap it in jit as needed.

    `logits_fn` is the head function; pass `run.head` for a run whose head is not the dense one.
    """
    features = extract(backbone, images_u8, image_size, precision)
    return jax.nn.softmax(logits_fn(head_params, features, train=False, key=None))


class Prediction(NamedTuple):
    """The prediction for an image: class names and probabilities, most likely first, or the error reading it."""

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str = ""


def predict_files(
    run: Run, paths: Sequence[str | Path], direct: bool = False, top: int = 3, at_once: int = AT_ONCE
) -> Iterator[Prediction]:
    """Predicts any number of image files of any size, in order.

    Args:
      run: from `load_run`.
      paths: paths of image files.
      direct: resize directly to the network's input size. By default an image is first reduced to 32x32 like the
        training images, as sharper images would be out of distribution for the head.
      top: number of classes to return.
      at_once: maximum number of files in memory.

    Yields:
      A prediction for each path; for a file that cannot be read it holds the error.
    """
    image_size = run.backbone.image_size
    resize = Resize("upsample", image_size) if direct else run.resize
    num = min(at_once, len(paths))  # of one shape throughout, so that each function is compiled once
    extractor = make_extractor(run.backbone, image_size, run.config.backbone.precision, num_images=num)
    features = np.zeros((num, run.backbone.num_features), np.float32)
    probabilities = jax.jit(lambda params, features: jax.nn.softmax(run.head(params, features)))
    for start in range(0, len(paths), at_once):
        read = [_read(path, resize) for path in paths[start : start + at_once]]
        images = [image for image in read if not isinstance(image, ImageError)]
        probs: Iterator[Any] = iter(())
        if images:
            features[: len(images)] = extractor(np.stack(images))
            probs = iter(np.asarray(probabilities(run.head_params, features)))
        for path, image in zip(paths[start : start + at_once], read, strict=True):
            if isinstance(image, ImageError):
                yield Prediction(str(path), error=image.reason)
            else:
                yield Prediction(str(path), _top(next(probs), run.class_names, top))


def _read(path: str | Path, resize: Resize) -> UInt8[np.ndarray, "side side 3"] | ImageError:
    try:
        return read_image(path, resize)
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
    *,
    loss_fn: LossFn | None = None,
    head: Head | None = None,
    backbone: AnyBackbone | None = None,
) -> dict[str, Any]:
    """Re-evaluates a run on its test images, extracting the features again.

    Args:
      path: the run directory.
      data_dir: directory of the data set, if it has moved.
      weights: a copy of the backbone's weights, if they have moved.
      reporter: shows a progress bar.
      allow_incomplete: see `load_run`.
      loss_fn: the loss function that was passed to `train`, if any. Without it the loss of the run's options is
        reported, with a warning if the run was trained with another one.
      head: see `load_run`.
      backbone: see `load_run`.

    Raises:
      UserError: if the run, its backbone or its data cannot be loaded, or the test images have changed.
    """
    reporter = reporter or Silent()
    run = load_run(path, weights, allow_incomplete=allow_incomplete, head=head, backbone=backbone)
    if (name := run.summary.get("parts", {}).get("loss_fn")) and loss_fn is None:
        smoothed = " with label smoothing" * (run.config.optim.label_smoothing > 0)
        here = f"the loss here is cross-entropy{smoothed}"
        logger.warning(f"The run in {run.path} was trained with the loss {name}; {here}.")
    config = replace(run.config, run=replace(run.config.run, data_dir=data_dir or run.config.run.data_dir))
    data = load_data(config, run.backbone.image_size, EvalTransform())
    if data.digests["test"].examples != run.summary["dataset"].get("test_sha256"):
        raise UserError(
            f"The test images of {config.data.dataset} are not those that the run {run.path} was scored on; name the "
            "directory of the same version with --data-dir."
        )
    extractor = make_extractor(
        run.backbone, run.backbone.image_size, config.backbone.precision, config.backbone.extract_batch_size
    )
    with reporter.progress("Features of test images", len(data.test.labels), compiles=True) as bar:
        bar(0)
        features = extractor(data.test.images, bar)
    loss_fn = loss_fn or smoothed_cross_entropy(config.optim.label_smoothing)
    eval_step = make_eval_step(head_forward(run.head), loss_fn)
    score = jax.jit(lambda params, batch: eval_step(params, {}, {}, batch))
    result = evaluate(score, {"head": run.head_params}, features, data.test.labels)
    low, high = wilson_interval(result.accuracy, result.num)
    return {
        "run": str(run.path),
        "test_loss": result.loss,
        "test_accuracy": result.accuracy,
        "test_accuracy_interval_95": [low, high],
        "num_test": result.num,
        "test_class_accuracy": dict(zip(run.class_names, result.class_accuracy.tolist(), strict=True)),
    }
