"""Class probabilities of pictures: of a batch as a pure function, and of any number of files or arrays."""

import logging
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, PyTree, UInt8
from PIL import Image

from cifar_jax.data.resize import Resize
from cifar_jax.data.sources.images import ImageError, OrErrors, decode, or_errors, read_bytes
from cifar_jax.errors import UserError
from cifar_jax.features.extractor import make_extractor
from cifar_jax.models.backbone import AnyBackbone, extract
from cifar_jax.models.head import Head, dense_logits
from cifar_jax.models.preprocess import require_images
from cifar_jax.runs.labelled import other_images, own_test_images
from cifar_jax.runs.reader import Run, load_run
from cifar_jax.runtime.progress import Reporter, Silent
from cifar_jax.train.evaluate import evaluate, make_eval_step, wilson_interval
from cifar_jax.train.losses import LossFn, loss_of
from cifar_jax.train.task import HeadFn, head_forward

logger = logging.getLogger(__name__)

# A path, or pixels uint8 [height, width, 3].
Picture: TypeAlias = "str | os.PathLike[str] | UInt8[np.ndarray, 'h w 3']"


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
    """The prediction for an image file, or the error reading it.

    Attributes:
      path: of the file, as it was named.
      top: names and probabilities of the most likely classes, most likely first; empty after an error.
      error: the reason it cannot be read; empty if it can.
      probabilities: of all classes, in the order of `Run.class_names`; NaN after an error.
    """

    path: str
    top: tuple[tuple[str, float], ...]
    error: str
    probabilities: Float32[np.ndarray, "classes"]


class Predictions(NamedTuple):
    """The predictions for n pictures, in their order.

    Attributes:
      probabilities: of each class, in the order of `Run.class_names`; NaN for a file that cannot be read.
      labels: the most likely class; -1 for a file that cannot be read.
      class_names: its name; empty for a file that cannot be read.
      errors: the reason a file cannot be read; empty if it can.
    """

    probabilities: Float32[np.ndarray, "n classes"]
    labels: Int32[np.ndarray, "n"]
    class_names: tuple[str, ...]
    errors: tuple[str, ...]


def predict_files(
    run: Run, paths: Iterable[str | Path], direct: bool = False, top: int = 3, reporter: Reporter | None = None
) -> Generator[Prediction, None, None]:
    """Predicts any number of image files of any size, in order, in memory that does not grow with their number.

    Files are decoded in threads, some batches ahead.

    Args:
      run: from `load_run`.
      paths: paths of image files.
      direct: see `input_resize`.
      top: number of classes in `Prediction.top`.
      reporter: shows a progress bar until all are predicted.

    Yields:
      A prediction for each path; for a file that cannot be read it holds the error.

    Raises:
      UserError: if `direct` has no meaning for the run.
      RunError: if the weights or features are not finite.
    """
    names = paths if isinstance(paths, Sequence) else list(paths)
    images = or_errors(lambda row: _open(names[row]), len(names), input_resize(run, direct))
    for row, probs, error in _probabilities(run, images, reporter or Silent()):
        best = () if error else _top(probs, run.class_names, top)
        yield Prediction(str(names[row]), best, error.reason if error else "", probs)


def predict(
    run: Run,
    pictures: Iterable[Picture] | UInt8[np.ndarray, "n h w 3"],
    direct: bool = False,
    reporter: Reporter | None = None,
) -> Predictions:
    """Predicts pictures given by path or as pixels; `Run.predict` calls this.

    Args:
      run: from `load_run`.
      pictures: paths of image files; or RGB pixels, uint8 [n, height, width, 3], or uint8 [height, width, 3] each, of
        any sizes. Pixels are resized like files.
      direct: see `input_resize`.
      reporter: shows a progress bar.

    Raises:
      ValueError: if pixels have another dtype or shape.
      UserError: if `direct` has no meaning for the run.
      RunError: if the weights or features are not finite.
    """
    found = _listed(pictures)
    images = or_errors(lambda row: _open(found[row]), len(found), input_resize(run, direct))
    probabilities = np.empty((len(found), len(run.class_names)), np.float32)
    labels, errors = np.full(len(found), -1, np.int32), [""] * len(found)
    for row, probs, error in _probabilities(run, images, reporter or Silent()):
        probabilities[row] = probs
        if error:
            errors[row] = error.reason
        else:
            labels[row] = probs.argmax()
    names = tuple("" if label < 0 else run.class_names[label] for label in labels)
    return Predictions(probabilities, labels, names, tuple(errors))


def input_resize(run: Run, direct: bool = False) -> Resize:
    """How a picture becomes the input of a run's network.

    Pictures are resized as those that the run was trained on. A run on small images that are upsampled takes the
    centre square of a picture, reduced to their side, as sharper images would be out of distribution for the head;
    with `direct` the square is resized to the network's own input size.

    Raises:
      UserError: for `direct` with a run whose images are not upsampled.
    """
    if not direct:
        return run.resize
    if run.resize.method != "upsample":
        raise UserError(
            f"--direct leaves out the reduction to small training images, which the run in {run.path} does not have "
            f"({run.resize.words(run.backbone.image_size)}); leave it out."
        )
    return Resize("upsample", run.backbone.image_size)


def _listed(pictures: Any) -> Sequence[Any]:
    if isinstance(pictures, str | os.PathLike):
        return [pictures]
    if hasattr(pictures, "ndim"):
        require_images(pictures)
        if 0 in pictures.shape[1:]:
            raise ValueError(f"pictures must have pixels, got {[*pictures.shape]}")
        return np.asarray(pictures)  # type: ignore[return-value]
    found = [np.asarray(one) if hasattr(one, "ndim") else one for one in pictures]
    for number, one in enumerate(found):
        if isinstance(one, np.ndarray) and (one.dtype != np.uint8 or one.shape[2:] != (3,) or 0 in one.shape):
            raise ValueError(f"picture {number} must be uint8 [height, width, 3], got {one.dtype} {[*one.shape]}")
    return found


def _open(picture: Picture) -> Image.Image:
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    return decode(read_bytes(os.fspath(picture)), os.fspath(picture))


def _probabilities(
    run: Run, images: OrErrors, reporter: Reporter
) -> Iterator[tuple[int, Float32[np.ndarray, "classes"], ImageError | None]]:
    """Yields row, class probabilities and error of each picture, in order."""
    if not len(images):
        return
    extractor = make_extractor(run.backbone, None, run.config.backbone.precision, num_images=len(images))

    @jax.jit
    def probabilities_of(params: PyTree, features: Float[Array, "batch features"]) -> Float[Array, "batch classes"]:
        return jax.nn.softmax(run.head(params, features))

    params = jax.device_put(run.head_params)
    # Of one shape throughout, so that the head is compiled once.
    features = np.zeros((extractor.batch_size, run.backbone.num_features), np.float32)
    with reporter.progress("Predicting", len(images), compiles=True) as bar:
        bar(0)
        for rows, values in extractor.stream(images, [slice(0, len(images))]):
            features[: len(values)] = values
            probs = np.asarray(probabilities_of(params, features))
            bar(rows.stop)
            for number, row in enumerate(range(rows.start, rows.stop)):
                error = images.errors.pop(row, None)
                yield row, np.full_like(probs[number], np.nan) if error else probs[number], error


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
    dataset: str | None = None,
    label_key: str | None = None,
    skip_unreadable: bool = False,
    loss_fn: LossFn | None = None,
    head: Head | None = None,
    backbone: AnyBackbone | None = None,
) -> dict[str, Any]:
    """Scores a run on its test images again, or on other labelled pictures, extracting their features.

    Args:
      path: the run directory.
      data_dir: the TFDS data directory, if it has moved.
      weights: a copy of the backbone's weights, if they have moved.
      reporter: shows a progress bar.
      allow_incomplete: see `load_run`.
      dataset: other pictures, named as for `train`, whose classes are matched by name; see `other_images`.
      label_key: name of the label in `dataset`, if it has several.
      skip_unreadable: whether to leave out files of `dataset` that cannot be read.
      loss_fn: the loss function that was passed to `train`, if any. Without it the loss of the run's options is
        reported, with a warning if the run was trained with another one.
      head: see `load_run`.
      backbone: see `load_run`.

    Returns:
      The scores as JSON values; the accuracy of a class without images is NaN.

    Raises:
      UserError: if the run, its backbone or the data cannot be loaded, the run's test images have changed, or
        `dataset` has classes that the run does not know.
    """
    reporter = reporter or Silent()
    run = load_run(path, weights, allow_incomplete=allow_incomplete, head=head, backbone=backbone)
    if (name := run.summary.get("parts", {}).get("loss_fn")) and loss_fn is None:
        smoothed = " with label smoothing" * (run.config.optim.label_smoothing > 0)
        here = f"the loss here is cross-entropy{smoothed}"
        logger.warning(f"The run in {run.path} was trained with the loss {name}; {here}.")
    config = replace(run.config, run=replace(run.config.run, data_dir=data_dir or run.config.run.data_dir))
    run = replace(run, config=config)
    data = own_test_images(run) if dataset is None else other_images(run, dataset, label_key, skip_unreadable)
    extractor = make_extractor(
        run.backbone,
        run.backbone.image_size,
        config.backbone.precision,
        config.backbone.extract_batch_size,
        num_images=len(data.labels),
    )
    with reporter.progress("Features of test images", len(data.labels), compiles=True) as bar:
        bar(0)
        features = extractor(data.images, bar)
    # Class weights are those of the run's own training images.
    counts = run.summary["dataset"].get("train_class_counts", [1] * len(run.class_names))
    labels = np.repeat(np.arange(len(counts)), counts)
    loss_fn = loss_fn or loss_of(config, labels, len(run.class_names))
    eval_step = make_eval_step(head_forward(run.head), loss_fn)
    score = jax.jit(lambda params, batch: eval_step(params, {}, {}, batch))
    result = evaluate(score, {"head": run.head_params}, features, data.labels)
    low, high = wilson_interval(result.accuracy, result.num)
    counts = result.confusion.sum(axis=1)
    return {
        "run": str(run.path),
        "dataset": data.name,
        "split": data.split,
        "resize": data.resize_words,
        "test_loss": result.loss,
        "test_accuracy": result.accuracy,
        "test_accuracy_interval_95": [low, high],
        "num_test": result.num,
        "test_class_accuracy": dict(zip(run.class_names, result.class_accuracy.tolist(), strict=True)),
        "test_class_count": dict(zip(run.class_names, counts.tolist(), strict=True)),
    }
