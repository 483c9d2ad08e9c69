"""Writes a run directory during the run: figures, metrics, checkpoints, and the summary."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import jax
import numpy as np

from cifar_jax.config import TrainConfig
from cifar_jax.errors import RunError
from cifar_jax.features.extraction import Extracted
from cifar_jax.files import without_nan, write_json, write_text
from cifar_jax.pretrained import UNTRAINED, Backbone, save_backbone
from cifar_jax.runs.checkpoint import Position, list_checkpoints, load_checkpoint, position_of, prune, save_checkpoint
from cifar_jax.runs.directory import (
    BACKBONE,
    CHECKPOINTS,
    FORMAT_VERSION,
    METRICS,
    SUMMARY,
    RunInputs,
    start_run_dir,
)
from cifar_jax.runs.match import rates_of
from cifar_jax.runs.resume import Progress, checkpoint_tree, selected_epoch
from cifar_jax.runtime.machine_info import device_description, package_versions, settings
from cifar_jax.runtime.multihost import is_first
from cifar_jax.runtime.progress import EpochRow
from cifar_jax.runtime.sharding import make_mesh
from cifar_jax.runtime.timing import Clock
from cifar_jax.train.evaluate import EvalResult, wilson_interval
from cifar_jax.train.load_inputs import Inputs
from cifar_jax.train.loop import EpochPart
from cifar_jax.train.step import TrainState

P = ParamSpec("P")


class RunWriter:
    """Keeps track of a run's progress in every process; the first process also writes its files.

    Attributes:
      out: the run directory.
      history: metrics of the completed epochs.
      saved: position of the newest checkpoint.
      started: whether the directory is this run's.
    """

    def __init__(
        self, out: Path, config: TrainConfig, inputs: Inputs, clock: Clock, progress: Progress, parts: dict[str, str]
    ):
        """Prepares to write a run to a directory that the first process has locked, from where `progress` ends.

        Nothing is written before `start`. `parts` names the components that replace those of the options; the summary
        records the seconds of `clock` by phase.
        """
        self.out, self.history, self.saved, self.started = out, list(progress.rows), progress.position, False
        self._config, self._clock, self._writes = config, clock, is_first()
        self._problem, self._backbone, self._image_size = inputs
        self._began = RunInputs(inputs.digests(), parts)
        # The rates of a user-supplied optimiser are not known.
        self._rates = () if "tx" in parts else progress.with_rates(*rates_of(config)).rates
        self._throughput: dict[str, float | None] = {"images_per_second": None, "compile_seconds": None}

    def start(self, resumes: bool) -> None:
        """Makes the directory that of this run: a new one, or a stopped one that is resumed.

        A frozen backbone that does not come from a file is saved in the run directory.
        """
        if not self._writes:
            return
        start_run_dir(self.out, self._config, self._began, resumes)
        self.started = True
        with _or_run_error(self.out):
            if resumes:
                prune(self.out / CHECKPOINTS, self._kept(self.saved))
                self._write_metrics()
            is_frozen = self._config.optim.mode != "finetune"
            if is_frozen and isinstance(self._backbone, Backbone) and not Path(self._backbone.source).is_file():
                save_backbone(self.out / BACKBONE, self._backbone)

    def extracted(self, extracted: Extracted) -> None:
        """Records the throughput of the backbone, and the seconds until it was compiled."""
        if extracted.num_images:
            self._throughput = {
                "images_per_second": round(extracted.num_images / extracted.seconds, 2),
                "compile_seconds": round(extracted.compile_seconds, 3),
            }

    @property
    def selected_epoch(self) -> int:
        """The last epoch with a checkpoint, or the best such epoch if images were held out; 0 before the first."""
        return self._selected(self.saved)

    def _selected(self, position: Position) -> int:
        return selected_epoch(self.history[: position.epoch], self._problem.held_out)

    def _kept(self, newest: Position) -> set[Position]:
        """Checkpoints to keep: the newest few, and that of the epoch selected until each of them.

        Without held-out images only that until the newest, as resuming from the others does not need it.
        """
        found = {position_of(path) for path in list_checkpoints(self.out / CHECKPOINTS)}
        # Later checkpoints were corrupt, or are about to be written again.
        last = sorted(position for position in found | {newest} if position <= newest)
        last = last[-self._config.run.keep_checkpoints :]
        return {*last, *(Position(self._selected(at)) for at in (last if self._problem.held_out else [newest]))}

    def epoch(self, row: EpochRow, state: TrainState) -> None:
        """Adds a line to metrics.jsonl, and saves a checkpoint."""
        self.history.append(row)
        if self._writes:
            with _or_run_error(self.out):
                self._write_metrics()
        self.checkpoint(state)

    def _write_metrics(self) -> None:
        """Replaces metrics.jsonl, one line per epoch."""
        rows = ({**row._asdict(), "val_split": self._problem.val_split} for row in self.history)
        write_text(self.out / METRICS, "".join(json.dumps(without_nan(row)) + "\n" for row in rows))

    def checkpoint(self, state: TrainState, part: EpochPart | None = None) -> None:
        """Saves a checkpoint of the state, and removes old ones except the newest few and those they depend on.

        `part` is the completed steps of the next epoch, if any.
        """
        position = Position(len(self.history), len(part.metrics.num) if part else 0)
        if self._writes:
            progress = Progress(position, tuple(self.history), part, self._rates)
            directory = self.out / CHECKPOINTS
            save_checkpoint(directory, position, jax.device_get(checkpoint_tree(state)), progress.to_json())
            with _or_run_error(self.out):
                prune(directory, self._kept(position))
        self.saved = position

    def _keep_trained_backbone(self) -> None:
        """In `finetune` mode, saves the backbone of the selected epoch as a weights file, the backbone of the run."""
        selected = Position(self.selected_epoch)
        # A `FunctionBackbone` is user code, and its variables are in the checkpoint.
        if (
            self._config.optim.mode != "finetune"
            or not isinstance(self._backbone, Backbone)
            or not (self.out / CHECKPOINTS / selected.name).exists()
        ):
            return
        shapes = jax.eval_shape(lambda: self._backbone.variables)
        like = {"params": {"backbone": shapes["params"]}, "batch_stats": shapes["batch_stats"]}
        trained = load_checkpoint(self.out / CHECKPOINTS, like, selected)
        initial = f"{self._backbone.source} (SHA-256 {self._backbone.sha256[:16]})"
        self._backbone = self._backbone.replace(
            variables={"params": trained["params"]["backbone"], "batch_stats": trained["batch_stats"]},
            image_size=self._image_size,
            source=f"trained on {self._problem.splits.name} from {initial}",
            # The architecture is unchanged, but the weights are no longer untrained.
            variant="trained from random weights"
            if self._config.backbone.weights in UNTRAINED and "backbone" not in self._began.parts
            else self._backbone.variant,
            top=None,
        )
        with _or_run_error(self.out):
            digest = save_backbone(self.out / BACKBONE, self._backbone)
        self._backbone = self._backbone.replace(sha256=digest)

    def draw(self, write: Callable[Concatenate[Path, P], None], *arguments: P.args, **more: P.kwargs) -> None:
        """Calls a function that writes figures to the run directory."""
        if self._writes:
            with self._clock("pictures"), _or_run_error(self.out):
                write(self.out, *arguments, **more)

    def finish(self, status: str, val: EvalResult | None = None, test: EvalResult | None = None) -> None:
        """Writes summary.json and, in `finetune` mode, the backbone of the selected epoch.

        The status is `complete`, `interrupted`, `diverged` or `failed`; only a complete run has scores.

        Raises:
          UserError: if the selected epoch's checkpoint is corrupt.
          RunError: if a file cannot be written.
        """
        if not self.started:
            return
        try:
            self._keep_trained_backbone()
        except Exception:
            if status != "complete":
                # Still write the summary, without a digest, as no file holds the trained backbone.
                self._backbone = self._backbone.replace(sha256="")
                self._write_summary(status, val, test)
            raise
        self._write_summary(status, val, test)

    def _write_summary(self, status: str, val: EvalResult | None, test: EvalResult | None) -> None:
        data, selected = self._problem, self.selected_epoch
        row = self.history[selected - 1] if selected else None
        summary: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "status": status,
            "epochs": self.saved.epoch,
            "selected_epoch": selected,
            "learning_rates": [rate.to_json() for rate in self._rates],
            "val_split": data.val_split,
            "val_loss": row and row.val_loss,
            "val_accuracy": row and row.val_accuracy,
        }
        if val is not None:
            summary |= _scores("val", val, data.splits.class_names)
        if data.held_out and test is not None:
            summary |= _scores("test", test, data.splits.class_names)
        summary |= self._about()
        with _or_run_error(self.out):
            write_json(self.out / SUMMARY, without_nan(summary))

    def _about(self) -> dict[str, Any]:
        """Context of the scores: data, timings, backbone, device and software versions."""
        data, backbone = self._problem, self._backbone
        return {
            "num_train": len(data.train.labels),
            "num_val": len(data.val.labels),
            "num_test": len(data.test.labels),
            "seconds": {
                phase: round(s, 3) for phase, s in (self._clock.seconds | {"total": self._clock.total}).items()
            },
            # Time to the first batch of features or the first step; with cached features, an epoch is one call.
            "seconds_to_first_step": self._clock.first_step and round(self._clock.first_step, 3),
            **self._throughput,  # of the backbone; null if no features were extracted
            "backbone": {
                "source": str(Path(backbone.source).absolute()) if Path(backbone.source).is_file() else backbone.source,
                "sha256": backbone.sha256 or None,
                "variant": backbone.variant,
                **backbone.about(),
                "image_size": self._image_size,
            },
            "resize": self._problem.resize.to_json(),
            "dataset": {
                "name": data.splits.name,
                "version": data.splits.version,
                "class_names": list(data.splits.class_names),
                "train_class_counts": np.bincount(data.train.labels, minlength=len(data.splits.class_names)).tolist(),
                "skipped": list(data.splits.skipped),
                "train_sha256": self._began.digests["training images"],
                "test_sha256": self._began.digests["test images"],
            },
            "parts": self._began.parts,
            "seed": self._config.optim.seed,
            "precision": self._config.backbone.precision,
            "device": device_description(make_mesh(self._config.optim.devices).size),
            "packages": package_versions(),
            "environment": settings(),
        }


def _scores(name: str, result: EvalResult, class_names: Sequence[str]) -> dict[str, Any]:
    """Scores of a split by key; a figure that is undefined, such as the recall of no examples, becomes null."""
    interval = wilson_interval(result.accuracy, result.num)
    figures = {name: getattr(result, name).tolist() for name in ("precision", "recall", "f1", "support")}
    by_class = [dict(zip(figures, row, strict=True)) for row in zip(*figures.values(), strict=True)]
    return {
        f"{name}_loss": result.loss,
        f"{name}_accuracy": result.accuracy,
        f"{name}_accuracy_interval_95": list(interval),
        f"{name}_balanced_accuracy": result.balanced_accuracy,
        f"{name}_class_accuracy": dict(zip(class_names, result.class_accuracy.tolist(), strict=True)),
        f"{name}_classes": dict(zip(class_names, by_class, strict=True)),
        f"{name}_confusion": result.confusion.tolist(),
    }


@contextlib.contextmanager
def _or_run_error(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"The run in {out} cannot be written ({error}); make room or choose another --out.") from error
