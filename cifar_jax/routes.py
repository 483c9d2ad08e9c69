"""The ways to a trained head: on cached features, live through a frozen backbone, or with the backbone training too."""

import contextlib
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
from cifar_jax.head import HeadParams, init_head
from cifar_jax.keys import stream_key
from cifar_jax.optimizer import make_optimizer
from cifar_jax.pretrained import Backbone
from cifar_jax.processes import gather, own_rows
from cifar_jax.reporter import Reporter
from cifar_jax.run_writer import RunWriter
from cifar_jax.runners import (
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
        return -(-len(self.problem.train.labels) // self.config.batch_size)


def check_divisible(config: TrainConfig, mesh: Mesh) -> None:
    """Refuses pieces of a batch that cannot be divided: filled up, each would be normalised by other examples.

    Raises:
      UserError: when --micro-batch is no multiple of the number of devices.
    """
    if config.micro_batch and config.micro_batch % mesh.size:
        raise UserError(
            f"--micro-batch {config.micro_batch} cannot be divided between {mesh.size} devices; name a multiple, or "
            "fewer --devices."
        )


def make_route(job: Job) -> Route:
    """The way that the configuration asks for."""
    return {"cached": _cached, "live": _live, "finetune": _finetune}[job.config.mode](job)


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
        )
        features = {name: gather(own, len(datasets[name].labels)) for name, own in features.items()}
    train, val, test = (features[name] for name in ("training images", f"{problem.val_name} images", "test images"))
    tx = make_optimizer(config, job.steps_per_epoch)
    return Route(
        init_state(_init_head(job), tx),
        _shown_runner(
            job, cached_runner(train, problem.train.labels, tx, _order(config), config.label_smoothing, mesh)
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
    tx = make_optimizer(config, job.steps_per_epoch)
    runner = live_runner(
        backbone,
        problem.train,
        tx,
        _order(config),
        image_size,
        config.precision,
        config.label_smoothing,
        _augmentation(config),
        mesh,
    )
    extractor = make_extractor(backbone, image_size, config.precision, config.extract_batch_size)

    def evaluator(dataset: Dataset, name: str) -> Evaluate:
        on_images = live_evaluator(backbone, dataset, image_size, config.precision, config.extract_batch_size, mesh)
        return _shown_evaluation(job, on_images, dataset, name)

    return Route(
        init_state(_init_head(job), tx),
        _shown_runner(job, runner),
        evaluator(problem.val, problem.val_name),
        evaluator(problem.test, "test"),
        lambda state, indices: probabilities(state.params, extractor(problem.val.images[indices])),
        lambda state, indices: probabilities(state.params, extractor(problem.test.images[indices])),
    )


def _finetune(job: Job) -> Route:
    """Backbone and head train together."""
    config, problem, backbone, image_size, _, _, mesh, _ = job
    tx = make_optimizer(config, job.steps_per_epoch)
    order, augmentation = _order(config), _augmentation(config)
    runner = finetune_runner(config, backbone, problem.train, tx, order, image_size, augmentation, mesh)

    def evaluator(dataset: Dataset, name: str) -> Evaluate:
        on_images = finetune_evaluator(backbone, dataset, image_size, config.precision, config.extract_batch_size, mesh)
        return _shown_evaluation(job, on_images, dataset, name)

    def probabilities_of(dataset: Dataset) -> Probabilities:
        return lambda state, indices: finetune_probabilities(
            backbone, state.params, state.batch_stats, dataset.images[indices], image_size, config.precision
        )

    return Route(
        init_finetune(backbone.variables, _init_head(job), tx, config.zero_gamma),
        _shown_runner(job, runner),
        evaluator(problem.val, problem.val_name),
        evaluator(problem.test, "test"),
        probabilities_of(problem.val),
        probabilities_of(problem.test),
    )


def _init_head(job: Job) -> HeadParams:
    num_classes = len(job.problem.splits.class_names)
    key = stream_key(job.config.seed, "init")
    return init_head(key, job.backbone.config.features, job.config.hidden, num_classes)


def _order(config: TrainConfig) -> EpochOrder:
    keys = (stream_key(config.seed, "order"), stream_key(config.seed, "step"))
    return EpochOrder(*keys, config.batch_size, config.shuffle)


def _augmentation(config: TrainConfig) -> Augmentation | None:
    return Augmentation(stream_key(config.seed, "augment"), config.augment) if config.augment else None


@contextlib.contextmanager
def _bar(job: Job, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar; when something first comes through the network is noted."""
    with job.reporter.progress(description, total) as bar:

        def shown(done: int) -> None:
            job.writer.clock.note_first_step()
            bar(done)

        yield shown


def _shown_runner(job: Job, runner: Runner) -> Runner:
    """A runner with a bar."""

    def shown(
        state: TrainState, epoch: int, steps: range, on_examples: Callable[[int], None], stopping: Callable[[], bool]
    ) -> tuple[TrainState, StepMetrics]:
        with _bar(job, f"Epoch {epoch + 1}", len(job.problem.train.labels)) as bar:
            return runner(state, epoch, steps, bar, stopping)

    return runner._replace(run=shown)


def _shown_evaluation(job: Job, evaluate: Callable[..., EvalResult], dataset: Dataset, name: str) -> Evaluate:
    """An evaluation with a bar, which a signal ends."""

    def shown(params: Any, batch_stats: Any = ()) -> EvalResult:
        with _bar(job, f"Evaluating {name} images", len(dataset.labels)) as bar:

            def on_examples(done: int) -> None:
                bar(done)
                if job.stopping():
                    raise KeyboardInterrupt

            return evaluate(params, batch_stats, on_examples)

    return shown
