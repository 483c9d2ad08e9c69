"""The ways to a trained head: on cached features, live through a frozen backbone, or with the backbone training too."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int32

from cifar_jax.augment import Augmentation
from cifar_jax.config import TrainConfig
from cifar_jax.data import Dataset, Problem
from cifar_jax.errors import UserError
from cifar_jax.evaluation import EvalResult
from cifar_jax.extraction import dataset_features
from cifar_jax.features import make_extractor
from cifar_jax.finetune import finetune_evaluator, finetune_probabilities, finetune_runner, init_finetune
from cifar_jax.forecast import Forecast, forecast_of
from cifar_jax.head import HeadParams, init_head
from cifar_jax.keys import stream_key
from cifar_jax.optimizer import make_optimizer
from cifar_jax.pretrained import Backbone
from cifar_jax.processes import gather, own_rows
from cifar_jax.reporter import Reporter
from cifar_jax.run_writer import RunWriter
from cifar_jax.runners import (
    AHEAD,
    EpochOrder,
    Evaluate,
    Runner,
    cached_evaluator,
    cached_runner,
    live_evaluator,
    live_runner,
    probabilities,
)
from cifar_jax.training import StepMetrics, TrainState, init_state

FORWARD_SHARE = 1 / 3  # of a step that trains all layers; its backward pass takes about twice as long

# (state, indices) -> class probabilities of these images of a split
Probabilities = Callable[[TrainState, Int32[np.ndarray, "m"]], Float32[np.ndarray, "m classes"]]


class Route(NamedTuple):
    """One of the ways, ready to go."""

    state: TrainState  # before the first step
    runner: Runner
    evaluate_val: Evaluate
    evaluate_test: Evaluate
    val_probabilities: Probabilities
    test_probabilities: Probabilities


class Job(NamedTuple):
    """What every way is given."""

    config: TrainConfig
    problem: Problem
    backbone: Backbone
    image_size: int
    reporter: Reporter
    writer: RunWriter
    mesh: Mesh
    stopping: Callable[[], bool]  # whether Ctrl-C or SIGTERM came, asked equally often in all processes

    @property
    def steps_per_epoch(self) -> int:
        """A short last step included."""
        return -(-len(self.problem.train.labels) // self.config.optim.batch_size)


def check_divisible(config: TrainConfig, mesh: Mesh) -> None:
    """Refuses pieces of a batch that cannot be divided: filled up, each would be normalised by other examples.

    Raises:
      UserError: when --micro-batch is no multiple of the number of devices.
    """
    if config.finetune.micro_batch and config.finetune.micro_batch % mesh.size:
        raise UserError(
            f"--micro-batch {config.finetune.micro_batch} cannot be divided between {mesh.size} devices; name a "
            "multiple, or fewer --devices."
        )


def make_route(job: Job) -> Route:
    """The way that the configuration asks for."""
    return {"cached": _cached, "live": _live, "finetune": _finetune}[job.config.optim.mode](job)


def _cached(job: Job) -> Route:
    """Every image passes the backbone once; the head trains on the features."""
    config, problem, backbone, image_size, reporter, writer, mesh, _ = job
    datasets = {
        "training images": problem.train,
        f"{problem.val_name} images": problem.val,
        "test images": problem.test,
    }
    with writer.clock("features"):
        features = dataset_features(
            config,
            backbone,
            image_size,
            {name: own_part(dataset) for name, dataset in datasets.items()},
            say=reporter.say,
            progress=partial(_bar, job),
            timed=writer.extracting,
            on_batch=_forecast(job).note,
        )
        features = {name: gather(own, len(datasets[name].labels)) for name, own in features.items()}
    train, val, test = (features[name] for name in ("training images", f"{problem.val_name} images", "test images"))
    tx = make_optimizer(config, job.steps_per_epoch)
    return Route(
        init_state(_init_head(job), tx),
        _shown_runner(
            job, cached_runner(train, problem.train.labels, tx, _order(config), config.optim.label_smoothing, mesh)
        ),
        cached_evaluator(val, problem.val.labels, mesh=mesh),
        cached_evaluator(test, problem.test.labels, mesh=mesh),
        lambda state, indices: probabilities(state.params, np.asarray(val[indices])),
        lambda state, indices: probabilities(state.params, np.asarray(test[indices])),
    )


def own_part(dataset: Dataset) -> Dataset:
    """The examples whose features this process extracts, and keeps in a cache of its own."""
    rows = own_rows(len(dataset.labels))
    return Dataset(dataset.images[rows], dataset.labels[rows])


def _live(job: Job) -> Route:
    """Every step goes through the whole network, as in the notebook."""
    config, problem, backbone, image_size, _, _, mesh, _ = job
    tx, plan = make_optimizer(config, job.steps_per_epoch), _Plan(job, evaluation=1.0)
    runner = live_runner(
        backbone,
        problem.train,
        tx,
        _order(config),
        image_size,
        config.backbone.precision,
        config.optim.label_smoothing,
        _augmentation(config),
        mesh,
    )
    extractor = make_extractor(backbone, image_size, config.backbone.precision, config.backbone.extract_batch_size)

    def evaluator(dataset: Dataset, name: str) -> Evaluate:
        on_images = live_evaluator(
            backbone, dataset, image_size, config.backbone.precision, config.backbone.extract_batch_size, mesh
        )
        return _shown_evaluation(job, on_images, dataset, name, plan)

    return Route(
        init_state(_init_head(job), tx),
        _shown_runner(job, runner, plan.trained),
        evaluator(problem.val, problem.val_name),
        evaluator(problem.test, "test"),
        lambda state, indices: probabilities(state.params, extractor(problem.val.images[indices])),
        lambda state, indices: probabilities(state.params, extractor(problem.test.images[indices])),
    )


def _finetune(job: Job) -> Route:
    """Backbone and head train together."""
    config, problem, backbone, image_size, _, _, mesh, _ = job
    tx, plan = make_optimizer(config, job.steps_per_epoch), _Plan(job, evaluation=FORWARD_SHARE)
    order, augmentation = _order(config), _augmentation(config)
    runner = finetune_runner(config, backbone, problem.train, tx, order, image_size, augmentation, mesh)

    def evaluator(dataset: Dataset, name: str) -> Evaluate:
        on_images = finetune_evaluator(
            backbone, dataset, image_size, config.backbone.precision, config.backbone.extract_batch_size, mesh
        )
        return _shown_evaluation(job, on_images, dataset, name, plan)

    def probabilities_of(dataset: Dataset) -> Probabilities:
        return lambda state, indices: finetune_probabilities(
            backbone, state.params, state.batch_stats, dataset.images[indices], image_size, config.backbone.precision
        )

    return Route(
        init_finetune(backbone.variables, _init_head(job), tx, config.finetune.zero_gamma),
        _shown_runner(job, runner, plan.trained),
        evaluator(problem.val, problem.val_name),
        evaluator(problem.test, "test"),
        probabilities_of(problem.val),
        probabilities_of(problem.test),
    )


def _init_head(job: Job) -> HeadParams:
    num_classes = len(job.problem.splits.class_names)
    key = stream_key(job.config.optim.seed, "init")
    return init_head(key, job.backbone.config.features, job.config.optim.hidden, num_classes)


def _order(config: TrainConfig) -> EpochOrder:
    keys = (stream_key(config.optim.seed, "order"), stream_key(config.optim.seed, "step"))
    return EpochOrder(*keys, config.optim.batch_size, config.data.shuffle)


def _augmentation(config: TrainConfig) -> Augmentation | None:
    return Augmentation(stream_key(config.optim.seed, "augment"), config.data.augment) if config.data.augment else None


class _Plan:
    """How much is left of a job in which every image passes the network many times, for its forecast.

    The unit is a training image.
    """

    def __init__(self, job: Job, evaluation: float) -> None:
        """`evaluation` is the work that an image takes in evaluation."""
        self._job, self._share, self._forecast = job, evaluation, _forecast(job)
        self._left = 0.0  # when the last step was done

    def trained(self, epoch: int, examples: int) -> None:
        """Steps of an epoch were handed out, the last few of which may not be done yet."""
        config, problem = self._job.config, self._job.problem
        num_val, epochs_left = len(problem.val.labels), config.optim.epochs - epoch
        evaluated = epochs_left * num_val + num_val + (len(problem.test.labels) if problem.held_out else 0)
        self._left = epochs_left * len(problem.train.labels) - examples + self._share * evaluated
        waiting = AHEAD * config.optim.batch_size
        if examples > waiting:
            self._forecast.note(self._left + waiting)

    def evaluated(self, examples: int) -> None:
        """Images of the evaluation after an epoch are done."""
        self._forecast.note(self._left - self._share * examples)


def _forecast(job: Job) -> Forecast:
    return forecast_of(job.config, job.backbone, job.image_size, job.writer.clock, job.reporter.say)


@contextlib.contextmanager
def _bar(job: Job, description: str, total: int, compiles: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar; when something first comes through the network is noted."""
    with job.reporter.progress(description, total, compiles) as bar:

        def shown(done: int) -> None:
            if done:
                job.writer.clock.note_first_step()
            bar(done)

        yield shown


@contextlib.contextmanager
def _compiling_bar(job: Job, description: str, total: int, first: bool) -> Iterator[Callable[[int], None]]:
    """A bar of work that begins at once; the first time that it is done it is compiled."""
    with _bar(job, description, total, compiles=first) as bar:
        if first:
            bar(0)
        yield bar


def _shown_runner(job: Job, runner: Runner, trained: Callable[[int, int], None] = lambda *_: None) -> Runner:
    """A runner with a bar.

    Args:
      job: that it is part of.
      runner: of the epochs.
      trained: is called with the epoch and the number of its examples that are done.
    """
    calls = itertools.count()

    def shown(
        state: TrainState, epoch: int, steps: range, on_examples: Callable[[int], None], stopping: Callable[[], bool]
    ) -> tuple[TrainState, StepMetrics]:
        with _compiling_bar(job, f"Epoch {epoch + 1}", len(job.problem.train.labels), not next(calls)) as bar:

            def on_step(done: int) -> None:
                bar(done)
                trained(epoch, done)

            return runner(state, epoch, steps, on_step, stopping)

    return runner._replace(run=shown)


def _shown_evaluation(
    job: Job, evaluate: Callable[..., EvalResult], dataset: Dataset, name: str, plan: _Plan
) -> Evaluate:
    """An evaluation with a bar, which a signal ends."""
    calls = itertools.count()

    def shown(params: Any, batch_stats: Any = ()) -> EvalResult:
        with _compiling_bar(job, f"Evaluating {name} images", len(dataset.labels), not next(calls)) as bar:

            def on_examples(done: int) -> None:
                bar(done)
                plan.evaluated(done)
                if job.stopping():
                    raise KeyboardInterrupt

            return evaluate(params, batch_stats, on_examples)

    return shown
