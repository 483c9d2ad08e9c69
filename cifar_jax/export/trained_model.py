"""A trained classifier as one value from which every format is written: image in, probabilities out."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, PyTree, UInt8
from PIL import Image

from cifar_jax.data.resize import Resize
from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.errors import UserError
from cifar_jax.files import sha256_of_arrays
from cifar_jax.models.backbone import AnyBackbone, Backbone
from cifar_jax.models.head import Head, dense_logits
from cifar_jax.pretrained import registry
from cifar_jax.runs.reader import Run
from cifar_jax.version import __version__

FORMAT = "cifar_jax export 1"
# Options that choose and divide the images of a run, so that an exported model can be scored on the same ones.
DATA_OPTIONS = (
    *("label_key", "skip_unreadable", "train_examples", "test_examples"),
    *("val_fraction", "test_fraction", "seed"),
)

CHECKED = 4  # images on which what was written is compared with the run
# Largest difference of a probability: rounding makes some 1e-6, 2e-5 where a head is steep, and a mistake far more.
TOLERANCE = 1e-3

DenseLayer = dict[str, Float32[np.ndarray, "..."]]  # {"kernel": [in, out], "bias": [out]}


@dataclass(frozen=True)
class TrainedModel:
    """A trained classifier.

    Attributes:
      backbone: the network, with the image size of the run.
      head: the function of `head_params`.
      head_params: parameters of the trained head.
      resize: how a picture of any size becomes the input, on the host.
      about: facts that every format carries, as JSON values: see `about_of`.
      run: the run that it comes from, whose directory has figures, and whose options and summary are described.
    """

    backbone: AnyBackbone
    head: Head
    head_params: PyTree
    resize: Resize
    about: dict[str, Any]
    run: Run

    @property
    def class_names(self) -> list[str]:
        """Class names by label."""
        names: list[str] = self.about["class_names"]
        return names

    @property
    def side(self) -> int:
        """Side in pixels of the input, uint8 [N, side, side, 3] in the order red, green, blue."""
        return self.resize.side

    @property
    def factor(self) -> int:
        """Number of times that each pixel is repeated in both directions before the network."""
        return self.backbone.image_size // self.side

    def resnet(self, form: str) -> Backbone:
        """Returns the backbone as a ResNet.

        Raises:
          UserError: if it is a function, of which `form` cannot be written.
        """
        if isinstance(self.backbone, Backbone):
            return self.backbone
        raise UserError(
            f"The backbone {self.backbone.source!r} is a function, which --format {form} cannot express; use --format "
            "stablehlo."
        )

    def dense_layers(self, form: str) -> tuple[DenseLayer, ...]:
        """Returns the layers of a dense head, with relu between them.

        Raises:
          UserError: if the head is another one, of which `form` cannot be written.
        """
        if self.head.logits is not dense_logits:
            raise UserError(
                f"The head {self.head.name!r} is a function, which --format {form} cannot express; use --format "
                "stablehlo."
            )
        return tuple(
            {name: np.asarray(value, np.float32) for name, value in layer.items()} for layer in self.head_params
        )


def drawn_images(resize: Resize, num: int = CHECKED) -> UInt8[np.ndarray, "num side side 3"]:
    """Draws synthetic images of the size that a run's network takes."""
    return np.stack([resize(Image.fromarray(image)) for image in draw_shapes(num, seed=0)[0]])


def trained_model(run: Run) -> TrainedModel:
    """Describes a loaded run for export; everything computes in float32, whatever the run did."""
    return TrainedModel(run.backbone, run.head, jax.device_get(run.head_params), run.resize, about_of(run), run)


def about_of(run: Run) -> dict[str, Any]:
    """Facts about a run as JSON values, without any path of this machine.

    They are `format`, `cifar_jax` (the version), `class_names`, `input`, `resize`, `image_size`, of a ResNet
    `preprocessing` and `network`, `backbone` (weights, licence, SHA-256), `data` (name and the options that divided it,
    SHA-256 of the test images), `status` (complete, or how the run ended), `loss` and `scores` of the run, and
    `run_sha256`, the digest of what was trained.
    """
    side, summary = run.resize.side, run.summary
    network = (
        {"preprocessing": asdict(run.backbone.preprocessing), "network": asdict(run.backbone.config)}
        if isinstance(run.backbone, Backbone)
        else {}
    )
    return {
        "format": FORMAT,
        "cifar_jax": __version__,
        "class_names": list(run.class_names),
        "input": f"image, uint8 [N, {side}, {side}, 3], RGB",
        "resize": run.resize.to_json(),
        "image_size": run.backbone.image_size,
        **network,
        "backbone": _backbone_of(run),
        "data": _data_of(run),
        "status": str(summary.get("status", "")),
        "loss": run.loss,
        "scores": _scores(summary),
        "run_sha256": _run_sha256(run),
    }


def _backbone_of(run: Run) -> dict[str, Any]:
    """Name and licence of the weights that the run started from, and variant and digest of its backbone."""
    about, entries = run.summary.get("backbone", {}), registry.entries()
    weights = "" if "backbone" in run.summary.get("parts", {}) else run.config.backbone.weights
    file = Path(run.backbone.source)
    known = entries.get(registry.ALIASES.get(weights, weights))
    if known is None and file.is_file():
        known, _ = registry.entry_of_file(file, entries)
    trained = {"sha256": str(about.get("sha256", "")), "variant": str(about.get("variant", ""))}
    layers = "all" if run.config.optim.mode == "finetune" else "head"
    name = known.name if known else Path(weights).name
    return {"weights": name, "licence": known.licence if known else "", "trained_layers": layers} | trained


def _data_of(run: Run) -> dict[str, Any]:
    options, kind = run.config.to_json(), run.data_kind
    # A path becomes the name that the set has in the summary.
    name = options["dataset"] if kind in ("shapes", "tfds") else str(run.summary["dataset"].get("name", ""))
    chosen = {option: options[option] for option in DATA_OPTIONS}
    return {"dataset": name, "kind": kind} | chosen | {"test_sha256": run.test_sha256}


def _scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The last scores of a run: on its test images, or on held-out images of an incomplete run without those."""
    part = "test" if "test_accuracy" in summary else "val"
    split = "test" if part == "test" else summary.get("val_split", "test")
    names = ("loss", "accuracy", "accuracy_interval_95")
    found = {name: summary.get(f"{part}_{name}") for name in names}
    return {"split": split, "num": summary.get(f"num_{part}")} | found


def _run_sha256(run: Run) -> str:
    leaves: Sequence[Any] = jax.tree.leaves(jax.device_get(run.head_params))
    parts = [run.backbone.sha256, sha256_of_arrays(*leaves), run.class_names, run.resize.to_json()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
