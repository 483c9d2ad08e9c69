"""The configuration of a run: one frozen dataclass, its checks, and the named presets."""

import dataclasses
import math
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cifar_jax.errors import UserError
from cifar_jax.suggest import no_such


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. Each is an option of `train` with dashes: `--batch-size 64`.

    Raises:
      UserError: for a value that is not allowed, naming the option and what it takes.
    """

    preset: str = "cifar10"
    """where the other options get their defaults from: cifar10 (the main job), demo (drawn shapes, a minute),
    finetune (all layers train) or pretrain (a small backbone from scratch)"""
    dataset: str = "cifar10"
    """cifar10, shapes (drawn, needs no download), or the name of another 32x32 classification set of TFDS"""
    data_dir: str | None = None
    """where TFDS keeps its data sets; else $TFDS_DATA_DIR, else ~/tensorflow_datasets"""
    weights: str = "keras-resnet50"
    """the backbone: a file or directory, a name that `info` lists, or random / random-w16 (untrained)"""
    variant: str | None = None
    """how to run the weights, where their file leaves a choice: keras, keras-2016, keras-2016-unpadded, torchvision or
    huggingface"""
    image_size: int | None = None
    """side in pixels to which images are upsampled; a multiple of 32; else the weights' own (224 for ImageNet's)"""
    mode: Literal["cached", "live", "finetune"] = "cached"
    """cached: features once, then the head on them; live: every step through the whole network, as Keras does;
    finetune: backbone and head train together"""
    epochs: int = 4
    """passes over the training images"""
    batch_size: int = 64
    """examples a step; the last step of an epoch takes what is left"""
    learning_rate: float = 0.01
    """step size of SGD, also --lr; with --schedule cosine its peak"""
    momentum: float = 0.0
    """momentum of SGD, 0 to below 1"""
    nesterov: bool = False
    """Nesterov's form of momentum"""
    weight_decay: float = 0.0
    """share of every kernel that is added to its gradient; biases and BatchNorm are left out"""
    schedule: Literal["constant", "cosine"] = "constant"
    """learning rate schedule: constant, or a cosine that falls to zero over all steps"""
    warmup_epochs: float = 0.0
    """epochs over which --schedule cosine first rises to the learning rate; below --epochs"""
    label_smoothing: float = 0.0
    """share of each label that is spread over all classes, 0 to below 1; the training loss is reported with it"""
    clip_norm: float | None = None
    """gradients of a larger norm (over all trained parameters together) are scaled down to it"""
    augment: tuple[Literal["flip", "crop", "cutout"], ...] = ()
    """random changes to each training image: flip, crop (padded by 4), cutout (a grey square); not with cached"""
    freeze_stages: int = 0
    """finetune: the stem and that many stages keep their parameters and statistics, 1 to 4; 0 freezes nothing"""
    backbone_learning_rate: float | None = None
    """finetune: step size of the backbone's parameters; else --learning-rate"""
    bn_statistics: Literal["batch", "frozen"] = "batch"
    """finetune: BatchNorm normalises by each batch and updates its statistics as Keras does, or keeps its statistics"""
    bn_momentum: float = 0.99
    """finetune: share of its old statistics that BatchNorm keeps at each step, 0 to below 1"""
    zero_gamma: bool = False
    """finetune: start with zero scale in the last BatchNorm of each block, so that blocks begin as identities"""
    micro_batch: int | None = None
    """finetune: run a step in pieces of that many examples, which takes less memory; each piece is normalised alone"""
    remat: bool = False
    """finetune: compute each block's activations again in the backward pass, which takes less memory and more time"""
    hidden: tuple[int, ...] = (1024, 512)
    """widths of the head's hidden layers, as 512 256 or 512,256; none after it for a linear probe"""
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
    """images at a time through the backbone when features are extracted; else chosen by device and image size; a power
    of two up to 1024 divides the chunks that features are kept in, another number leaves their last batches unfilled"""
    feature_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """cached: what features are kept in; the smaller ones take half the space and round them, the first time too"""
    devices: int | None = None
    """devices of this machine that each training step is divided between; else all accelerators, or one CPU device"""
    cache_dir: str | None = None
    """where decoded data, features, compiled functions and downloaded weights are kept; else $CIFAR_JAX_CACHE, else
    ~/.cache/cifar_jax"""
    cache_limit: float = 20.0
    """gigabytes of features that are kept; beyond it those used least recently are removed, never the run's own"""
    out: str | None = None
    """the run directory; else runs/TIME-PRESET"""
    config: str | None = None
    """a run directory or its config.json, from which the other options get their defaults: the same run again, in a
    directory of its own; --preset does the same with a name"""
    resume: bool = False
    """continue the unfinished run in --out from its newest checkpoint, to the same bits; start it if there is none"""
    checkpoint_every: int | None = None
    """steps after which a checkpoint is made within an epoch; else only at its end, and when Ctrl-C or SIGTERM comes"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints are kept, beside the best where --val-fraction holds images out"""
    overwrite: bool = False
    """replace the run that is already in the run directory"""
    profile: str | None = None
    """write a trace of the run to that directory, for XProf or Perfetto; best of a short run"""
    progress: bool = True
    """progress bars (only ever on a terminal)"""
    deterministic: bool = False
    """on a GPU take only algorithms that give the same bits every time, which is slower; a CPU and a TPU always do"""
    debug: bool = False
    """show tracebacks, and stop at the first NaN that any compiled function makes (slow)"""

    def __post_init__(self) -> None:
        """Checks every value that can be judged without looking at data or files."""
        for name, hint in get_type_hints(TrainConfig).items():
            _require(self, name, lambda v, hint=hint: _is_a(v, hint), _type_in_words(hint))
        counts = (
            "epochs",
            "batch_size",
            "train_examples",
            "test_examples",
            "extract_batch_size",
            "micro_batch",
            "devices",
            "checkpoint_every",
            "keep_checkpoints",
        )
        for name in counts:
            _require(self, name, lambda v: v is None or v >= 1, "at least 1")
        _require(self, "seed", lambda v: 0 <= v < 2**31, "between 0 and 2147483647")
        for name in ("learning_rate", "backbone_learning_rate", "clip_norm"):
            _require(self, name, lambda v: v is None or 0 < v < math.inf, "a positive number")
        for name in ("momentum", "val_fraction", "label_smoothing", "bn_momentum"):
            _require(self, name, lambda v: 0 <= v < 1, "at least 0 and below 1")
        for name in ("weight_decay", "cache_limit"):
            _require(self, name, lambda v: 0 <= v < math.inf, "a number of at least 0")
        _require(self, "warmup_epochs", lambda v: 0 <= v < self.epochs, f"at least 0 and below --epochs {self.epochs}")
        _require(self, "freeze_stages", lambda v: 0 <= v <= 4, "between 0 and 4")
        _require(self, "augment", lambda v: len(set(v)) == len(v), "a list without repetitions")
        at_most = f"at most --batch-size {self.batch_size}"
        _require(self, "micro_batch", lambda v: v is None or v <= self.batch_size, at_most)
        _require(self, "hidden", lambda v: all(1 <= width <= 2**20 for width in v), "widths between 1 and 1048576")
        for name in ("dataset", "weights"):
            _require(self, name, str.strip, "a name")
        for name in ("data_dir", "cache_dir", "out", "config", "profile"):
            _require(self, name, lambda v: v is None or v.strip(), "a path")
        sides = range(32, 4097, 32)  # the images' own side is 32
        _require(self, "image_size", lambda v: v is None or v in sides, "a multiple of 32, at most 4096")
        if self.preset not in PRESETS:
            raise UserError(no_such("--preset", self.preset, PRESETS))
        _check_together(self)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; `from_json` reads them back."""
        return dataclasses.asdict(self) | {"hidden": list(self.hidden), "augment": list(self.augment)}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "TrainConfig":
        """Reads what `to_json` wrote.

        Raises:
          UserError: for an unknown field or a value that is not allowed.
        """
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        if unknown := sorted(set(fields) - known):
            raise UserError(f"The configuration has unknown fields: {', '.join(unknown)}; remove them.")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        return TrainConfig(**values)


def _require(config: TrainConfig, name: str, holds: Any, must_be: str) -> None:
    value = getattr(config, name)
    if not holds(value):
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else repr(value)
        raise UserError(f"--{name.replace('_', '-')} must be {must_be}, got {shown}.")


# What has a meaning only where the backbone trains.
FINETUNE_ONLY = (
    "freeze_stages",
    "backbone_learning_rate",
    "bn_statistics",
    "bn_momentum",
    "zero_gamma",
    "micro_batch",
    "remat",
)


def _check_together(config: TrainConfig) -> None:
    """Refuses options that do not go with each other."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for name in FINETUNE_ONLY:
        if config.mode != "finetune" and getattr(config, name) != defaults[name]:
            raise UserError(
                f"--{name.replace('_', '-')} has no meaning in --mode {config.mode}, in which the backbone does not "
                "train; leave it out or use --mode finetune."
            )
    if config.augment and config.mode == "cached":
        raise UserError(
            "--augment needs the pixels at every step, which --mode cached sees only once; leave it out or use --mode "
            "live or finetune."
        )
    if config.feature_dtype != defaults["feature_dtype"] and config.mode != "cached":
        raise UserError(
            f"--feature-dtype says what --mode cached keeps; leave it out with --mode {config.mode}, which keeps none."
        )
    if config.nesterov and not config.momentum:
        raise UserError("--nesterov is a form of momentum; give --momentum as well, or leave it out.")
    if config.warmup_epochs and config.schedule != "cosine":
        raise UserError("--warmup-epochs goes with --schedule cosine; give that as well, or leave it out.")
    if config.bn_momentum != defaults["bn_momentum"] and config.bn_statistics == "frozen":
        raise UserError("--bn-momentum moves no statistics with --bn-statistics frozen; leave one of them out.")
    if config.resume and config.overwrite:
        raise UserError("--resume continues the run that --overwrite would remove; leave one of them out.")
    if config.resume and config.out is None:
        raise UserError("--resume needs the directory of the run to continue; name it with --out.")


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


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "nothing"}


def _type_in_words(hint: Any) -> str:
    """A field's type as a message says it: `a whole number or nothing`."""
    arguments = get_args(hint)
    if get_origin(hint) is tuple:
        item = arguments[0]
        of = ", ".join(get_args(item)) if get_origin(item) is Literal else _WORDS[item].removeprefix("a ") + "s"
        return f"a list of {of}"
    if get_origin(hint) is Literal:
        return " or ".join(arguments)
    return " or ".join(_WORDS[one] for one in arguments or (hint,))


# What each preset changes. `cifar10` is the job of the Keras notebook; `demo` shows it all in a minute, offline;
# `finetune` is the recipe of the Keras lab that the notebook descends from, which trains all layers (published runs
# reach 95.1 to 95.5 %, which is not measured here); `pretrain` makes a quarter-width backbone from scratch.
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "demo": {
        "dataset": "shapes",
        "weights": "demo",
        "train_examples": 5000,
        "test_examples": 1000,
        # 316 steps are few: momentum and a rate that falls to zero make the most of them.
        "learning_rate": 0.03,
        "momentum": 0.9,
        "schedule": "cosine",
    },
    "finetune": {"mode": "finetune"},
    "pretrain": {
        "dataset": "cifar100_subset",
        "weights": "random-w16",
        "image_size": 64,
        "mode": "finetune",
        "epochs": 30,
        "batch_size": 128,
        "learning_rate": 0.2,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "warmup_epochs": 2.0,
        "label_smoothing": 0.1,
        "augment": ("flip", "crop"),
        "bn_momentum": 0.9,
        "zero_gamma": True,
        "hidden": (),
    },
}


def preset(name: str) -> TrainConfig:
    """The configuration that a preset stands for.

    Raises:
      UserError: when there is no such preset.
    """
    return TrainConfig(preset=name, **PRESETS.get(name, {}))
