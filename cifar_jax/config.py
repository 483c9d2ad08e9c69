"""What a run is told: one small frozen dataclass, its checks, and the named presets."""

import dataclasses
import math
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cifar_jax.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. Each is an option of `train` with dashes: `--batch-size 64`.

    Raises:
      UserError: when a value cannot be, naming the option and what it may be.
    """

    preset: str = "cifar10"
    """where the other options get their defaults from: cifar10 (the main job) or demo (drawn shapes, a minute)"""
    dataset: str = "cifar10"
    """cifar10, shapes (drawn, needs no download), or the name of another 32x32 classification set of TFDS"""
    data_dir: str | None = None
    """where TFDS keeps its data sets; else $TFDS_DATA_DIR, else ~/tensorflow_datasets"""
    weights: str = "keras-resnet50"
    """the frozen backbone: a file, a name that `info` lists, or random / random-w16 (untrained)"""
    variant: str | None = None
    """how to run the weights, where their file leaves a choice: keras, keras-2016 or keras-2016-unpadded"""
    image_size: int | None = None
    """side in pixels to which images are upsampled; a multiple of 32; else the weights' own (224 for ImageNet's)"""
    mode: Literal["cached", "live"] = "cached"
    """cached: features once, then the head on them; live: every step through the whole network, as Keras does"""
    epochs: int = 4
    """passes over the training images"""
    batch_size: int = 64
    """examples a step; the last step of an epoch takes what is left"""
    learning_rate: float = 0.01
    """step size of SGD"""
    momentum: float = 0.0
    """momentum of SGD, 0 to below 1"""
    hidden: tuple[int, ...] = (1024, 512)
    """widths of the head's hidden layers"""
    seed: int = 0
    """seed of everything random: initial head, order, subsets, drawn images"""
    train_examples: int | None = None
    """train on that many images, balanced over the classes; else all"""
    test_examples: int | None = None
    """test on that many images, balanced over the classes; else all"""
    val_fraction: float = 0.0
    """share of the training images held out for validation; at 0 the test images are, as in the notebook"""
    shuffle: bool = True
    """reshuffle the training images every epoch"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """what the backbone computes in; parameters, features and head are float32 either way"""
    extract_batch_size: int | None = None
    """images at a time through the backbone when features are extracted; else chosen by device and image size"""
    cache_dir: str | None = None
    """where decoded data, features and downloaded weights are kept; else $CIFAR_JAX_CACHE, else ~/.cache/cifar_jax"""
    out: str | None = None
    """the run directory; else runs/TIME-PRESET"""
    overwrite: bool = False
    """replace the run that is already in the run directory"""
    progress: bool = True
    """progress bars (only ever on a terminal)"""
    debug: bool = False
    """show tracebacks, and stop at the first NaN that any compiled function makes (slow)"""

    def __post_init__(self) -> None:
        """Checks every value that can be judged without looking at data or files."""
        for name, hint in get_type_hints(TrainConfig).items():
            must_be = " or ".join(get_args(hint)) if get_origin(hint) is Literal else f"of type {_type_name(hint)}"
            _require(self, name, lambda v, hint=hint: _is_a(v, hint), must_be)
        counts = ("epochs", "batch_size", "train_examples", "test_examples", "extract_batch_size")
        for name in counts:
            _require(self, name, lambda v: v is None or v >= 1, "at least 1")
        _require(self, "seed", lambda v: 0 <= v < 2**31, "in 0..2147483647")
        _require(self, "learning_rate", lambda v: 0 < v < math.inf, "a positive number")
        _require(self, "momentum", lambda v: 0 <= v < 1, "at least 0 and below 1")
        _require(self, "val_fraction", lambda v: 0 <= v < 1, "at least 0 and below 1")
        _require(self, "hidden", lambda v: all(1 <= width <= 2**20 for width in v), "widths of 1 to 1048576")
        for name in ("dataset", "weights"):
            _require(self, name, str.strip, "a name")
        sides = range(32, 4097, 32)  # the images' own side is 32
        _require(self, "image_size", lambda v: v is None or v in sides, "a multiple of 32, at most 4096")
        if self.preset not in PRESETS:
            raise UserError(f"--preset {self.preset!r} is not known; choose one of {', '.join(sorted(PRESETS))}.")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; `from_json` reads them back."""
        return dataclasses.asdict(self) | {"hidden": list(self.hidden)}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "TrainConfig":
        """Reads what `to_json` wrote.

        Raises:
          UserError: for a field that is not known or a value that cannot be.
        """
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        if unknown := sorted(set(fields) - known):
            raise UserError(f"The configuration has fields that are not known: {', '.join(unknown)}; remove them.")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        return TrainConfig(**values)


def _require(config: TrainConfig, name: str, holds: Any, must_be: str) -> None:
    value = getattr(config, name)
    if not holds(value):
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else repr(value)
        raise UserError(f"--{name.replace('_', '-')} {shown} cannot be: it must be {must_be}.")


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; a whole number will do for a float, but a bool is no number."""
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return value in arguments
    if get_origin(hint) is UnionType:
        return any(_is_a(value, one) for one in arguments)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_a(item, arguments[0]) for item in value)
    return type(value) is hint or (hint is float and type(value) is int)


def _type_name(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return f"list of {_type_name(get_args(hint)[0])}"
    return hint.__name__ if type(hint) is type else str(hint)


# What each preset changes. `cifar10` is the job of the Keras notebook; `demo` shows it all in a minute, offline.
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "demo": {
        "dataset": "shapes",
        "weights": "random-w16",
        "train_examples": 5000,
        "test_examples": 1000,
    },
}


def preset(name: str) -> TrainConfig:
    """The configuration that a preset stands for.

    Raises:
      UserError: when there is no such preset.
    """
    return TrainConfig(preset=name, **PRESETS.get(name, {}))
