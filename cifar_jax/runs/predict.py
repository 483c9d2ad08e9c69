"""Class probabilities of pictures: of a batch as a pure function, and of any number of files or arrays."""

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, PyTree, UInt8
from PIL import Image

from cifar_jax.data.pictures import Images
from cifar_jax.data.resize import Resize
from cifar_jax.data.sources.images import ImageError, OrErrors, decode, or_errors, read_bytes
from cifar_jax.features.extractor import make_extractor
from cifar_jax.models.backbone import AnyBackbone, extract
from cifar_jax.models.head import dense_logits
from cifar_jax.models.preprocess import require_images
from cifar_jax.runs.classifier import Classifier
from cifar_jax.runs.reader import Run
from cifar_jax.runtime.progress import Reporter, Silent
from cifar_jax.train.task import HeadFn

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
    model: Classifier,
    paths: Iterable[str | Path],
    direct: bool = False,
    top: int = 3,
    reporter: Reporter | None = None,
    batch_size: int | None = None,
) -> Generator[Prediction, None, None]:
    """Predicts any number of image files of any size, in order, in memory that does not grow with their number.

    Files are decoded in threads, some batches ahead.

    Args:
      model: from `load_run` or `load_exported`.
      paths: paths of image files.
      direct: see `input_resize`.
      top: number of classes in `Prediction.top`.
      reporter: shows a progress bar until all are predicted.
      batch_size: images at a time; chosen if None.

    Yields:
      A prediction for each path; for a file that cannot be read it holds the error.

    Raises:
      UserError: if `direct` has no meaning for the run.
      RunError: if the weights or features are not finite.
    """
    names = paths if isinstance(paths, Sequence) else list(paths)
    images = or_errors(lambda row: _open(names[row]), len(names), input_resize(model, direct))
    for row, probs, error in _probabilities(model, images, reporter or Silent(), batch_size):
        best = () if error else _top(probs, model.class_names, top)
        yield Prediction(str(names[row]), best, error.reason if error else "", probs)


def predict(
    model: Classifier,
    pictures: Iterable[Picture] | UInt8[np.ndarray, "n h w 3"],
    direct: bool = False,
    reporter: Reporter | None = None,
    batch_size: int | None = None,
) -> Predictions:
    """Predicts pictures given by path or as pixels; `Run.predict` calls this.

    Args:
      model: from `load_run` or `load_exported`.
      pictures: paths of image files; or RGB pixels, uint8 [n, height, width, 3], or uint8 [height, width, 3] each, of
        any sizes. Pixels are resized like files.
      direct: see `input_resize`.
      reporter: shows a progress bar.
      batch_size: images at a time; chosen if None.

    Raises:
      ValueError: if pixels have another dtype or shape.
      UserError: if `direct` has no meaning for the run.
      RunError: if the weights or features are not finite.
    """
    found = _listed(pictures)
    images = or_errors(lambda row: _open(found[row]), len(found), input_resize(model, direct))
    probabilities = np.empty((len(found), len(model.class_names)), np.float32)
    labels, errors = np.full(len(found), -1, np.int32), [""] * len(found)
    for row, probs, error in _probabilities(model, images, reporter or Silent(), batch_size):
        probabilities[row] = probs
        if error:
            errors[row] = error.reason
        else:
            labels[row] = probs.argmax()
    names = tuple("" if label < 0 else model.class_names[label] for label in labels)
    return Predictions(probabilities, labels, names, tuple(errors))


def input_resize(model: Classifier, direct: bool = False) -> Resize:
    """How a picture becomes the input of a classifier.

    Pictures are resized as those that the run was trained on. A run on small images that are upsampled takes the
    centre square of a picture, reduced to their side, as sharper images would be out of distribution for the head;
    with `direct` the square is resized to the network's own input size.

    Raises:
      UserError: for `direct` with a model that does not reduce pictures, or was exported for small ones.
    """
    return model.direct_resize() if direct else model.resize


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
    model: Classifier, images: OrErrors, reporter: Reporter, batch_size: int | None
) -> Iterator[tuple[int, Float32[np.ndarray, "classes"], ImageError | None]]:
    """Yields row, class probabilities and error of each picture, in order."""
    if not len(images):
        return
    with reporter.progress("Predicting", len(images), compiles=True) as bar:
        bar(0)
        for rows, probs in model.probabilities(images, batch_size):
            bar(rows.stop)
            for number, row in enumerate(range(rows.start, rows.stop)):
                error = images.errors.pop(row, None)
                yield row, np.full_like(probs[number], np.nan) if error else probs[number], error


def run_probabilities(
    run: Run, images: Images, batch_size: int | None = None
) -> Iterator[tuple[slice, Float32[np.ndarray, "rows classes"]]]:
    """Yields rows and their class probabilities, in order; `Run.probabilities` calls this.

    Raises:
      RunError: if the weights or features are not finite.
    """
    extractor = make_extractor(run.backbone, None, run.config.backbone.precision, batch_size, num_images=len(images))

    @jax.jit
    def probabilities_of(params: PyTree, features: Float[Array, "batch features"]) -> Float[Array, "batch classes"]:
        return jax.nn.softmax(run.head(params, features))

    params = jax.device_put(run.head_params)
    # Of one shape throughout, so that the head is compiled once.
    features = np.zeros((extractor.batch_size, run.backbone.num_features), np.float32)
    for rows, values in extractor.stream(images, [slice(0, len(images))]):
        features[: len(values)] = values
        yield rows, np.asarray(probabilities_of(params, features))[: len(values)]


def _top(probs: Float[np.ndarray, "classes"], class_names: Sequence[str], top: int) -> tuple[tuple[str, float], ...]:
    order = np.argsort(-probs, kind="stable")[:top]
    return tuple((class_names[label], float(probs[label])) for label in order)
