"""Runs that end early, on a signal or with an error: their summary is written, and the error says how to continue."""

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from cifar_jax.config import TrainConfig
from cifar_jax.errors import RunError, UserError
from cifar_jax.runs.checkpoint import Position
from cifar_jax.runs.match import rates_of
from cifar_jax.runs.writer import RunWriter
from cifar_jax.runtime.devices import is_out_of_memory, out_of_memory
from cifar_jax.runtime.signals import Signals
from cifar_jax.train.from_config import Training
from cifar_jax.train.loop import Diverged
from cifar_jax.train.optimizer import make_schedule


class Interrupted(Exception):
    """Raised after Ctrl-C or SIGTERM; the progress until then is saved in the run directory."""

    def __init__(self, path: Path, saved: Position, exit_code: int):
        """Takes the run directory, the position of its newest checkpoint, and the exit code for the process."""
        self.path, self.saved, self.exit_code = path, saved, exit_code
        super().__init__(f"interrupted after {saved.words}, saved in {path}")


@contextlib.contextmanager
def summary_written(writer: RunWriter, signals: Signals) -> Iterator[None]:
    """Writes the summary of a run that ends early in the block. Ctrl-C and SIGTERM become `Interrupted`.

    A failure to write it is added as a note to the error that ended the run.
    """
    status = "failed"  # also by an error in a user-supplied function
    try:
        try:
            yield
        except KeyboardInterrupt:
            status = "interrupted"
            raise Interrupted(writer.out, writer.saved, signals.exit_code) from None
        except Diverged:
            status = "diverged"
            raise
    except Exception as error:
        try:
            with signals.polled():
                writer.finish(status)
        except Exception as second:
            reason = str(second) if isinstance(second, UserError | RunError) else f"{type(second).__name__}: {second}"
            error.add_note(f"Writing the summary failed too: {reason}")
        raise


@contextlib.contextmanager
def training_explained(config: TrainConfig, training: Training, writer: RunWriter, own_tx: bool) -> Iterator[None]:
    """Adds the cause and the next step to errors of training; `own_tx`: whether `tx` was passed to `train`.

    Raises:
      Diverged: in place of the same error without advice.
      RunError: in place of JAX's error if a device ran out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        option, advice = "", "A smaller --batch-size, --micro-batch or --image-size needs less"
        if jax.process_count() == 1:  # else the others would wait for what is compiled here
            with contextlib.suppress(Exception):  # the memory is full
                option = training.smaller_step()
        if option:
            advice = f"Start again with {option}, with which a step fits by the compiler's analysis"
        raise RunError(out_of_memory(error, advice)) from error
    except Diverged as error:
        fault = error.fault or training.fault(error.state, error.epoch - 1, error.step - 1)
        kept = f"The checkpoint after {writer.saved.words} is kept. " if writer.saved > (0, 0) else ""
        if own_tx:
            more = f"{kept}Continue with a lower rate in tx and resume=True, or start again with overwrite=True."
        else:
            steps = training.advance.steps_per_epoch
            count = jnp.int32((error.epoch - 1) * steps + error.step - 1)
            rate, backbone_rate = (
                None if peak is None else float(make_schedule(config, peak, steps)(count)) for peak in rates_of(config)
            )
            was, lower = f"The learning rate was {rate:.3g}", "--learning-rate"
            if backbone_rate is not None:
                was += f", that of the backbone {backbone_rate:.3g}"
                lower += " or --backbone-learning-rate"
            more = (
                f"{was}. {kept}Continue with a lower {lower} and --resume --out {shlex.quote(str(writer.out))}, or "
                "start again with --overwrite."
            )
        raise Diverged(error.state, error.epoch, error.step, fault, more) from None
