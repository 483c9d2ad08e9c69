"""The main job from end to end: data, backbone, features, training, evaluation, pictures, the run directory."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from cifar_jax.config import TrainConfig
from cifar_jax.data import Dataset, Problem, load_problem
from cifar_jax.data.dataset import IMAGE_SHAPE
from cifar_jax.environment import device_description
from cifar_jax.errors import RunError, UserError
from cifar_jax.evaluation import EvalResult
from cifar_jax.features import cached_features, features_key, make_extractor
from cifar_jax.files import cache_root, undisturbed
from cifar_jax.fit import (
    Diverged,
    EpochOrder,
    EpochRow,
    Evaluate,
    RunEpoch,
    cached_evaluator,
    cached_runner,
    fit,
    live_evaluator,
    live_runner,
)
from cifar_jax.head import HeadParams, init_head
from cifar_jax.keys import stream_key
from cifar_jax.optimizer import make_optimizer
from cifar_jax.pretrained import UNTRAINED, Backbone, load_backbone, random_backbone
from cifar_jax.pretrained.untrained import calibration_images
from cifar_jax.reporter import Reporter, Silent
from cifar_jax.run_dir import check_run_dir, default_run_dir
from cifar_jax.run_writer import Clock, RunWriter
from cifar_jax.training import StepMetrics, TrainState, init_state


class Interrupted(Exception):
    """Ctrl-C came; what was done until then is in the run directory."""

    def __init__(self, path: Path, epochs_done: int):
        """Takes the run directory and how many epochs are in it."""
        self.path, self.epochs_done = path, epochs_done
        super().__init__(f"{epochs_done} epochs are in {path}")


def load_problem_and_backbone(config: TrainConfig, reporter: Reporter, clock: Clock) -> tuple[Problem, Backbone]:
    """The images and the backbone of a configuration: loaded, or for `random` made from the images.

    Raises:
      UserError: when either cannot be had, or they do not fit together.
    """
    untrained = config.weights in UNTRAINED
    if untrained and config.variant is not None:
        raise UserError(
            f"--variant {config.variant} is for pretrained weights; leave it out with --weights {config.weights}."
        )
    # Weights first: a name typed wrong should not cost the download of a data set.
    with clock("weights"):
        loaded = (
            None
            if untrained
            else load_backbone(
                config.weights, config.variant, cache_dir=config.cache_dir, say=reporter.say, progress=reporter.progress
            )
        )
    with clock("data"):
        problem = load_problem(config, reporter.say)
    with clock("weights"):
        backbone = loaded or make_untrained(config, problem.train, reporter)
    return problem, backbone


def make_untrained(config: TrainConfig, train: Dataset, reporter: Reporter) -> Backbone:
    """A random backbone calibrated on the training images, which is said loudly."""
    reporter.warn(
        f"--weights {config.weights} is an UNTRAINED network: random kernels, BatchNorm statistics calibrated on "
        "training images. Its accuracy is a baseline, not transfer learning."
    )
    network, image_size = UNTRAINED[config.weights]
    image_size = config.image_size or image_size
    images = np.asarray(train.images[: calibration_images(image_size)])
    key = stream_key(config.seed, "backbone")
    return random_backbone(key, images, network, image_size, f"{config.weights} (seed {config.seed})")


def train(config: TrainConfig, reporter: Reporter | None = None) -> Path:
    """Runs the whole job.

    Args:
      config: what to do.
      reporter: who is told about it.

    Returns:
      The run directory.

    Raises:
      UserError: for what the user can mend; nothing was written then.
      RunError: when the job failed; what was done until then is in the run directory.
      Interrupted: when Ctrl-C came.
    """
    reporter = reporter or Silent()
    out = Path(config.out) if config.out else default_run_dir(config)
    check_run_dir(out, config)
    clock = Clock()
    problem, backbone = load_problem_and_backbone(config, reporter, clock)
    image_size = config.image_size or backbone.image_size
    if image_size % IMAGE_SHAPE[0]:
        raise UserError(
            f"{backbone.source} asks for images of {image_size} pixels a side, which is no multiple of "
            f"{IMAGE_SHAPE[0]}; name another --image-size."
        )
    reporter.header(_header(config, problem, backbone, image_size, out))
    writer = RunWriter(out, config, problem, backbone, image_size, clock)
    try:
        with undisturbed():
            writer.start()
        with clock("pictures"):
            writer.samples()
        route = (_cached if config.mode == "cached" else _live)(config, problem, backbone, image_size, reporter, writer)
        params = _fit(config, problem, backbone, route, reporter, writer)
        with clock("evaluation"):
            val = route.evaluate_val(params)
            test = route.evaluate_test(params) if problem.held_out else val
        with clock("pictures"):
            writer.pictures(params, route.val_features, val)
        writer.finish("complete", val, test)
    except KeyboardInterrupt:
        with undisturbed():
            writer.finish("interrupted")
        raise Interrupted(out, len(writer.history)) from None
    except Diverged as error:
        writer.diverged(error.state.params)
        raise
    except RunError:
        with contextlib.suppress(RunError):  # a full disk may keep this from being written too
            writer.finish("failed")
        raise
    return out


class Route(NamedTuple):
    """One of the two ways to the same head."""

    run_epoch: RunEpoch
    evaluate_val: Evaluate
    evaluate_test: Evaluate
    val_features: Callable[[Int32[np.ndarray, "m"]], Float32[np.ndarray, "m features"]]


def _cached(
    config: TrainConfig, problem: Problem, backbone: Backbone, image_size: int, reporter: Reporter, writer: RunWriter
) -> Route:
    """Every image passes the backbone once; the head trains on the features."""
    extractor = make_extractor(backbone, image_size, config.precision, config.extract_batch_size)
    directory = cache_root(config.cache_dir) / "features"

    def features_of(dataset: Dataset, name: str) -> Float32[np.ndarray, "n features"]:
        def compute() -> Float32[np.ndarray, "n features"]:
            with reporter.progress(f"Features of {name}", len(dataset.labels)) as bar, writer.extracting(dataset):
                return extractor(dataset.images, bar)

        key = features_key(backbone, image_size, config.precision, dataset.images)
        return cached_features(directory, key, compute, reporter.say)

    with writer.clock("features"):
        train = features_of(problem.train, "training images")
        val = features_of(problem.val, f"{problem.val_name} images")
        test = features_of(problem.test, "test images") if problem.held_out else val
    return Route(
        cached_runner(train, problem.train.labels, make_optimizer(config), _order(config)),
        cached_evaluator(val, problem.val.labels),
        cached_evaluator(test, problem.test.labels),
        lambda indices: np.asarray(val[indices]),
    )


def _live(
    config: TrainConfig, problem: Problem, backbone: Backbone, image_size: int, reporter: Reporter, writer: RunWriter
) -> Route:
    """Every step goes through the whole network, as in the notebook."""
    live_epoch = live_runner(
        backbone, problem.train, make_optimizer(config), _order(config), image_size, config.precision
    )

    def run_epoch(state: TrainState, epoch: int) -> tuple[TrainState, StepMetrics]:
        with reporter.progress(f"Epoch {epoch + 1}", len(problem.train.labels)) as bar:
            return live_epoch(state, epoch, bar)

    def evaluator(dataset: Dataset, name: str) -> Evaluate:
        evaluate_live = live_evaluator(backbone, dataset, image_size, config.precision)

        def evaluate_params(params: HeadParams) -> EvalResult:
            with reporter.progress(f"Evaluating {name} images", len(dataset.labels)) as bar:
                return evaluate_live(params, bar)

        return evaluate_params

    extractor = make_extractor(backbone, image_size, config.precision, config.extract_batch_size)
    return Route(
        run_epoch,
        evaluator(problem.val, problem.val_name),
        evaluator(problem.test, "test"),
        lambda indices: extractor(problem.val.images[indices]),
    )


def _order(config: TrainConfig) -> EpochOrder:
    keys = (stream_key(config.seed, "order"), stream_key(config.seed, "step"))
    return EpochOrder(*keys, config.batch_size, config.shuffle)


def _fit(
    config: TrainConfig, problem: Problem, backbone: Backbone, route: Route, reporter: Reporter, writer: RunWriter
) -> HeadParams:
    """Trains the head. Returns the last epoch's parameters, or where images were held out for it the best one's."""
    num_classes = len(problem.splits.class_names)
    params = init_head(stream_key(config.seed, "init"), backbone.config.features, config.hidden, num_classes)
    best: list[HeadParams] = []

    def on_epoch(row: EpochRow, state: TrainState) -> None:
        with undisturbed():
            write_epoch(row, state)
        reporter.epoch(row, config.epochs)

    def write_epoch(row: EpochRow, state: TrainState) -> None:
        is_best = all((row.val_accuracy, -row.val_loss) > (old.val_accuracy, -old.val_loss) for old in writer.history)
        writer.epoch(row)
        if is_best or not problem.held_out:
            # A copy, as the next step is given the state's own memory.
            best[:] = [jax.tree.map(jnp.copy, state.params)]
            writer.selected_epoch = row.epoch
            writer.checkpoint(best[0])

    with writer.clock("training"):
        state = init_state(params, make_optimizer(config))
        fit(state, route.run_epoch, route.evaluate_val, config.epochs, on_epoch)
    return best[0]


def _header(config: TrainConfig, problem: Problem, backbone: Backbone, image_size: int, out: Path) -> dict[str, str]:
    counts = f"{len(problem.train.labels):,} training, {len(problem.val.labels):,} {problem.val_name}"
    if problem.held_out:
        counts += f", {len(problem.test.labels):,} test"
    return {
        "data": f"{problem.splits.name} {problem.splits.version}: {counts} images",
        "weights": f"{backbone.source}, SHA-256 {backbone.sha256[:16]}",
        "variant": f"{backbone.variant}; {backbone.preprocessing.name} preprocessing, {image_size}x{image_size} pixels",
        "device": f"{device_description()}, {config.precision}",
        "training": f"{config.mode}: {config.epochs} epochs, batch {config.batch_size}, SGD {config.learning_rate:g}"
        + (f", momentum {config.momentum:g}" if config.momentum else ""),
        "run": str(out),
    }
