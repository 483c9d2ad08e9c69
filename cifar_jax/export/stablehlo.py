"""Export to StableHLO by `jax.export`: a compiled program for CPUs, GPUs and TPUs, and its weights beside it.

A directory of three files: `model.stablehlo`, a function of the weights and a batch of images; `weights.safetensors`,
its folded kernels and biases by name, which any reader opens and which outlive the program; `metadata.json`.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
import numpy as np
from jaxtyping import Array, Float, UInt8
from safetensors.numpy import save

from cifar_jax.errors import UserError
from cifar_jax.export.trained_model import TrainedModel
from cifar_jax.files import write_json
from cifar_jax.models.backbone import Backbone, extract
from cifar_jax.models.folded import features_of, prepare

PROGRAM, WEIGHTS, METADATA = "model.stablehlo", "weights.safetensors", "metadata.json"
PLATFORMS = ("cpu", "cuda", "tpu")
# Days on which versions of jaxlib were built, as their wheels record.
BUILT = {"0.10.0": date(2026, 4, 16), "0.10.1": date(2026, 5, 18), "0.10.2": date(2026, 6, 17)}
MONTHS = 6  # https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees

Weights = dict[str, np.ndarray]


def write_stablehlo(model: TrainedModel, directory: Path) -> dict[str, str]:
    """Writes a classifier into an empty directory. Returns what is worth saying about it.

    The program maps weights and `image`, uint8 [N, side, side, 3] with N symbolic, to `probabilities` and `features`.

    Raises:
      UserError: if the backbone or the head is a function that needs to know the size of the batch.
    """
    weights, function = _as_function(model)
    (batch,) = jax.export.symbolic_shape("N")
    images = jax.ShapeDtypeStruct((batch, model.side, model.side, 3), np.uint8)
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in weights.items()}
    try:
        with _without_source_paths():
            exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(shapes, images)
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        raise UserError(
            "The backbone or the head cannot be traced with a batch of any size "
            f"({str(error).partition(chr(10))[0]}); take its size from images.shape[0], not from len(images)."
        ) from error
    # Not save_file, which makes a file that nobody else may read.
    content = {PROGRAM: bytes(exported.serialize()), WEIGHTS: save(weights, {"cifar_jax": json.dumps(model.about)})}
    for name, written in content.items():
        (directory / name).write_bytes(written)
    version = jaxlib.version.__version__
    until = promised_until(version)
    about: dict[str, Any] = {
        "jaxlib": version,
        "loads_until": until and until.isoformat(),
        "platforms": list(PLATFORMS),
        "sha256": {name: hashlib.sha256(written).hexdigest() for name, written in content.items()},
    }
    write_json(directory / METADATA, model.about | {"stablehlo": about})
    last = f"until {until}" if until else f"for {MONTHS} months after the build of jaxlib {version}"
    return {
        "program": f"for {', '.join(PLATFORMS)}; exported by jaxlib {version}",
        "loads": f"{last}, as JAX promises; {WEIGHTS} can be read at any time",
    }


@contextlib.contextmanager
def _without_source_paths() -> Iterator[None]:
    """Keeps the paths of source files on this machine out of programs that are lowered in the block."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, ".*")
    try:
        yield
    finally:
        jax.config.update(name, before)


def promised_until(version: str) -> date | None:
    """The day up to which jaxlib built is promised to load what a version exported; None if its age is not known."""
    if (built := BUILT.get(version)) is None:
        return None
    years, month = divmod(built.month - 1 + MONTHS, 12)
    return date(built.year + years, month + 1, min(built.day, 28))


def _as_function(model: TrainedModel) -> tuple[Weights, Any]:
    """Weights by name, and the pure function `(weights, images) -> {"probabilities", "features"}`."""
    # Folded for no platform: the neutral form runs on all of them.
    is_resnet = isinstance(model.backbone, Backbone)
    network = prepare(model.resnet("stablehlo"), platform="") if is_resnet else model.backbone
    flat, structure = jax.tree_util.tree_flatten_with_path({"backbone": network, "head": model.head_params})
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    weights = {name: np.ascontiguousarray(leaf) for name, (_, leaf) in zip(names, flat, strict=True)}

    def function(weights: Weights, images: UInt8[Array, "N side side 3"]) -> dict[str, Float[Array, "..."]]:
        tree = jax.tree.unflatten(structure, [weights[name] for name in names])
        features = (features_of if is_resnet else extract)(tree["backbone"], images)
        return {"probabilities": jax.nn.softmax(model.head(tree["head"], features)), "features": features}

    return weights, function
