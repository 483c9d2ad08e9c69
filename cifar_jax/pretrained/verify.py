"""Detailed checks of a weights file: each tensor, the features it produces, and parity with a reference library."""

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
from cifar_jax.models.resnet import network_name
from cifar_jax.pretrained import reference_libraries, registry
from cifar_jax.pretrained.load import read_weights
from cifar_jax.pretrained.merge import Match, ParsedWeights, Path as VariablePath, backbone_of, match

IMAGE_SIDE = 32  # of synthetic images; the network's input size must be a multiple of it
FINGERPRINT_IMAGES = 4
FINGERPRINT_FEATURES = 6  # of the first image, enough to tell two networks apart at a glance


@dataclass(frozen=True)
class TensorRow:
    """A tensor that a file has or should have.

    Attributes:
      name: name in the file.
      shape: shape in the file.
      fate: `used`, `ignored`, `missing` or `unknown`.
      role: path of the variable that it fills, or the reason for ignoring it.
      mean, std, low, high: statistics of its values.
      problem: description of its problem, or an empty string.
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
    """The result of `verify`.

    Attributes:
      about: description of the file and its network, by topic.
      tensors: a row for each tensor that the file has or should have.
      fingerprint: statistics of the network's features on synthetic images, by name; empty if it does not load.
      differences: relative differences from a reference library's outputs, by stage; empty if none was requested.
      problems: a sentence for each problem.
    """

    about: dict[str, str]
    tensors: list[TensorRow]
    fingerprint: dict[str, Any]
    differences: dict[str, float]
    problems: list[str]

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values; `holds` is true if there are no problems."""
        return without_nan({"holds": not self.problems} | asdict(self))


def verify(
    path_or_name: str | Path,
    variant: str | None = None,
    against: str | None = None,
    *,
    runners: Mapping[str, reference_libraries.Runner] = reference_libraries.RUNNERS,
    **load_kwargs: Any,
) -> Verification:
    """Checks weights as a whole and tensor by tensor.

    Args:
      path_or_name: any path or name that `load_backbone` accepts.
      variant: the variant, for files that leave it open.
      against: a key of `runners`, the library to compare outputs with.
      runners: functions that run the network in a reference library, by name.
      load_kwargs: passed to `load_backbone`.

    Raises:
      WeightsError: if the file cannot be read, or its network is not recognised.
      UserError: if the library is not installed, or has no such network.
    """
    parsed = read_weights(path_or_name, variant, **load_kwargs)
    rows = tensor_rows(parsed, match(parsed))
    problems = [f"{row.name}: {row.problem}." for row in rows if row.problem]
    registered, mismatch = registry.entry_of_file(parsed.path, load_kwargs.get("known") or registry.entries())
    problems += [mismatch] if mismatch else []
    fingerprint: dict[str, Any] = {}
    differences: dict[str, float] = {}
    try:
        backbone = backbone_of(parsed)
    except WeightsError as error:
        if not problems or str(error) == parsed.refusal:
            problems.append(str(error))
    else:
        side = max(IMAGE_SIDE, backbone.image_size // IMAGE_SIDE * IMAGE_SIDE)
        fingerprint = compute_fingerprint(backbone.replace(image_size=side))
        if against is not None:
            differences = reference_libraries.differences(runners[against], parsed, backbone.replace(image_size=side))
        if not fingerprint["std"] > 0:
            problems.append("The network is dead: all synthetic images have the same features.")
        problems += [
            f"{name} differs from that of {against} by {value:.2g}, more than {reference_libraries.TOLERANCE:g}."
            for name, value in differences.items()
            if not value <= reference_libraries.TOLERANCE
        ]
    return Verification(_about(parsed, registered), rows, fingerprint, differences, problems)


def _about(parsed: ParsedWeights, registered: registry.Entry | None) -> dict[str, str]:
    config, preprocessing = parsed.config, parsed.preprocessing
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    bias = parsed.tensors.get(parsed.top[1])
    counts = f"{sum(np.size(tensor) for tensor in parsed.tensors.values()):,} numbers"
    return {
        "file": str(parsed.path),
        "bytes": f"{parsed.path.stat().st_size:,}",
        "sha256": sha256_of_file(parsed.path),
        "registry": f"{registered.name} ({registered.digest}), {registered.licence}" if registered else "not in it",
        "network": f"{network_name(config)}, {config.features} features",
        "tensors": f"{len(parsed.tensors)} of the family {parsed.family}, {counts}",
        "variant": parsed.variant,
        "assumed": " ".join(parsed.notes) or "nothing",
        "stride": f"in the {'first 1x1' if config.stride_in_1x1 else '3x3'} convolution of a stage's first block",
        "conv bias": "yes" if config.conv_bias else "no",
        "BatchNorm epsilon": f"{config.bn_epsilon:g}",
        "max-pool": "padded" if config.pool_padding else "not padded",
        "preprocessing": f"{preprocessing.name}: {preprocessing.channels.upper()} / {preprocessing.scale:g}, minus "
        f"{mean}, by {std}",
        "image size": f"{parsed.image_size}x{parsed.image_size}",
        "photos": parsed.transform.at(parsed.image_size).words(),
        "classifier": "none" if bias is None else f"{bias.size} classes, kept and not used",
    }


def tensor_rows(parsed: ParsedWeights, found: Match) -> list[TensorRow]:
    """Returns a row for each tensor that a file has or should have, in the file's order, missing ones last."""
    roles = {parsed.names[path]: path for path in found.views}
    rows = []
    for name, tensor in parsed.tensors.items():
        shape = tuple(np.shape(tensor))
        if name in found.extra:
            rows.append(TensorRow(name, shape, "unknown", "", problem="unexpected tensor"))
        elif name in roles:
            problem = f"shape {shape}, expected {found.wrong[name][1]}" if name in found.wrong else ""
            row = TensorRow(name, shape, "used", "/".join(roles[name]), problem=problem)
            rows.append(_with_statistics(row, tensor, roles[name]))
        elif name in parsed.top:
            rows.append(_with_statistics(TensorRow(name, shape, "ignored", "the classifier"), tensor, ()))
        else:
            rows.append(TensorRow(name, shape, "ignored", parsed.ignored[name]))
    return rows + [TensorRow(name, (), "missing", "", problem="missing") for name in found.missing]


def _with_statistics(row: TensorRow, tensor: np.ndarray, path: VariablePath) -> TensorRow:
    values = np.asarray(tensor, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # non-finite values are reported below
        statistics = (values.mean(), values.std(), values.min(), values.max()) if values.size else (np.nan,) * 4
    mean, std, low, high = (float(value) if np.isfinite(value) else None for value in statistics)
    problem = row.problem or next((problem for problem, found in SUSPICIOUS.items() if found(values, path)), "")
    return replace(row, mean=mean, std=std, low=low, high=high, problem=problem)


# Values that no trained network has, the worst first. Only the first check applies to classifiers, whose path is empty.
SUSPICIOUS: Mapping[str, Callable[[np.ndarray, VariablePath], bool]] = {
    "non-finite values": lambda values, path: not np.isfinite(values).all(),
    "negative variances": lambda values, path: path[-1:] == ("var",) and bool((values < 0).any()),
    "all zeros": lambda values, path: path[-1:] in {("kernel",), ("var",), ("scale",)} and not values.any(),
    "all values equal": lambda values, path: path[-1:] == ("kernel",) and values.size > 1 and not np.ptp(values),
}


def compute_fingerprint(backbone: Backbone) -> dict[str, Any]:
    """Computes statistics of a network's features on synthetic images, to compare copies of it across machines.

    The images are the same everywhere; the values agree to about five digits between kinds of hardware.
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
