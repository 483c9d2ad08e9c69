"""The main job from end to end: data, backbone, features, training, evaluation, pictures, the run directory."""

import contextlib
import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.checkpoint import Position
from cifar_jax.clock import Clock
from cifar_jax.config import TrainConfig
from cifar_jax.data import Dataset, Problem, load_problem
from cifar_jax.data.dataset import IMAGE_SHAPE
from cifar_jax.data.problem import images_in_both
from cifar_jax.environment import device_description
from cifar_jax.errors import RunError, UserError
from cifar_jax.fit import Diverged, EpochRow, fit
from cifar_jax.groups import OF_A_PROCESS
from cifar_jax.interruption import Signals, listening
from cifar_jax.keys import stream_key
from cifar_jax.optimizer import make_schedule
from cifar_jax.parallel import make_mesh
from cifar_jax.pretrained import UNTRAINED, Backbone, load_backbone, random_backbone
from cifar_jax.pretrained.untrained import calibration_images
from cifar_jax.processes import agreed, arrays_from_first, from_first, is_first, require_same
from cifar_jax.profiling import profiled
from cifar_jax.reporter import Reporter, Silent
from cifar_jax.resume import (
    NO_PROGRESS,
    Progress,
    differing,
    find_progress,
    is_finished,
    load_state,
    require_same_inputs,
    status,
)
from cifar_jax.routes import Job, Route, check_divisible, make_route
from cifar_jax.run_dir import CHECKPOINTS, check_run_dir, claimed, default_run_dir, is_run
from cifar_jax.run_writer import NoWriter, RunWriter
from cifar_jax.training import TrainState


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came; what was done until then is in the run directory."""

    def __init__(self, path: Path, saved: Position, exit_code: int):
        """Takes the run directory, the position of its newest checkpoint, and what the process should end with."""
        self.path, self.saved, self.exit_code = path, saved, exit_code
        super().__init__(f"interrupted after {saved.words}, saved in {path}")


def load_problem_and_backbone(config: TrainConfig, reporter: Reporter, clock: Clock) -> tuple[Problem, Backbone]:
    """The images and the backbone of a configuration: loaded, or for `random` made from the images.

    Raises:
      UserError: when either cannot be had, or they do not fit together.
    """
    untrained = config.backbone.weights in UNTRAINED
    if untrained and config.backbone.variant is not None:
        raise UserError(
            f"--variant {config.backbone.variant} is for pretrained weights; leave it out with --weights "
            f"{config.backbone.weights}."
        )
    # Weights first: a name typed wrong should not cost the download of a data set.
    with clock("weights"):
        loaded = None if untrained else _load_backbone(config, reporter)
    with clock("data"):
        problem = load_problem(config, reporter.say)
    with clock("weights"):
        return problem, loaded or make_untrained(config, problem.train, reporter)


def _load_backbone(config: TrainConfig, reporter: Reporter) -> Backbone:
    cache_dir, say, progress = config.run.cache_dir, reporter.say, reporter.progress
    return load_backbone(
        config.backbone.weights, config.backbone.variant, cache_dir=cache_dir, say=say, progress=progress
    )


def make_untrained(config: TrainConfig, train: Dataset, reporter: Reporter) -> Backbone:
    """A random backbone calibrated on the training images, which is said loudly."""
    reporter.warn(
        f"--weights {config.backbone.weights} is an UNTRAINED network: random kernels, BatchNorm statistics calibrated "
        "on training images. Its accuracy is a baseline, not transfer learning."
    )
    network, image_size = UNTRAINED[config.backbone.weights]
    image_size = config.backbone.image_size or image_size
    images = np.asarray(train.images[: calibration_images(image_size)])
    key = stream_key(config.optim.seed, "backbone")
    return random_backbone(key, images, network, image_size, f"{config.backbone.weights} (seed {config.optim.seed})")


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

    def acknowledge(number: signal.Signals, is_held: bool) -> None:
        again = "; press Ctrl-C again to quit at once" if number == signal.SIGINT else " (SIGTERM)"
        reporter.say(f"Stopping{' after this step' if is_held else ''}{again}.")

    alone = jax.process_count() == 1
    with profiled(config.run.profile, reporter.say), listening(alone, acknowledge) as signals:
        return _train(config, reporter, signals)


def _train(config: TrainConfig, reporter: Reporter, signals: Signals) -> Path:
    mesh = make_mesh(config.optim.devices)
    check_divisible(config, mesh)
    found = from_first(lambda: _find_run(config, reporter))
    out, progress = Path(found["out"]), found["progress"] and Progress.from_json(found["progress"])
    if found["finished"]:
        reporter.say(f"The run in {out} is finished; there is nothing to resume.")
        return out
    clock = Clock()
    problem, backbone = load_problem_and_backbone(config, reporter, clock)
    _require_same(config, problem, backbone)
    if shared := images_in_both(problem.train, problem.val):
        of = f"{shared:,} of {len(problem.val.labels):,} {problem.val_name} images"
        reporter.warn(f"{of} are training images too, bit by bit: the accuracy on them says little.")
    image_size = network_image_size(config, backbone)
    reporter.header(_header(config, problem, backbone, image_size, out, mesh.size))
    progress = progress or NO_PROGRESS
    if progress.position > (0, 0):
        reporter.say(f"Resuming the run in {out} after {progress.position.words}.")
    writer_class = RunWriter if is_first() else NoWriter
    writer = writer_class(out, config, problem, backbone, image_size, clock, progress)
    require_same_inputs(out, progress, writer.inputs)
    job = Job(config, problem, backbone, image_size, reporter, writer, mesh, agreed(lambda: bool(signals.requested)))
    resumes = found["progress"] is not None
    with claimed(out) if is_first() else contextlib.nullcontext():
        if is_first():
            _check_again(out, config, found["progress"])
        return _run(job, progress, resumes, signals)


def _run(job: Job, progress: Progress, resumes: bool, signals: Signals) -> Path:
    """All that is written, from the first file to the last."""
    writer, clock = job.writer, job.writer.clock
    try:
        with signals.held():
            writer.start(resumes)
        with clock("pictures"):
            writer.samples()
        route = make_route(job)
        with signals.noted():
            trained = _fit(job, route, progress)
            with clock("evaluation"):
                val = route.evaluate_val(trained.params, trained.batch_stats)
                test = route.evaluate_test(trained.params, trained.batch_stats) if job.problem.held_out else val
            if job.stopping():
                raise KeyboardInterrupt
        with clock("pictures"):
            state = jax.device_get(trained)
            writer.pictures(
                partial(route.val_probabilities, state), val, partial(route.test_probabilities, state), test
            )
        with signals.held():
            writer.finish("complete", val, test)
    except KeyboardInterrupt:
        stopped = Interrupted(writer.out, writer.saved, signals.exit_code)
        _finish_after(stopped, writer, "interrupted", signals)
        raise stopped from None
    except Diverged as error:
        _finish_after(error, writer, "diverged", signals)
        raise
    except (RunError, MemoryError, jax.errors.JaxRuntimeError) as error:
        _finish_after(error, writer, "failed", signals)
        raise
    return writer.out


def _finish_after(error: Exception, writer: RunWriter, status: str, signals: Signals) -> None:
    """Writes the summary of a run that ended early. What goes wrong there is a note on the error, which comes first."""
    try:
        with signals.noted():
            writer.finish(status)
    except Exception as second:
        reason = str(second) if isinstance(second, UserError | RunError) else f"{type(second).__name__}: {second}"
        error.add_note(f"Writing the summary failed too: {reason}")


def _find_run(config: TrainConfig, reporter: Reporter) -> dict[str, Any]:
    """The run's directory, its progress (None for a new run) and whether it is finished, as JSON values.

    Raises:
      UserError: if it can be neither started nor resumed.
    """
    out = Path(config.run.out) if config.run.out else default_run_dir(config)
    resume = config.run.resume or (not config.run.overwrite and _is_to_go_on(out, config, reporter))
    progress = find_progress(out, config, reporter.say) if resume else None
    finished = is_finished(out, config, progress)
    if not finished:
        check_run_dir(out, config, resumes=progress is not None)
    return {"out": str(out), "progress": progress and progress.to_json(), "finished": finished}


def _check_again(out: Path, config: TrainConfig, progress: dict[str, Any] | None) -> None:
    """Checks the directory once more, now that no other process writes it: one may have while this one loaded.

    Raises:
      UserError: if the directory is not what it was when `_find_run` looked.
    """
    check_run_dir(out, config, resumes=progress is not None)
    if progress is None:
        return
    now = find_progress(out, config, lambda _: None)
    if now is None or now.to_json() != progress:
        raise UserError(f"Another process continued the run in {out} meanwhile. Run the command again.")


def _is_to_go_on(out: Path, config: TrainConfig, reporter: Reporter) -> bool:
    """Asks whether to resume, if the same command finds its own unfinished run."""
    try:
        if not is_run(out) or differing(out, config) or status(out) in ("complete", "diverged"):
            return False
    except (UserError, OSError):
        return False
    return reporter.confirm(f"{out} holds this run, unfinished. Resume it?")


def _require_same(config: TrainConfig, problem: Problem, backbone: Backbone) -> None:
    """Sees to it that processes which train together do the same; where files lie may differ."""
    if (processes := jax.process_count()) > 1:
        fewest = min(len(part.labels) for part in (problem.train, problem.val, problem.test))
        if fewest < processes:
            raise UserError(f"{fewest} images cannot be divided between {processes} processes; use more images.")
        # Of weights the content is compared.
        options = {k: v for k, v in config.to_json().items() if k not in ("weights", *OF_A_PROCESS)}
        data = [part.fingerprint() for part in (problem.train, problem.val, problem.test)]
        require_same({"options": json.dumps(options), "data": json.dumps(data), "weights": backbone.sha256})


def network_image_size(config: TrainConfig, backbone: Backbone) -> int:
    """The side in pixels that images are upsampled to.

    Raises:
      UserError: when the weights ask for one that 32 pixels cannot be upsampled to.
    """
    image_size = config.backbone.image_size or backbone.image_size
    if image_size % IMAGE_SHAPE[0]:
        raise UserError(
            f"{backbone.source} asks for images of {image_size} pixels a side, which is no multiple of "
            f"{IMAGE_SHAPE[0]}; name another --image-size."
        )
    return image_size


def _fit(job: Job, route: Route, progress: Progress) -> TrainState:
    """Trains. Returns the last epoch's state, or where images were held out for it the best one's."""
    config, writer, checkpoints = job.config, job.writer, job.writer.out / CHECKPOINTS
    state, best = route.state, []

    def restored(position: Position) -> TrainState:
        return arrays_from_first(load_state(checkpoints, route.state, position) if is_first() else route.state)

    if progress.position > (0, 0):
        state = restored(progress.position)
        best = [state]  # without held-out images the newest; the end of an epoch replaces it
    if job.problem.held_out and writer.selected_epoch:
        best = [restored(Position(writer.selected_epoch))]

    def on_epoch(row: EpochRow, state: TrainState) -> None:
        writer.epoch(row)
        writer.checkpoint(state)
        if writer.selected_epoch == row.epoch:
            # A copy, as the next step is given the state's own memory.
            best[:] = [jax.tree.map(jnp.copy, state._replace(opt_state=()))]
        job.reporter.epoch(row, config.optim.epochs)

    try:
        with writer.clock("training"):
            fit(
                state,
                route.runner,
                route.evaluate_val,
                config.optim.epochs,
                on_epoch,
                first_epoch=progress.position.epoch,
                part=progress.part,
                checkpoint_every=config.run.checkpoint_every,
                on_part=lambda part, state: writer.checkpoint(state, part),
                stopping=job.stopping,
            )
    except Diverged as error:
        schedule = make_schedule(config, config.optim.learning_rate, job.steps_per_epoch)
        raise error.at(float(schedule(error.state.step)), writer.saved, writer.out) from None
    return best[0]


def _header(
    config: TrainConfig, problem: Problem, backbone: Backbone, image_size: int, out: Path, devices: int
) -> dict[str, str]:
    optim = config.optim
    counts = f"{len(problem.train.labels):,} training, {len(problem.val.labels):,} {problem.val_name}"
    if problem.held_out:
        counts += f", {len(problem.test.labels):,} test"
    chosen = "held-out training images" if problem.held_out else "test images (hold some out with --val-fraction)"
    return {
        "data": f"{problem.splits.name} {problem.splits.version}: {counts} images",
        "val_ figures": f"of the {chosen}",
        "weights": f"{backbone.source}, SHA-256 {backbone.sha256[:16]}",
        "variant": f"{backbone.variant}; {backbone.preprocessing.name} preprocessing, {image_size}x{image_size} pixels",
        "device": f"{device_description(devices)}, {config.backbone.precision}",
        "training": f"{optim.mode}: {optim.epochs} epochs, batch {optim.batch_size}, SGD {optim.learning_rate:g}"
        + (f", momentum {optim.momentum:g}" if optim.momentum else ""),
        "run": str(out),
    }
