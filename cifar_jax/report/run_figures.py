"""Figure files of a run: samples before training; curves, predictions and confusion matrix of the trained head."""

import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Integer, UInt8

from cifar_jax.data import Dataset, RunData
from cifar_jax.data.pipeline import read_batches
from cifar_jax.data.sources.images import ImageError
from cifar_jax.report.plots import plot_confusion, plot_curves, plot_predictions, plot_samples, sample_rows, save_figure
from cifar_jax.rng import stream_key
from cifar_jax.runtime.progress import EpochRow
from cifar_jax.train.evaluate import EvalResult

NUM_PREDICTIONS = 32

logger = logging.getLogger(__name__)


def write_samples(out: Path, data: RunData) -> None:
    """Writes samples.png to the run directory. Raises OSError if it cannot be written."""
    names = data.splits.class_names
    train, val = (_read(part, sample_rows(part.labels)) for part in (data.train, data.val))
    figure = plot_samples(*train, *val, names, val_name=data.val_name)
    save_figure(figure, out / "samples.png")


def _read(part: Dataset, rows: Integer[np.ndarray, " m"]) -> tuple[UInt8[np.ndarray, "m h w 3"], np.ndarray]:
    (images,) = read_batches(part.images, [rows])
    return images, part.labels[rows]


def write_pictures(
    out: Path, data: RunData, rows: Sequence[EpochRow], val: EvalResult, test: EvalResult, seed: int
) -> None:
    """Writes curves.png, and predictions.png and confusion.png for the validation images.

    If these were held out, also test_predictions.png and test_confusion.png. The seed chooses the images shown.

    Raises:
      OSError: if a file cannot be written.
    """
    names = data.splits.class_names
    figures = {"curves.png": plot_curves([row._asdict() for row in rows], val_name=data.val_name)}
    splits = [("", data.val_name, data.val, val)]
    if data.held_out:
        splits.append(("test_", "test", data.test, test))
    for prefix, split, part, result in splits:
        key = stream_key(seed, "pictures")
        shown = np.asarray(jax.random.permutation(key, len(part.labels))[:NUM_PREDICTIONS], np.int32)
        probs = np.asarray(jax.nn.softmax(result.logits[shown]))
        try:
            figures[f"{prefix}predictions.png"] = plot_predictions(*_read(part, shown), probs, names, split=split)
        except ImageError as error:  # after training on cached features, which is not to be lost
            logger.warning(f"{prefix}predictions.png is left out: {error}")
        figures[f"{prefix}confusion.png"] = plot_confusion(result.confusion, names, split=split)
    for name, figure in figures.items():
        save_figure(figure, out / name)
