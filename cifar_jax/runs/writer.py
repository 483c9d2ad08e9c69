"""Writes a run directory while the run goes on: pictures, metrics, checkpoints, and the summary of it all."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from cifar_jax.config import TrainConfig
from cifar_jax.errors import RunError
from cifar_jax.files import without_nan, write_json
from cifar_jax.pretrained import UNTRAINED, Backbone, save_backbone
from cifar_jax.runs.checkpoint import Position, list_checkpoints, load_checkpoint, position_of, prune, save_checkpoint
from cifar_jax.runs.directory import (
    BACKBONE,
    CHECKPOINTS,
    FORMAT_VERSION,
    SUMMARY,
    RunInputs,
    clear_leftovers,
    start_run_dir,
    write_about,
    write_metrics,
)
from cifar_jax.runs.match import rates_of
from cifar_jax.runs.resume import NO_PROGRESS, Progress, checkpoint_tree, selected_epoch
from cifar_jax.runtime.machine_info import device_description, package_versions, settings
from cifar_jax.runtime.progress import EpochRow
from cifar_jax.runtime.sharding import make_mesh
from cifar_jax.runtime.timing import Clock
from cifar_jax.train.evaluate import EvalResult, wilson_interval
from cifar_jax.train.load_inputs import Inputs
from cifar_jax.train.loop import EpochPart
from cifar_jax.train.step import TrainState


class RunWriter:
    """What has been done so far, and where it is written."""

    def __init__(
        self,
        out: Path,
        config: TrainConfig,
        inputs: Inputs,
        clock: Clock,
        progress: Progress = NO_PROGRESS,
        parts: dict[str, str] | None = None,
    ):
        """Takes what the run is about, and what of it is done already; nothing is written yet.

        Args:
          out: the run directory.
          config: of the run.
          inputs: images and backbone.
          clock: whose seconds go into the summary.
          progress: of a run that is resumed.
          parts: names of what is in the place of what the options stand for.
        """
        self.out, self.config, self.clock = out, config, clock
        self.problem, self.backbone, self.image_size = inputs
        self._began = RunInputs(inputs.digests(), parts or {})
        self.history, self._progress = list(progress.rows), progress
        self.saved = progress.position  # of the newest checkpoint
        # An optimiser of the user's own keeps its rates to itself.
        self._rates = () if "tx" in self._began.parts else progress.with_rates(*rates_of(config)).rates
        self.started = False  # whether the directory is this run's
        self._images_per_second: float | None = None

    def start(self, resumes: bool) -> None:
        """Creates the directory, or prepares that of a stopped run for more.

        A backbone that no file can bring back is kept in the run itself.
        """
        if resumes:
            # Before the summary goes: it says that a run diverged, which is why the learning rate may be another.
            write_about(self.out, self.config, self._began)
            self.started = True
            with _or_run_error(self.out):
                clear_leftovers(self.out)
                prune(self.out / CHECKPOINTS, self.saved, self._needed(self.saved), self.config.run.keep_checkpoints)
            self._write_metrics()
        else:
            start_run_dir(self.out, self.config, self._began)
            self.started = True
        is_frozen = self.config.optim.mode != "finetune"
        if is_frozen and isinstance(self.backbone, Backbone) and not Path(self.backbone.source).is_file():
            with _or_run_error(self.out):
                save_backbone(self.out / BACKBONE, self.backbone)

    def extracted(self, num_images: int, seconds: float) -> None:
        """Takes how many images went through the backbone, and how long that took."""
        self._images_per_second = round(num_images / seconds, 2) if num_images else None

    @property
    def selected_epoch(self) -> int:
        """The last epoch that has a checkpoint, or with held-out images the best one; 0 before the first."""
        return selected_epoch(self.history[: self.saved.epoch], self.problem.held_out)

    def _needed(self, newest: Position) -> list[Position]:
        """The checkpoints that others need beside themselves: of each that is kept, the epoch selected until then."""
        found = {position_of(path) for path in list_checkpoints(self.out / CHECKPOINTS)}
        last = sorted(position for position in found | {newest} if position <= newest)[
            -self.config.run.keep_checkpoints :
        ]
        kept = last if self.problem.held_out else [newest]
        return [Position(selected_epoch(self.history[: at.epoch], self.problem.held_out)) for at in kept]

    def epoch(self, row: EpochRow) -> None:
        """Adds a line to metrics.jsonl."""
        self.history.append(row)
        self._write_metrics()

    def _write_metrics(self) -> None:
        with _or_run_error(self.out):
            write_metrics(self.out, [row._asdict() | {"val_split": self.problem.val_split} for row in self.history])

    def checkpoint(self, state: TrainState, part: EpochPart | None = None) -> None:
        """Saves the state, to resume from, and removes older ones but the last few and those they need.

        Args:
          state: after the last epoch.
          part: the steps of the next one that it includes.
        """
        position = Position(len(self.history), len(part.metrics.num) if part else 0)
        progress = Progress(position, tuple(self.history), part, self._rates)
        tree, directory = jax.device_get(checkpoint_tree(state)), self.out / CHECKPOINTS
        keep, last = self._needed(position), self.config.run.keep_checkpoints
        save_checkpoint(directory, position, tree, progress.to_json(), keep, last)
        self.saved = position

    def _keep_trained_backbone(self) -> None:
        """In the mode finetune keeps the selected epoch's backbone as a file like any other, as that of the run."""
        selected = Position(self.selected_epoch)
        if self.config.optim.mode != "finetune" or not (self.out / CHECKPOINTS / selected.name).exists():
            return
        if not isinstance(self.backbone, Backbone):
            return  # its function is the user's, and its variables are in the checkpoint
        shapes = jax.eval_shape(lambda: self.backbone.variables)
        like = {"params": {"backbone": shapes["params"]}, "batch_stats": shapes["batch_stats"]}
        trained = load_checkpoint(self.out / CHECKPOINTS, like, selected)
        initial = f"{self.backbone.source} (SHA-256 {self.backbone.sha256[:16]})"
        self.backbone = self.backbone.replace(
            variables={"params": trained["params"]["backbone"], "batch_stats": trained["batch_stats"]},
            image_size=self.image_size,
            source=f"trained on {self.problem.splits.name} from {initial}",
            # How it is run has not changed, but it is no longer untrained.
            variant="trained from random weights"
            if self.config.backbone.weights in UNTRAINED and "backbone" not in self._began.parts
            else self.backbone.variant,
            top=None,
        )
        with _or_run_error(self.out):
            digest = save_backbone(self.out / BACKBONE, self.backbone)
        self.backbone = self.backbone.replace(sha256=digest)

    @contextlib.contextmanager
    def pictures(self) -> Iterator[None]:
        """Times the writing of pictures into the directory; a file that cannot be written is a RunError."""
        with self.clock("pictures"), _or_run_error(self.out):
            yield

    def finish(self, status: str, val: EvalResult | None = None, test: EvalResult | None = None) -> None:
        """Writes summary.json, and in the mode finetune the selected epoch's backbone.

        Args:
          status: `complete`, `interrupted`, `diverged` or `failed`.
          val: scores on the validation images.
          test: scores on the test images.

        Raises:
          UserError: if the selected epoch's checkpoint is corrupt.
          RunError: if a file cannot be written.
        """
        try:
            self._keep_trained_backbone()
        except Exception:
            if status != "complete":
                # It says more about the run than the backbone, whose digest then belongs to no file.
                self.backbone = self.backbone.replace(sha256="")
                self._write_summary(status, val, test)
            raise
        self._write_summary(status, val, test)

    def _write_summary(self, status: str, val: EvalResult | None, test: EvalResult | None) -> None:
        problem = self.problem
        selected = self.selected_epoch
        last = self.history[selected - 1] if selected else None
        summary: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "status": status,
            "epochs": self.saved.epoch,
            "selected_epoch": selected,
            "learning_rates": [rate.to_json() for rate in self._rates],
            "val_split": problem.val_split,
            "val_loss": last and last.val_loss,
            "val_accuracy": last and last.val_accuracy,
        }
        if val is not None:
            summary |= _scores("val", val, problem.splits.class_names)
        if problem.held_out and test is not None:
            summary |= _scores("test", test, problem.splits.class_names)
        summary |= self._about()
        with _or_run_error(self.out):
            write_json(self.out / SUMMARY, without_nan(summary))

    def _about(self) -> dict[str, Any]:
        """What the numbers were measured on."""
        problem, backbone = self.problem, self.backbone
        return {
            "num_train": len(problem.train.labels),
            "num_val": len(problem.val.labels),
            "num_test": len(problem.test.labels),
            "seconds": {phase: round(s, 3) for phase, s in (self.clock.seconds | {"total": self.clock.total}).items()},
            # The first batch of features, or the first step; on features from the cache the first epoch, one call.
            "seconds_to_first_step": self.clock.first_step and round(self.clock.first_step, 3),
            "images_per_second": self._images_per_second,  # null: the features came from the cache, or live
            "backbone": {
                "source": str(Path(backbone.source).absolute()) if Path(backbone.source).is_file() else backbone.source,
                "sha256": backbone.sha256 or None,
                "variant": backbone.variant,
                **backbone.about(),
                "image_size": self.image_size,
            },
            "dataset": {
                "name": problem.splits.name,
                "version": problem.splits.version,
                "class_names": list(problem.splits.class_names),
                "train_sha256": self._began.digests["training images"],
                "test_sha256": self._began.digests["test images"],
            },
            "parts": self._began.parts,
            "seed": self.config.optim.seed,
            "precision": self.config.backbone.precision,
            "device": device_description(make_mesh(self.config.optim.devices).size),
            "packages": package_versions(),
            "environment": settings(),
        }


def _scores(name: str, result: EvalResult, class_names: Sequence[str]) -> dict[str, Any]:
    interval = wilson_interval(result.accuracy, result.num)
    return {
        f"{name}_loss": result.loss,
        f"{name}_accuracy": result.accuracy,
        f"{name}_accuracy_interval_95": list(interval),
        f"{name}_class_accuracy": dict(zip(class_names, result.class_accuracy.tolist(), strict=True)),
        f"{name}_confusion": result.confusion.tolist(),
    }


@contextlib.contextmanager
def _or_run_error(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"The run in {out} cannot be written ({error}); make room or choose another --out.") from error
