"""The main job from end to end: data, backbone, features, training, evaluation, pictures, the run directory."""

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.config import TrainConfig
from cifar_jax.data import Dataset, Problem, load_problem
from cifar_jax.data.dataset import IMAGE_SHAPE
from cifar_jax.environment import device_description
from cifar_jax.errors import RunError, UserError
from cifar_jax.files import undisturbed
from cifar_jax.fit import Diverged, EpochRow, fit
from cifar_jax.keys import stream_key
from cifar_jax.optimizer import make_schedule
from cifar_jax.parallel import make_mesh
from cifar_jax.pretrained import UNTRAINED, Backbone, load_backbone, random_backbone
from cifar_jax.pretrained.untrained import calibration_images
from cifar_jax.processes import arrays_from_first, from_first, is_first, require_same
from cifar_jax.profiling import profiled
from cifar_jax.reporter import Reporter, Silent
from cifar_jax.resume import epochs_done, is_finished, load_state, read_rows
from cifar_jax.routes import Job, Route, check_divisible, make_route
from cifar_jax.run_dir import CHECKPOINTS, check_run_dir, default_run_dir
from cifar_jax.run_writer import Clock, NoWriter, RunWriter
from cifar_jax.training import TrainState


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
        loaded = None if untrained else _load_backbone(config, reporter)
    with clock("data"):
        problem = load_problem(config, reporter.say)
    with clock("weights"):
        return problem, loaded or make_untrained(config, problem.train, reporter)


def _load_backbone(config: TrainConfig, reporter: Reporter) -> Backbone:
    cache_dir, say, progress = config.cache_dir, reporter.say, reporter.progress
    return load_backbone(config.weights, config.variant, cache_dir=cache_dir, say=say, progress=progress)


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
    """Runs the whole job, traced where `config.profile` asks for it.

    Where there are several processes, it runs in all of them, of which the first one says and writes things.

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
    reporter = reporter if reporter and is_first() else Silent()
    with profiled(config.profile, reporter.say):
        return _train(config, reporter)


def _train(config: TrainConfig, reporter: Reporter) -> Path:
    mesh = make_mesh(config.devices)
    check_divisible(config, mesh)
    found = from_first(lambda: _find_run(config))
    out, done = Path(found["out"]), found["done"]
    if found["finished"]:
        reporter.say(f"The run in {out} is finished; there is nothing to resume.")
        return out
    clock = Clock()
    problem, backbone = load_problem_and_backbone(config, reporter, clock)
    _require_same(config, problem, backbone)
    image_size = network_image_size(config, backbone)
    reporter.header(_header(config, problem, backbone, image_size, out, mesh.size))
    if done:
        reporter.say(f"The run in {out} goes on after epoch {done}.")
    history = [EpochRow(**row) for row in found["rows"]]
    writer = (RunWriter if is_first() else NoWriter)(out, config, problem, backbone, image_size, clock, history)
    try:
        with undisturbed():
            writer.start(resumes=done is not None)
        with clock("pictures"):
            writer.samples()
        job = Job(config, problem, backbone, image_size, reporter, writer, mesh)
        route = make_route(job)
        trained = _fit(job, route)
        with clock("evaluation"):
            val = route.evaluate_val(trained.params, trained.batch_stats)
            test = route.evaluate_test(trained.params, trained.batch_stats) if problem.held_out else val
        with clock("pictures"):
            writer.pictures(partial(route.val_probabilities, jax.device_get(trained)), val)
        writer.finish("complete", val, test)
    except KeyboardInterrupt:
        with undisturbed():
            writer.finish("interrupted")
        raise Interrupted(out, len(writer.history)) from None
    except Diverged as error:
        writer.diverged(error.state)
        raise
    except (RunError, MemoryError, jax.errors.JaxRuntimeError):
        with contextlib.suppress(RunError):  # a full disk may keep this from being written too
            writer.finish("failed")
        raise
    return out


def _find_run(config: TrainConfig) -> dict[str, Any]:
    """Where the run is, how many epochs of it are done (None where there is no run), and their figures; as JSON.

    Raises:
      UserError: when it can be neither begun nor gone on with.
    """
    out = Path(config.out) if config.out else default_run_dir(config)
    done = epochs_done(out, config) if config.resume else None
    finished = is_finished(out, config, done)
    if not finished:
        check_run_dir(out, config, resumes=done is not None)
    rows = read_rows(out, done) if done and not finished else []
    return {"out": str(out), "done": done, "finished": finished, "rows": [row._asdict() for row in rows]}


def _require_same(config: TrainConfig, problem: Problem, backbone: Backbone) -> None:
    """Sees to it that processes which train together do the same; where files lie may differ."""
    if jax.process_count() > 1:
        options = {k: v for k, v in config.to_json().items() if k not in ("weights", "data_dir", "cache_dir", "out")}
        data = [part.fingerprint() for part in (problem.train, problem.val, problem.test)]
        require_same({"options": json.dumps(options), "data": json.dumps(data), "weights": backbone.sha256})


def network_image_size(config: TrainConfig, backbone: Backbone) -> int:
    """The side in pixels that images are upsampled to.

    Raises:
      UserError: when the weights ask for one that 32 pixels cannot be upsampled to.
    """
    image_size = config.image_size or backbone.image_size
    if image_size % IMAGE_SHAPE[0]:
        raise UserError(
            f"{backbone.source} asks for images of {image_size} pixels a side, which is no multiple of "
            f"{IMAGE_SHAPE[0]}; name another --image-size."
        )
    return image_size


def _fit(job: Job, route: Route) -> TrainState:
    """Trains. Returns the last epoch's state, or where images were held out for it the best one's."""
    config, writer, checkpoints = job.config, job.writer, job.writer.out / CHECKPOINTS
    state, done, best = route.state, len(writer.history), []
    if done:
        state, selected = (
            arrays_from_first(load_state(checkpoints, state, epoch) if is_first() else state)
            for epoch in (done, writer.selected_epoch)
        )
        best = [selected]

    def on_epoch(row: EpochRow, state: TrainState) -> None:
        with undisturbed():
            writer.epoch(row)
            writer.checkpoint(state)
        if writer.selected_epoch == row.epoch:
            # A copy, as the next step is given the state's own memory.
            best[:] = [jax.tree.map(jnp.copy, state._replace(opt_state=()))]
        job.reporter.epoch(row, config.epochs)

    try:
        with writer.clock("training"):
            fit(state, route.run_epoch, route.evaluate_val, config.epochs, on_epoch, done)
    except Diverged as error:
        schedule = make_schedule(config, config.learning_rate, job.steps_per_epoch)
        raise error.at(float(schedule(error.state.step))) from None
    return best[0]


def _header(
    config: TrainConfig, problem: Problem, backbone: Backbone, image_size: int, out: Path, devices: int
) -> dict[str, str]:
    counts = f"{len(problem.train.labels):,} training, {len(problem.val.labels):,} {problem.val_name}"
    if problem.held_out:
        counts += f", {len(problem.test.labels):,} test"
    return {
        "data": f"{problem.splits.name} {problem.splits.version}: {counts} images",
        "weights": f"{backbone.source}, SHA-256 {backbone.sha256[:16]}",
        "variant": f"{backbone.variant}; {backbone.preprocessing.name} preprocessing, {image_size}x{image_size} pixels",
        "device": f"{device_description(devices)}, {config.precision}",
        "training": f"{config.mode}: {config.epochs} epochs, batch {config.batch_size}, SGD {config.learning_rate:g}"
        + (f", momentum {config.momentum:g}" if config.momentum else ""),
        "run": str(out),
    }
