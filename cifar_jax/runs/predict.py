"""Class probabilities of images: for the library's user as a pure function, for the command line from files."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from cifar_jax.data import load_problem
from cifar_jax.data.sources.images import ImageError, read_image
from cifar_jax.errors import UserError
from cifar_jax.features.extractor import extraction_batch_size, make_extractor
from cifar_jax.models.backbone import AnyBackbone, extract
from cifar_jax.models.head import Head, dense_logits
from cifar_jax.runs.reader import Run, load_run
from cifar_jax.runtime.progress import Reporter, Silent
from cifar_jax.train.evaluate import evaluate, make_eval_step, wilson_interval
from cifar_jax.train.losses import LossFn, smoothed_cross_entropy
from cifar_jax.train.task import HeadFn, head_forward

logger = logging.getLogger(__name__)

TRAINED_SIDE = 32  # pixels: what the training images had
AT_ONCE = 256  # image files that are in memory together


def predict_probs(
    backbone: AnyBackbone,
    head_params: PyTree,
    images_u8: UInt8[Array, "batch h w 3"],
    image_size: int | None = None,
    precision: str = "float32",
    logits_fn: HeadFn = dense_logits,
) -> Float[Array, "batch classes"]:
    """Class probabilities of a batch of images, plainly: `extract`, head, softmax. Pure; jit it as you like.

    `logits_fn` is the head, `run.head` of a run with another one than the dense.
    """
    features = extract(backbone, images_u8, image_size, precision)
    return jax.nn.softmax(logits_fn(head_params, features, train=False, key=None))


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
    probabilities = jax.jit(lambda params, features: jax.nn.softmax(run.head(params, features)))
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
            probs = iter(np.asarray(probabilities(run.head_params, extractor(np.stack(images + black)))))
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
    *,
    loss_fn: LossFn | None = None,
    head: Head | None = None,
    backbone: AnyBackbone | None = None,
) -> dict[str, Any]:
    """Scores a run's head on its test images again, through the backbone.

    Args:
      path: of the run directory.
      data_dir: where the data set is, if it has moved since.
      weights: a copy of the backbone, if it has moved since.
      reporter: who is told about the progress.
      allow_incomplete: see `load_run`.
      loss_fn: that the run was trained with, if it was passed to `train`; else the loss of its options is reported,
        and where that is another one a warning is logged.
      head: see `load_run`.
      backbone: see `load_run`.

    Raises:
      UserError: when the run, its backbone or its data cannot be had, or the data are others than then.
    """
    reporter = reporter or Silent()
    run = load_run(path, weights, allow_incomplete=allow_incomplete, head=head, backbone=backbone)
    if (name := run.summary.get("parts", {}).get("loss_fn")) and loss_fn is None:
        smoothed = " with label smoothing" * (run.config.optim.label_smoothing > 0)
        here = f"the loss here is cross-entropy{smoothed}"
        logger.warning(f"The run in {run.path} was trained with the loss {name}; {here}.")
    config = replace(run.config, run=replace(run.config.run, data_dir=data_dir or run.config.run.data_dir))
    problem = load_problem(config)
    if problem.digests["test"].examples != run.summary["dataset"].get("test_sha256"):
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
    loss_fn = loss_fn or smoothed_cross_entropy(config.optim.label_smoothing)
    eval_step = make_eval_step(head_forward(run.head), loss_fn)
    score = jax.jit(lambda params, batch: eval_step(params, {}, {}, batch))
    result = evaluate(score, {"head": run.head_params}, features, problem.test.labels)
    low, high = wilson_interval(result.accuracy, result.num)
    return {
        "run": str(run.path),
        "test_loss": result.loss,
        "test_accuracy": result.accuracy,
        "test_accuracy_interval_95": [low, high],
        "num_test": result.num,
        "test_class_accuracy": dict(zip(run.class_names, result.class_accuracy.tolist(), strict=True)),
    }
