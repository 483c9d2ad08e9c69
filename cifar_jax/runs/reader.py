"""Loading a run: its configuration, its trained head, and its backbone, located by hash."""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float32, PyTree, UInt8

from cifar_jax.config import TrainConfig
from cifar_jax.data.load import Kind, kind_of
from cifar_jax.data.resize import Resize
from cifar_jax.errors import UserError
from cifar_jax.files import sha256_of_file
from cifar_jax.models.head import Head, dense_head
from cifar_jax.pretrained import AnyBackbone, Backbone, FunctionBackbone, registry
from cifar_jax.pretrained.formats.safetensors_file import is_ours
from cifar_jax.pretrained.load import read_weights
from cifar_jax.pretrained.merge import backbone_of
from cifar_jax.runs.checkpoint import Position, load_checkpoint
from cifar_jax.runs.directory import BACKBONE, CHECKPOINTS, CONFIG, FORMAT_VERSION, SUMMARY, is_run, read_json
from cifar_jax.train.load_inputs import with_digest

if TYPE_CHECKING:
    from cifar_jax.data.pictures import Images
    from cifar_jax.runs.predict import Picture, Predictions
    from cifar_jax.runtime.progress import Reporter

logger = logging.getLogger(__name__)

MOST_WEIGHTS_BYTES = 2**32  # a ResNet152 in float64 has 0.5 GB: larger files are not backbones and are not hashed


@dataclass(frozen=True)
class Run:
    """A loaded run, ready to predict.

    Attributes:
      path: the run directory.
      config: the configuration of the run.
      summary: the content of summary.json.
      backbone: the network, located by its hash, with the image size of the run.
      head_params: parameters of the trained head.
      class_names: class names by label.
      resize: how pictures become the images that it was trained on.
      head: the function that `head_params` belong to.
    """

    path: Path
    config: TrainConfig
    summary: dict[str, Any]
    backbone: AnyBackbone
    head_params: PyTree
    class_names: tuple[str, ...]
    resize: Resize
    head: Head = field(default_factory=dense_head)

    def __repr__(self) -> str:
        """A one-line description without the arrays."""
        accuracy = self.summary.get("test_accuracy", self.summary.get("val_accuracy"))
        scored = f", accuracy {accuracy:.4f}" if isinstance(accuracy, float) else ""
        named = self.summary.get("parts", {}).get("head")
        hidden = [named] if named else self.config.optim.hidden
        sizes = [self.backbone.num_features, *hidden, len(self.class_names)]
        names = f"{len(self.class_names)} classes"
        if len(self.class_names) <= 10:
            names += f" ({', '.join(self.class_names)})"
        return (
            f"Run({self.path}: {self.summary.get('status')}{scored}, {names}, head {'-'.join(map(str, sizes))}, "
            f"{self.backbone!r})"
        )

    def predict(
        self,
        pictures: "Iterable[Picture] | UInt8[np.ndarray, 'n h w 3']",
        direct: bool = False,
        reporter: "Reporter | None" = None,
    ) -> "Predictions":
        """Predicts pictures: image files by path, or RGB pixels as uint8 [n, h, w, 3] or a list of uint8 [h, w, 3].

        Pictures of any size are resized as those that the run was trained on. A file that cannot be read has an error
        in its row. See `cifar_jax.runs.predict.predict` for the arguments, and `predict_files` there for more files
        than there should be results in memory.

        Returns:
          `probabilities` float32 [n, classes], `labels` int32 [n], and `class_names` and `errors` of length n.

        Raises:
          ValueError: if pixels have another dtype or shape.
          UserError: if `direct` has no meaning for the run.
        """
        from cifar_jax.runs.predict import predict  # it imports this module

        return predict(self, pictures, direct, reporter)

    def probabilities(
        self, images: "Images", batch_size: int | None = None
    ) -> Iterator[tuple[slice, Float32[np.ndarray, "rows classes"]]]:
        """Yields rows of images, as `resize` makes them, and their class probabilities; see `Classifier`."""
        from cifar_jax.runs.predict import run_probabilities  # it imports this module

        return run_probabilities(self, images, batch_size)

    def direct_resize(self) -> Resize:
        """How a picture becomes the network's input without being reduced to small training images first.

        Raises:
          UserError: if it is not reduced.
        """
        if self.resize.method != "upsample":
            raise UserError(
                f"--direct leaves out the reduction to small training images, which the run in {self.path} does not "
                f"have ({self.resize.words(self.image_size)}); leave it out."
            )
        return Resize("upsample", self.image_size)

    @property
    def image_size(self) -> int:
        """Side in pixels of the network's input."""
        return self.backbone.image_size

    @property
    def data_kind(self) -> Kind:
        """What the data set of the run is; that of a folder or file that is gone, by its name."""
        try:
            return kind_of(self.config.data.dataset)
        except UserError:
            return "npz" if self.config.data.dataset.endswith(".npz") else "folder"

    @property
    def loss(self) -> str:
        """The loss of its scores: the name of a function, or cross-entropy and what changes it."""
        optim = self.config.optim
        changed = [f"label smoothing {optim.label_smoothing:g}"] if optim.label_smoothing else []
        changed += ["balanced class weights"] if optim.class_weights != "none" else []
        name = self.summary.get("parts", {}).get("loss_fn")
        return str(name) if name else ", ".join(["cross-entropy", *changed])

    @property
    def test_sha256(self) -> str:
        """Digest of the test images; empty if it was not recorded."""
        return str(self.summary["dataset"].get("test_sha256") or "")


def load_run(
    path: str | os.PathLike[str],
    weights: str | None = None,
    *,
    allow_incomplete: bool = False,
    head: Head | None = None,
    backbone: AnyBackbone | None = None,
) -> Run:
    """Loads a run: its configuration, its trained head, and its backbone, located by hash.

    Args:
      path: the run directory.
      weights: a file or name to load the backbone from, if it is not found automatically.
      allow_incomplete: whether to load a run that was interrupted, failed or diverged. Its head is that of the last
        completed epoch, or of the best one if images were held out, and a warning is logged.
      head: the head that the run was trained with, if it is not the dense one.
      backbone: the backbone that the run was trained with, if it is a `FunctionBackbone` or is not stored in a file.

    Raises:
      UserError: if `path` is not a run, the run is incomplete or corrupt, its backbone is not on this machine, or its
        head or backbone is not stored in a file and not passed here.
    """
    path = Path(path)
    fields = read_json(path / CONFIG)
    if not (path / SUMMARY).exists() and is_run(path):
        raise UserError(
            f"The run in {path} has not ended: it has no {SUMMARY}. If it is not running, continue it with --resume."
        )
    summary = read_json(path / SUMMARY)
    if summary.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} was written by another version of this program; train again.")
    try:
        config = TrainConfig.from_json(fields)
    except UserError as error:
        raise UserError(f"{path / CONFIG} is not as `train` wrote it ({error}); name another run directory.") from error
    _require_complete(path, config, summary, allow_incomplete)
    try:
        class_names = tuple(map(str, summary["dataset"]["class_names"]))
        resize = Resize.from_json(summary.get("resize"))
        about = {name: str(summary["backbone"][name] or "") for name in ("sha256", "source")}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / SUMMARY} is not as `train` wrote it; name another run directory.") from error
    if not about["sha256"]:
        raise UserError(f"The run in {path} has no trained backbone: writing it failed. Continue it with --resume.")
    backbone = backbone and with_digest(backbone)
    _require_parts(path, config, summary, head, backbone)
    found = backbone or _find_backbone(path, config, about, weights)
    if isinstance(found, Backbone):
        _check_run_as_before(path, found, summary["backbone"])
        # The head's image size may differ from the one that the backbone was trained with.
        found = found.replace(image_size=config.backbone.image_size or found.image_size)
    chosen = head or dense_head(config.optim.hidden)
    shapes = jax.eval_shape(lambda: chosen.init(jax.random.key(0), found.num_features, len(class_names)))
    like = {"head": shapes}
    if isinstance(found, FunctionBackbone) and config.optim.mode == "finetune":
        like["backbone"] = jax.eval_shape(lambda: found.variables)
    selected = Position(int(summary.get("selected_epoch") or 0))
    params = load_checkpoint(path / CHECKPOINTS, {"params": like}, selected)["params"]
    trained = found.replace(variables=params["backbone"]) if "backbone" in like else found
    return Run(path, config, summary, trained, params["head"], class_names, resize, chosen)


def _require_parts(
    path: Path, config: TrainConfig, summary: Mapping[str, Any], head: Head | None, backbone: AnyBackbone | None
) -> None:
    """Checks that a head or backbone which is not stored in a file was passed, and is the one of the run."""
    name, about = summary.get("parts", {}).get("head"), summary["backbone"]
    function = about.get("function")
    if name and (head is None or head.name != name):
        raise UserError(f"The run in {path} was trained with the head {name!r}; pass it to load_run as head=.")
    if not name and head and head.name != dense_head(config.optim.hidden).name:
        raise UserError(f"The run in {path} was trained with the dense head of its options; leave head= out.")
    differs = backbone is not None and backbone.sha256 != summary["backbone"]["sha256"]
    if function and (backbone is None or differs):
        raise UserError(
            f"The run in {path} was trained with the function {function!r} as its backbone; pass the same one to "
            "load_run as backbone=."
        )
    if differs:
        raise UserError(f"The run in {path} was trained with another backbone than {backbone!r}; leave backbone= out.")
    if isinstance(backbone, FunctionBackbone) and backbone.program_sha256 != about.get("program_sha256"):
        logger.warning(
            f"The function {function!r} has the variables of the run in {path} but compiles to a different program: "
            "its code or the version of JAX has changed."
        )


def _require_complete(path: Path, config: TrainConfig, summary: Mapping[str, Any], allow: bool) -> None:
    status, done = summary.get("status"), summary.get("selected_epoch") or 0
    if status == "complete":
        return
    what = (
        f"The run in {path} is incomplete ({status} after {summary.get('epochs') or 0} of {config.optim.epochs} epochs)"
    )
    how = "Continue it with --resume"
    if status == "diverged":
        how += " and a lower " + ("rate in its tx" if "tx" in summary.get("parts", {}) else "--learning-rate")
    if not done:
        raise UserError(f"{what} and has no trained head. {how}.")
    if not allow:
        raise UserError(f"{what}. {how}, or pass --allow-incomplete to use the head of epoch {done}.")
    logger.warning(f"{what}; using the head of epoch {done}.")


def _check_run_as_before(path: Path, backbone: Backbone, about: Mapping[str, Any]) -> None:
    """Checks the network's config and preprocessing, which a config.json beside the weights may define.

    The hash covers the weights only, and that file may be missing now.
    """
    for name, value in (("config", backbone.config), ("preprocessing", backbone.preprocessing)):
        if name in about and json.loads(json.dumps(asdict(value))) != about[name]:
            raise UserError(
                f"{backbone.source} has the weights of the run {path} but would run with a different {name}; restore "
                "the config.json that was beside it."
            )


def _find_backbone(path: Path, config: TrainConfig, about: Mapping[str, Any], weights: str | None) -> Backbone:
    """Searches the possible locations of a run's backbone for a file with the same hash."""
    if weights is not None and weights not in registry.entries() and not os.path.isfile(os.path.expanduser(weights)):
        raise UserError(f"--weights {weights} is neither a file nor a name that `info` lists; name the run's backbone.")
    named = (
        [os.path.expanduser(weights)] if weights else [str(path / BACKBONE), about["source"], config.backbone.weights]
    )
    # Only local copies of the known weights: loading a run should not start a download.
    copies = (registry.find_local(entry, config.run.cache_dir)[0] for entry in registry.entries().values())
    other = ""
    for candidate in (*map(Path, named), *filter(None, copies)):
        if not os.path.isfile(candidate):
            continue
        if (reason := _why_not(candidate, about["sha256"])) is None:
            # A file in the project's own format records its variant, so the option, which was for the original file,
            # does not apply. Assumptions about the variant were logged when the run was trained.
            return backbone_of(read_weights(candidate, None if is_ours(candidate) else config.backbone.variant))
        if str(candidate) in named:
            other = other or f" ({candidate} {reason})"
    raise UserError(
        f"The run {path} needs the backbone it was trained on, {about['source']} with SHA-256 {about['sha256']}, which "
        f"is not found{other}; name a copy of it with --weights."
    )


def _why_not(candidate: Path, sha256: str) -> str | None:
    """The reason a file is not the one with the given hash; None if it is."""
    try:
        if os.path.getsize(candidate) > MOST_WEIGHTS_BYTES:
            return "is larger than weights are"
        return None if sha256_of_file(candidate) == sha256 else "is another file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
