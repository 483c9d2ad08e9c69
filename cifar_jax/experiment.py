"""The complete training job: data, backbone, features, training, evaluation, figures and the run directory."""

import contextlib
import logging
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from cifar_jax.config import TrainConfig
from cifar_jax.data.describe import class_words, original_sizes, range_words, split_words
from cifar_jax.errors import UserError
from cifar_jax.models.head import Head
from cifar_jax.pretrained import AnyBackbone
from cifar_jax.runs.checkpoint import Position, load_checkpoint
from cifar_jax.runs.directory import CHECKPOINTS, RunInputs, claimed, default_run_dir
from cifar_jax.runs.ending import summary_written, training_explained
from cifar_jax.runs.match import require_same_inputs
from cifar_jax.runs.resume import NO_PROGRESS, Progress, check_state, find_run, load_state
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
from cifar_jax.train.load_inputs import (
    Inputs,
    load_inputs,
    require_same_inputs_everywhere,
    warn_of_classes,
    warn_of_shared_images,
)
from cifar_jax.train.loop import fit
from cifar_jax.train.losses import LossFn
from cifar_jax.train.rehearsal import state_shapes
from cifar_jax.train.step import TrainState
from cifar_jax.train.task import Augment

logger = logging.getLogger(__name__)


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
    names = parts.names()
    with (
        profiled(config.run.profile),
        Signals(jax.process_count() == 1, _acknowledge) as signals,
        contextlib.ExitStack() as lock,
    ):
        mesh = make_mesh(config.optim.devices)
        _check(config, parts, mesh)
        out = Path(from_first(lambda: config.run.out or str(default_run_dir(config))))

        def find() -> dict[str, Any]:
            lock.enter_context(claimed(out))
            return find_run(out, config, names)

        found = from_first(find)
        if found["finished"]:
            logger.info(f"The run in {out} is finished; there is nothing to resume.")
            return out
        progress = Progress.from_json(found["progress"]) if found["progress"] else NO_PROGRESS
        clock, stopping = Clock(), agreed(lambda: bool(signals.requested))
        inputs = load_inputs(config, clock, reporter.progress, backbone)
        require_same_inputs_everywhere(config, inputs, names)
        if found["inputs"]:
            require_same_inputs(out, RunInputs(*found["inputs"]), RunInputs(inputs.digests(), names))
        warn_of_shared_images(inputs.data)
        warn_of_classes(config, inputs.data)
        reporter.header(_header(config, inputs, names, out, mesh.size))
        _rehearse(config, inputs, parts, mesh, out, progress)
        if progress.position > (0, 0):
            logger.info(f"Resuming the run in {out} after {progress.position.words}.")
        from cifar_jax.report.run_figures import write_pictures, write_samples  # matplotlib takes a second

        writer = RunWriter(out, config, inputs, clock, progress, names)
        with summary_written(writer, signals):
            with signals.deferred():
                writer.start(resumes=found["progress"] is not None)
            writer.draw(write_samples, inputs.data)
            training = prepare(config, inputs, parts, mesh, clock, reporter, progress.position.epoch, stopping)
            if training.extracted:
                writer.extracted(training.extracted)
            scores = _Scores(config, training, writer, inputs.data.held_out, reporter)
            with signals.polled(), training_explained(config, training, writer, own_tx=tx is not None):
                with clock("training"):
                    state, _ = fit(
                        _start(training, out, progress.position),
                        training.task.frozen,
                        training.advance,
                        scores.validate,
                        config.optim.epochs,
                        first_epoch=progress.position.epoch,
                        part=progress.part,
                        checkpoint_every=config.run.checkpoint_every,
                        on_epoch=scores.on_epoch,
                        on_part=lambda part, state: writer.checkpoint(state, part),
                        stopping=stopping,
                        reporter=training.reporter,
                    )
                with clock("evaluation"):
                    val, test = scores.of_selected(state)
                if stopping():
                    raise KeyboardInterrupt
            writer.draw(write_pictures, inputs.data, writer.history, val, test, config.optim.seed)
            with signals.deferred():
                writer.finish("complete", val, test)
    return out


def _start(training: Training, out: Path, position: Position) -> TrainState:
    """The state to start from: the initial one, or that of a checkpoint."""
    if position == (0, 0):
        return training.state
    return arrays_from_first(load_state(out / CHECKPOINTS, training.state, position) if is_first() else training.state)


class _Scores:
    """Evaluation after each epoch, and of the selected epoch at the end, in every process."""

    def __init__(
        self, config: TrainConfig, training: Training, writer: RunWriter, held_out: bool, reporter: Reporter
    ) -> None:
        self._evaluate, self._mesh = training.evaluate, training.advance.mesh
        self._writer, self._held_out = writer, held_out
        self._reporter, self._num_epochs = reporter, config.optim.epochs
        self._val: EvalResult | None = None  # of the selected epoch

    def validate(self, state: TrainState) -> EvalResult:
        """Scores a state on the validation images."""
        return self._evaluate(state, split="val" if self._held_out else "test")

    def on_epoch(self, row: EpochRow, result: EvalResult, state: TrainState) -> None:
        """Records a completed epoch, and keeps its scores if it is the selected one."""
        self._writer.epoch(row, state)
        if self._writer.selected_epoch == row.epoch:
            self._val = result
        self._reporter.epoch(row, self._num_epochs)

    def of_selected(self, last: TrainState) -> tuple[EvalResult, EvalResult]:
        """Scores of the selected epoch on validation and test images; the same scores unless images were held out."""
        state, selected = last, self._writer.selected_epoch
        if selected != len(self._writer.history):
            like = {"params": last.params, "batch_stats": last.batch_stats}
            best = load_checkpoint(self._writer.out / CHECKPOINTS, like, Position(selected)) if is_first() else like
            # On the devices once, not at every batch of the evaluation.
            state = replicate(self._mesh, last._replace(**arrays_from_first(best), opt_state=()))
        val = self._val or self.validate(state)
        return val, self._evaluate(state, split="test") if self._held_out else val


def _rehearse(config: TrainConfig, inputs: Inputs, parts: Parts, mesh: Mesh, out: Path, progress: Progress) -> None:
    """Finds errors in user-supplied functions, and a mismatch with the checkpoint, before any file is touched."""
    resumes = progress.position > (0, 0)
    if resumes or any(part is not None for part in parts):
        shapes = state_shapes(config, inputs, parts, mesh, steps=any(part is not None for part in parts))
        if resumes:
            from_first(lambda: check_state(out / CHECKPOINTS, shapes, progress.position))


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
    data, backbone, image_size = inputs
    optim, names = config.optim, data.splits.class_names
    val = {"validation" if data.splits.val else data.val_name: len(data.val.labels)} if data.held_out else {}
    counts = {"training": len(data.train.labels)} | val | {"test": len(data.test.labels)}
    title, sizes = f"{data.splits.name} {data.splits.version}".strip(), range_words(original_sizes(data.parts))
    validation = "test images, as in the notebook (hold some out with --val-fraction)"
    if data.held_out:
        validation = "the data set's own validation images" if data.splits.val else "held-out training images"
    sgd = f", SGD {optim.learning_rate:g}" + (f", momentum {optim.momentum:g}" if optim.momentum else "")
    replaced = ", ".join(f"{part} {name}" for part, name in parts.items())
    return {
        "data": f"{title}: {class_words(names)}, {split_words(counts)}, {sizes}",
        "resize": data.resize.words(image_size),
        **({"notes": "; ".join(data.splits.notes)} if data.splits.notes else {}),
        "validation": validation,
        "weights": f"{backbone.source}, SHA-256 {backbone.sha256[:16]}",
        "variant": f"{backbone.variant}; {backbone.input_words(image_size)}",
        "device": f"{device_description(devices)}, {config.backbone.precision}",
        "training": f"{optim.mode}: {optim.epochs} epochs, batch {optim.batch_size}{'' if 'tx' in parts else sgd}",
        **({"replaced": replaced} if replaced else {}),
        "run": str(out),
    }
