"""The complete training job: data, backbone, features, training, evaluation, figures and the run directory."""

import contextlib
import logging
import shlex
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cifar_jax.config import TrainConfig
from cifar_jax.errors import RunError, UserError
from cifar_jax.models.head import Head
from cifar_jax.pretrained import AnyBackbone
from cifar_jax.runs.checkpoint import Position
from cifar_jax.runs.directory import CHECKPOINTS, RunInputs, claimed
from cifar_jax.runs.match import rates_of, require_same_inputs
from cifar_jax.runs.resume import NO_PROGRESS, Progress, check_again, check_state, find_run, load_state, selected_epoch
from cifar_jax.runs.writer import RunWriter
from cifar_jax.runtime.machine_info import device_description
from cifar_jax.runtime.multihost import agreed, arrays_from_first, from_first, is_first
from cifar_jax.runtime.profiling import profiled
from cifar_jax.runtime.progress import EpochRow, Reporter, Silent
from cifar_jax.runtime.sharding import make_mesh, replicate
from cifar_jax.runtime.signals import Signals
from cifar_jax.runtime.timing import Clock
from cifar_jax.train.evaluate import EvalResult
from cifar_jax.train.from_config import Parts, Training, check_parts, prepare
from cifar_jax.train.load_inputs import Inputs, load_inputs, require_same_inputs_everywhere, warn_of_shared_images
from cifar_jax.train.loop import Diverged, EpochPart, fit
from cifar_jax.train.losses import LossFn
from cifar_jax.train.optimizer import make_schedule
from cifar_jax.train.rehearsal import state_shapes
from cifar_jax.train.step import TrainState
from cifar_jax.train.task import Augment

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """Raised after Ctrl-C or SIGTERM; the progress until then is saved in the run directory."""

    def __init__(self, path: Path, saved: Position, exit_code: int):
        """Takes the run directory, the position of its newest checkpoint, and the exit code for the process."""
        self.path, self.saved, self.exit_code = path, saved, exit_code
        super().__init__(f"interrupted after {saved.words}, saved in {path}")


def train(
    config: TrainConfig,
    reporter: Reporter | None = None,
    *,
    loss_fn: LossFn | None = None,
    head: Head | None = None,
    backbone: AnyBackbone | None = None,
    tx: optax.GradientTransformation | None = None,
    augment: Augment | None = None,
) -> Path:
    """Runs the complete training job, profiled if `config.run.profile` is set.

    In a multi-process job, call it in all processes; only the first one shows progress and writes files.

    Args:
      config: the configuration.
      reporter: shows progress.
      loss_fn: `(logits, labels) -> [batch]`, replaces cross-entropy.
      head: replaces the dense head.
      backbone: replaces the backbone that the configuration names.
      tx: the optimiser, replaces SGD.
      augment: `(key, batch) -> batch`, replaces `--augment`; not for `cached` mode, which reads the pixels only once.

    Returns:
      The run directory.

    Raises:
      UserError: if the input is invalid; if detected before training, nothing was written.
      RunError: if the job failed; the progress until then is saved in the run directory.
      Interrupted: on Ctrl-C or SIGTERM.
    """
    reporter = (reporter if is_first() else None) or Silent()
    parts = Parts(loss_fn, head, backbone, tx, augment)
    with profiled(config.run.profile), Signals(jax.process_count() == 1, _acknowledge) as signals:
        mesh = make_mesh(config.optim.devices)
        _check(config, parts, mesh)
        names = parts.names()
        found = from_first(lambda: find_run(config, names))
        out, progress = Path(found["out"]), Progress.from_json(found["progress"]) if found["progress"] else NO_PROGRESS
        if found["finished"]:
            logger.info(f"The run in {out} is finished; there is nothing to resume.")
            return out
        clock = Clock()
        inputs = load_inputs(config, clock, reporter.progress, backbone)
        require_same_inputs_everywhere(config, inputs, names)
        if found["inputs"]:
            require_same_inputs(out, RunInputs(*found["inputs"]), RunInputs(inputs.digests(), names))
        warn_of_shared_images(inputs.problem)
        reporter.header(_header(config, inputs, names, out, mesh.size))
        _rehearse(config, inputs, parts, mesh, out, progress)
        if progress.position > (0, 0):
            logger.info(f"Resuming the run in {out} after {progress.position.words}.")
        writer = RunWriter(out, config, inputs, clock, progress, names) if is_first() else None
        stopping = agreed(lambda: bool(signals.requested))
        with claimed(out) if writer else contextlib.nullcontext(), _ended(writer, out, signals):
            if writer:
                from cifar_jax.report.run_figures import write_pictures, write_samples  # matplotlib takes a second

                check_again(out, config, found["progress"], names)
                with signals.deferred():
                    writer.start(resumes=found["progress"] is not None)
                with writer.pictures():
                    write_samples(out, inputs.problem)
            training = prepare(config, inputs, parts, mesh, clock, reporter, progress.position.epoch, stopping)
            if writer and training.extracted:
                writer.extracted(training.extracted.num_images, training.extracted.seconds)
            record = _Record(config, inputs, out, training, progress, writer, reporter)
            with signals.polled(), record.explained(own_tx=parts.tx is not None):
                with clock("training"):
                    state, _ = fit(
                        record.state,
                        training.task.frozen,
                        training.advance,
                        record.validate,
                        config.optim.epochs,
                        first_epoch=progress.position.epoch,
                        part=progress.part,
                        checkpoint_every=config.run.checkpoint_every,
                        on_epoch=record.epoch,
                        on_part=record.part,
                        stopping=stopping,
                        reporter=training.reporter,
                    )
                with clock("evaluation"):
                    val, test = record.scores(state)
                if stopping():
                    raise KeyboardInterrupt
            if writer:
                with writer.pictures():
                    write_pictures(out, inputs.problem, writer.history, val, test, config.optim.seed)
                with signals.deferred():
                    writer.finish("complete", val, test)
    return out


class _Record:
    """The state and scores that training keeps, in every process; only the first process writes them to disk."""

    def __init__(
        self,
        config: TrainConfig,
        inputs: Inputs,
        out: Path,
        training: Training,
        progress: Progress,
        writer: RunWriter | None,
        reporter: Reporter,
    ) -> None:
        """Restores the state at the position of `progress`."""
        self._config, self._out, self._training = config, out, training
        self._writer, self._reporter = writer, reporter
        self._held_out, self._rows = inputs.problem.held_out, list(progress.rows)
        self.state = self._restored(progress.position)
        self._best: TrainState | None = None  # state of the selected epoch, if images are held out
        self._result: EvalResult | None = None  # scores of the selected epoch
        if self._held_out and (selected := selected_epoch(self._rows, self._held_out)):
            best = self._restored(Position(selected))._replace(opt_state=())
            self._best = replicate(training.advance.mesh, best)  # once, not at every evaluation

    def _restored(self, position: Position) -> TrainState:
        start = self._training.state
        if position == (0, 0):
            return start
        return arrays_from_first(load_state(self._out / CHECKPOINTS, start, position) if is_first() else start)

    def validate(self, state: TrainState) -> EvalResult:
        """Scores a state on the validation images."""
        return self._training.evaluate(state, self._training.task.frozen, "val" if self._held_out else "test")

    def epoch(self, row: EpochRow, result: EvalResult, state: TrainState) -> None:
        """Records a completed epoch, and keeps its state and scores if it is the selected one."""
        self._rows.append(row)
        if self._writer:
            self._writer.epoch(row)
            self._writer.checkpoint(state)
        if selected_epoch(self._rows, self._held_out) == row.epoch:
            self._result = result
            if self._held_out:
                # A copy, as the next step donates the state.
                self._best = jax.tree.map(jnp.copy, state._replace(opt_state=()))
        self._reporter.epoch(row, self._config.optim.epochs)

    def part(self, part: EpochPart, state: TrainState) -> None:
        """Saves a checkpoint within an epoch."""
        if self._writer:
            self._writer.checkpoint(state, part)

    def scores(self, last: TrainState) -> tuple[EvalResult, EvalResult]:
        """Scores of the selected epoch on validation and test images; the same scores unless images were held out."""
        state = self._best or last
        val = self._result or self.validate(state)
        return val, self._training.evaluate(state, self._training.task.frozen, "test") if self._held_out else val

    @contextlib.contextmanager
    def explained(self, own_tx: bool) -> Iterator[None]:
        """Adds the cause and the next step to a `Diverged` error; `own_tx`: whether `tx` was passed to `train`."""
        try:
            yield
        except Diverged as error:
            fault = error.fault or self._training.fault(error.state, error.epoch - 1, error.step - 1)
            saved = self._writer.saved if self._writer else Position(len(self._rows))
            kept = f"The checkpoint after {saved.words} is kept. " if saved > (0, 0) else ""
            if own_tx:
                more = f"{kept}Continue with a lower rate in tx and resume=True, or start again with overwrite=True."
            else:
                rate, backbone_rate = self._rates_at(error.epoch, error.step)
                was, lower = f"The learning rate was {rate:.3g}", "--learning-rate"
                if backbone_rate is not None:
                    was += f", that of the backbone {backbone_rate:.3g}"
                    lower += " or --backbone-learning-rate"
                more = (
                    f"{was}. {kept}Continue with a lower {lower} and --resume --out {shlex.quote(str(self._out))}, or "
                    "start again with --overwrite."
                )
            raise Diverged(error.state, error.epoch, error.step, fault, more) from None

    def _rates_at(self, epoch: int, step: int) -> list[float | None]:
        """The learning rates of `rates_of` at a step of an epoch, both counted from one."""
        steps = self._training.advance.steps_per_epoch
        count = jnp.int32((epoch - 1) * steps + step - 1)
        return [
            None if peak is None else float(make_schedule(self._config, peak, steps)(count))
            for peak in rates_of(self._config)
        ]


def _rehearse(config: TrainConfig, inputs: Inputs, parts: Parts, mesh: Mesh, out: Path, progress: Progress) -> None:
    """Finds errors in user-supplied functions, and a mismatch with the checkpoint, before any file is touched."""
    resumes = progress.position > (0, 0)
    if resumes or any(part is not None for part in parts):
        shapes = state_shapes(config, inputs, parts, mesh, steps=any(part is not None for part in parts))
        if resumes:
            from_first(lambda: check_state(out / CHECKPOINTS, shapes, progress.position))


@contextlib.contextmanager
def _ended(writer: RunWriter | None, out: Path, signals: Signals) -> Iterator[None]:
    """Writes the summary of a run that ends early, once the run directory has been started."""
    try:
        yield
    except KeyboardInterrupt:
        stopped = Interrupted(out, writer.saved if writer else Position(0), signals.exit_code)
        _finish_after(stopped, writer, "interrupted", signals)
        raise stopped from None
    except Diverged as error:
        _finish_after(error, writer, "diverged", signals)
        raise
    except Exception as error:  # including those of user-supplied functions
        _finish_after(error, writer, "failed", signals)
        raise


def _finish_after(error: Exception, writer: RunWriter | None, status: str, signals: Signals) -> None:
    """Writes the summary of a run that ended early. A failure to do so is added as a note to the original error."""
    try:
        with signals.polled():
            if writer and writer.started:
                writer.finish(status)
    except Exception as second:
        reason = str(second) if isinstance(second, UserError | RunError) else f"{type(second).__name__}: {second}"
        error.add_note(f"Writing the summary failed too: {reason}")


def _acknowledge(number: signal.Signals, is_held: bool) -> None:
    again = "; press Ctrl-C again to quit at once" if number == signal.SIGINT else " (SIGTERM)"
    logger.info(f"Stopping{' after this step' if is_held else ''}{again}.")


def _check(config: TrainConfig, parts: Parts, mesh: Mesh) -> None:
    """Checks that options and replaced components are compatible, before anything is loaded.

    Raises:
      UserError: if they are not, naming the conflict.
    """
    micro_batch = config.finetune.micro_batch
    if micro_batch and micro_batch % mesh.size:  # padding would change the batches that BatchNorm sees
        raise UserError(
            f"--micro-batch {micro_batch} cannot be divided between {mesh.size} devices; name a multiple, or fewer "
            "--devices."
        )
    check_parts(config, parts)


def _header(config: TrainConfig, inputs: Inputs, parts: Mapping[str, str], out: Path, devices: int) -> dict[str, str]:
    problem, backbone, image_size = inputs
    counts = f"{len(problem.train.labels):,} training, {len(problem.val.labels):,} {problem.val_name}"
    if problem.held_out:
        counts += f", {len(problem.test.labels):,} test"
    optim = config.optim
    chosen = "held-out training images" if problem.held_out else "test images (hold some out with --val-fraction)"
    sgd = f", SGD {optim.learning_rate:g}" + (f", momentum {optim.momentum:g}" if optim.momentum else "")
    replaced = ", ".join(f"{part} {name}" for part, name in parts.items())
    return {
        "data": f"{problem.splits.name} {problem.splits.version}: {counts} images",
        "val_ figures": f"of the {chosen}",
        "weights": f"{backbone.source}, SHA-256 {backbone.sha256[:16]}",
        "variant": f"{backbone.variant}; {backbone.input_words(image_size)}",
        "device": f"{device_description(devices)}, {config.backbone.precision}",
        "training": f"{optim.mode}: {optim.epochs} epochs, batch {optim.batch_size}{'' if 'tx' in parts else sgd}",
        **({"replaced": replaced} if replaced else {}),
        "run": str(out),
    }
