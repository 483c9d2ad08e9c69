"""Scores of a trained classifier on labelled pictures: of a run with its own loss, of an exported model."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from cifar_jax.features.extractor import make_extractor
from cifar_jax.models.backbone import AnyBackbone
from cifar_jax.models.head import Head
from cifar_jax.runs.classifier import Classifier
from cifar_jax.runs.labelled import Labelled, other_images, own_test_images
from cifar_jax.runs.reader import load_run
from cifar_jax.runtime.progress import Reporter, Silent
from cifar_jax.train.evaluate import EvalResult, evaluate, make_eval_step, wilson_interval
from cifar_jax.train.losses import LossFn, cross_entropy, loss_of
from cifar_jax.train.task import head_forward

logger = logging.getLogger(__name__)


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
    batch_size: int | None = None,
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
      batch_size: images at a time; that of the run's extraction if None.

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
        batch_size or config.backbone.extract_batch_size,
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
    return {"run": str(run.path)} | _scores(run.class_names, data, result)


def evaluate_model(
    model: Classifier,
    dataset: str | None = None,
    label_key: str | None = None,
    skip_unreadable: bool = False,
    batch_size: int | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Scores any classifier by its probabilities: on the test images of its run, or on other labelled pictures.

    The loss is their cross-entropy. See `evaluate_run` for the arguments and the result, whose `model` is the path.

    Raises:
      UserError: if the data cannot be loaded, are not what the run was scored on, or have unknown classes.
    """
    if model.loss != "cross-entropy":
        logger.warning(f"{model.path} was trained with the loss {model.loss}; the loss here is cross-entropy.")
    data = own_test_images(model) if dataset is None else other_images(model, dataset, label_key, skip_unreadable)
    logits = np.empty((len(data.labels), len(model.class_names)), np.float32)
    with (reporter or Silent()).progress("Predicting test images", len(data.labels), compiles=True) as bar:
        bar(0)
        for rows, probabilities in model.probabilities(data.images, batch_size):
            # Logarithms of probabilities are logits of them.
            logits[rows] = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
            bar(rows.stop)
    eval_step = make_eval_step(_as_they_are, cross_entropy)
    result = evaluate(jax.jit(lambda params, batch: eval_step(params, {}, {}, batch)), {}, logits, data.labels)
    return {"model": str(model.path)} | _scores(model.class_names, data, result)


def _as_they_are(
    params: PyTree, batch_stats: PyTree, frozen: PyTree, inputs: Array, *, train: bool, key: Any, mask: Array
) -> tuple[Array, PyTree]:
    """A forward function whose inputs are logits."""
    return inputs, batch_stats


def _scores(class_names: Sequence[str], data: Labelled, result: EvalResult) -> dict[str, Any]:
    low, high = wilson_interval(result.accuracy, result.num)
    counts = result.confusion.sum(axis=1)
    return {
        "dataset": data.name,
        "split": data.split,
        "resize": data.resize_words,
        "test_loss": result.loss,
        "test_accuracy": result.accuracy,
        "test_accuracy_interval_95": [low, high],
        "num_test": result.num,
        "test_class_accuracy": dict(zip(class_names, result.class_accuracy.tolist(), strict=True)),
        "test_class_count": dict(zip(class_names, counts.tolist(), strict=True)),
    }
