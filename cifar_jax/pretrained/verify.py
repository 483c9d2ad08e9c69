"""What a weights file is, tensor by tensor, and all that is wrong with it: for a person who has to trust it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.errors import WeightsError
from cifar_jax.files import sha256_of_file, without_nan
from cifar_jax.models.backbone import Backbone, extract
from cifar_jax.models.resnet import ResNetConfig, network_name
from cifar_jax.pretrained import references, registry
from cifar_jax.pretrained.load import read_weights
from cifar_jax.pretrained.merge import Match, Path as VariablePath, match
from cifar_jax.pretrained.reading import Reading, backbone_of

IMAGE_SIDE = 32  # of drawn images, whose multiple a network's input has to be
FINGERPRINT_IMAGES = 4
FINGERPRINT_FEATURES = 6  # of the first image, enough to tell two networks apart at a glance


@dataclass(frozen=True)
class TensorRow:
    """A tensor that a file has or should have.

    Attributes:
      name: in the file.
      shape: in the file.
      fate: `used`, `ignored`, `missing` or `unknown`.
      role: what it is to the network, or why it is ignored.
      mean, std, low, high: of its values.
      problem: what is wrong with it, or nothing.
    """

    name: str
    shape: tuple[int, ...]
    fate: str
    role: str
    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Verification:
    """What was found; see `verify`.

    Attributes:
      about: what the file is and how it is run, in words, by topic.
      tensors: a row for each that the file has or should have.
      fingerprint: figures of the network's features on drawn images, by name; none where it does not load.
      differences: how far a peer's outputs are from ours, by stage, where one was asked.
      problems: a sentence for each thing that does not hold.
    """

    about: dict[str, str]
    tensors: list[TensorRow]
    fingerprint: dict[str, Any]
    differences: dict[str, float]
    problems: list[str]

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `holds` is the verdict."""
        return without_nan({"holds": not self.problems} | asdict(self))


def verify(
    path_or_name: str | Path, variant: str | None = None, against: str | None = None, **how: Any
) -> Verification:
    """Looks at weights as a whole and at each of their tensors.

    Args:
      path_or_name: whatever `load_backbone` takes.
      variant: how to run it, where the file leaves that open.
      against: a library of `references.FAMILIES`, which is asked what it computes with the same file.
      how: goes to `load_backbone`.

    Raises:
      WeightsError: when the file cannot be read, or is so far from any known network that no tensor can be named.
      UserError: when the library is not there, or has no such network.
    """
    reading = read_weights(path_or_name, variant, **how)
    found = match(reading.tensors, reading.names, reading.config, [*reading.ignored, *reading.top], reading.layout)
    rows = tensor_rows(reading, found)
    problems = [f"{row.name}: {row.problem}." for row in rows if row.problem]
    registered = registry.entry_of_file(reading.path)
    if registered is None and (twins := registry.entries_of_size(reading.path)):
        problems.append(f"It has the size of {twins[0].name} and not its digest, {twins[0].digest}.")
    fingerprint: dict[str, Any] = {}
    differences: dict[str, float] = {}
    try:
        backbone = backbone_of(reading)
    except WeightsError as error:
        if not problems or str(error) == reading.refusal:
            problems.append(str(error))
    else:
        side = max(IMAGE_SIDE, backbone.image_size // IMAGE_SIDE * IMAGE_SIDE)
        fingerprint = fingerprint_of(backbone.replace(image_size=side))
        if against is not None:
            differences = references.differences(against, reading, backbone.replace(image_size=side))
        problems += _of_features(fingerprint, against, differences)
    return Verification(_about(reading, registered), rows, fingerprint, differences, problems)


def _of_features(fingerprint: dict[str, Any], against: str | None, differences: dict[str, float]) -> list[str]:
    """What is wrong with what the network computes."""
    dead = ["The features of all drawn images are alike: the network is dead."] if not fingerprint["std"] > 0 else []
    far = {name: value for name, value in differences.items() if not value <= references.TOLERANCE}
    return dead + [f"{against} computes another {name}: it differs by {value:.2g}." for name, value in far.items()]


def _about(reading: Reading, registered: registry.Entry | None) -> dict[str, str]:
    config, preprocessing = reading.config, reading.preprocessing
    counts = f"{sum(np.size(tensor) for tensor in reading.tensors.values()):,} numbers"
    return {
        "file": str(reading.path),
        "bytes": f"{reading.path.stat().st_size:,}",
        "sha256": sha256_of_file(reading.path),
        "registry": f"{registered.name} ({registered.digest}), {registered.licence}" if registered else "not in it",
        "network": network_words(config),
        "tensors": f"{len(reading.tensors)} of the family {reading.family}, {counts}",
        "variant": reading.variant,
        "assumed": " ".join(reading.notes) or "nothing",
        "stride": f"in the {'first 1x1' if config.stride_in_1x1 else '3x3'} convolution of a stage's first block",
        "conv bias": "yes" if config.conv_bias else "no",
        "BatchNorm epsilon": f"{config.bn_epsilon:g}",
        "max-pool": "padded" if config.pool_padding else "not padded",
        "preprocessing": f"{preprocessing.name}: {preprocessing.channels.upper()} / {preprocessing.scale:g}, minus "
        f"{_numbers(preprocessing.mean)}, by {_numbers(preprocessing.std)}",
        "image size": f"{reading.image_size}x{reading.image_size}",
        "classifier": _classifier(reading),
    }


def network_words(config: ResNetConfig) -> str:
    """`ResNet50, 2048 features`."""
    return f"{network_name(config)}, {config.features} features"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _classifier(reading: Reading) -> str:
    bias = reading.tensors.get(reading.top[1])
    return "none" if bias is None else f"{bias.size} classes, kept and not used"


def tensor_rows(reading: Reading, found: Match) -> list[TensorRow]:
    """A row for each tensor that a file has or should have, in the file's order, the missing ones last."""
    roles = {reading.names[path]: path for path in found.views}
    rows = []
    for name, tensor in reading.tensors.items():
        shape = tuple(np.shape(tensor))
        if name in found.extra:
            rows.append(TensorRow(name, shape, "unknown", "", problem="the network knows no such tensor"))
        elif name in roles:
            problem = f"{shape} where the network has {found.wrong[name][1]}" if name in found.wrong else ""
            row = TensorRow(name, shape, "used", "/".join(roles[name]), problem=problem)
            rows.append(_with_values(row, tensor, roles[name]))
        elif name in reading.top:
            rows.append(_with_values(TensorRow(name, shape, "ignored", "the classifier"), tensor, ()))
        else:
            rows.append(TensorRow(name, shape, "ignored", reading.ignored[name]))
    return rows + [TensorRow(name, (), "missing", "", problem="missing") for name in found.missing]


def _with_values(row: TensorRow, tensor: np.ndarray, path: VariablePath) -> TensorRow:
    values = np.asarray(tensor, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # that a value is not finite is said below
        figures = (values.mean(), values.std(), values.min(), values.max()) if values.size else (np.nan,) * 4
    mean, std, low, high = (float(value) if np.isfinite(value) else None for value in figures)
    problem = row.problem or next((words for words, holds in SUSPICIOUS.items() if holds(values, path)), "")
    return replace(row, mean=mean, std=std, low=low, high=high, problem=problem)


# What no trained network has, the worst first. For a classifier, whose path is empty, only the first can hold.
SUSPICIOUS: Mapping[str, Callable[[np.ndarray, VariablePath], bool]] = {
    "values that are not finite": lambda values, path: not np.isfinite(values).all(),
    "variances below zero": lambda values, path: path[-1:] == ("var",) and bool((values < 0).any()),
    "nothing but zeros": lambda values, path: path[-1:] in {("kernel",), ("var",), ("scale",)} and not values.any(),
    "all values alike": lambda values, path: path[-1:] == ("kernel",) and values.size > 1 and not np.ptp(values),
}


def fingerprint_of(backbone: Backbone) -> dict[str, Any]:
    """Figures of a network's features on drawn images, by which two copies of it can be compared across machines.

    The images are the same everywhere; the figures agree to about five digits between kinds of hardware.
    """
    images, _ = draw_shapes(FINGERPRINT_IMAGES, seed=0)
    features = np.asarray(jax.jit(extract)(backbone, images))
    return {
        "images": f"{FINGERPRINT_IMAGES} drawn shapes, seed 0, at {backbone.image_size}x{backbone.image_size}",
        "mean": float(features.mean()),
        "std": float(features.std(axis=0).mean()),
        "norm": float(np.linalg.norm(features)),
        "first": [float(value) for value in features[0, :FINGERPRINT_FEATURES]],
    }
