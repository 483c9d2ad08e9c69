"""The configuration of a run, its checks, and the named presets."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from cifar_jax.config.option_groups import (
    DEFAULTS,
    FINETUNE_ONLY,
    GROUP_OF,
    GROUPS,
    HINTS,
    PATHS,
    BackboneConfig,
    DataConfig,
    FinetuneConfig,
    OptimConfig,
    RunConfig,
)
from cifar_jax.errors import UserError, no_such


@dataclass(frozen=True, init=False)
class TrainConfig:
    """Options of a training run. Each is an option of `train`, written with dashes: `--batch-size 64`."""

    preset: str
    """source of the other options' defaults: cifar10 (the main job), demo (synthetic shapes, takes a minute), finetune
    (all layers train) or pretrain (a small backbone from scratch)"""
    data: DataConfig
    backbone: BackboneConfig
    optim: OptimConfig
    finetune: FinetuneConfig
    run: RunConfig

    def __init__(
        self,
        preset: str = "cifar10",
        data: DataConfig | None = None,
        backbone: BackboneConfig | None = None,
        optim: OptimConfig | None = None,
        finetune: FinetuneConfig | None = None,
        run: RunConfig | None = None,
        **options: Any,
    ) -> None:
        """Builds a configuration from groups and single options: `TrainConfig(epochs=2, out="runs/two")`.

        `dataclasses.replace` takes the same arguments. Groups default to their defaults; single options override those
        of the groups. The preset is only recorded; use `preset()` for its values.

        Raises:
          UserError: for an invalid value, naming the option and the values it takes.
          TypeError: for an unknown option.
        """
        for name in options:
            if name not in GROUP_OF:
                raise TypeError(f"TrainConfig: {no_such('option', name, GROUP_OF)}")
        given = (data, backbone, optim, finetune, run)
        groups = {name: group or GROUPS[name]() for name, group in zip(GROUPS, given, strict=True)}
        object.__setattr__(self, "preset", preset)
        for name, group in groups.items():
            own = {option: value for option, value in options.items() if GROUP_OF[option] == name}
            object.__setattr__(self, name, replace(group, **own))
        _check_values(self.options())
        _check_together(self.options())

    if not TYPE_CHECKING:  # hidden from mypy, so that the package itself reads `config.optim.epochs`

        def __getattr__(self, name: str) -> Any:
            """Returns an option by name, without its group: `config.epochs`."""
            if name not in GROUP_OF:  # including the groups themselves, which are not set yet while copying
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            return getattr(getattr(self, GROUP_OF[name]), name)

    def options(self) -> dict[str, Any]:
        """Returns all options by name, without their groups."""
        groups = vars(self)
        return {"preset": self.preset} | {name: getattr(groups[group], name) for name, group in GROUP_OF.items()}

    def to_json(self) -> dict[str, Any]:
        """Returns all options by name as JSON values, for `from_json`."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in self.options().items()}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "TrainConfig":
        """Builds a configuration from the result of `to_json`.

        Raises:
          UserError: for an unknown field or an invalid value.
        """
        if unknown := sorted(set(fields) - {"preset", *GROUP_OF}):
            raise UserError(f"The configuration has unknown fields: {', '.join(unknown)}; remove them.")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        return TrainConfig(**values)


def _check_values(options: Mapping[str, Any]) -> None:
    """Checks each value by itself, as far as that needs no data or files."""

    def require(names: str, holds: Callable[[Any], object], must_be: str) -> None:
        for name in names.split():
            value = options[name]
            if not holds(value):
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else repr(value)
                raise UserError(f"--{name.replace('_', '-')} must be {must_be}, got {shown}.")

    for name, hint in {"preset": str, **HINTS}.items():
        require(name, partial(_is_a, hint=hint), _type_in_words(hint))
    counts = "epochs batch_size train_examples test_examples extract_batch_size micro_batch devices"
    require(f"{counts} checkpoint_every keep_checkpoints", lambda v: v is None or v >= 1, "at least 1")
    require("seed", lambda v: 0 <= v < 2**31, "between 0 and 2147483647")
    rates = "learning_rate backbone_learning_rate clip_norm"
    require(rates, lambda v: v is None or 0 < v < math.inf, "a positive number")
    fractions = "momentum val_fraction label_smoothing bn_momentum"
    require(fractions, lambda v: 0 <= v < 1, "at least 0 and below 1")
    require("test_fraction", lambda v: 0 < v < 1, "above 0 and below 1")
    require("weight_decay cache_limit warmup_epochs", lambda v: 0 <= v < math.inf, "a number of at least 0")
    require("freeze_stages", lambda v: 0 <= v <= 4, "between 0 and 4")
    require("augment", lambda v: len(set(v)) == len(v), "a list without repetitions")
    require("hidden", lambda v: all(1 <= width <= 2**20 for width in v), "widths between 1 and 1048576")
    require("dataset weights", str.strip, "a name")
    require(" ".join(PATHS), lambda v: v is None or v.strip(), "a path")
    require("image_size", lambda v: v is None or 32 <= v <= 4096, "between 32 and 4096")
    if options["preset"] not in PRESETS:
        raise UserError(no_such("--preset", options["preset"], PRESETS))


# Options that decide what meaning others have.
DECIDING = ("mode", "momentum", "schedule", "bn_statistics", "epochs", "batch_size")


def _meaningless(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the options that are set but do not apply given the others, each with its error message."""
    mode, is_set = options["mode"], {name for name, default in DEFAULTS.items() if options[name] != default}
    epochs, warmup = options["epochs"], options["warmup_epochs"]
    batch_size, micro_batch = options["batch_size"], options["micro_batch"]
    not_trained = f"has no meaning in --mode {mode}, which does not train the backbone; leave it out or use"
    for name in FINETUNE_ONLY:
        if mode != "finetune" and name in is_set:
            yield name, f"--{name.replace('_', '-')} {not_trained} --mode finetune."
    if options["augment"] and mode == "cached":
        reads_once = "--augment needs the pixels at every step, but --mode cached reads them only once"
        yield "augment", f"{reads_once}; leave it out or use --mode live or finetune."
    if options["interpolation"] != "auto" and options["resize"] == "upsample":
        repeats = "--interpolation applies to --resize eval-transform, while upsample repeats pixels"
        yield "interpolation", f"{repeats}; leave one of them out."
    if "feature_dtype" in is_set and mode != "cached":
        cached_only = "--feature-dtype applies to --mode cached only"
        yield "feature_dtype", f"{cached_only}; leave it out in --mode {mode}, which caches no features."
    if options["nesterov"] and not options["momentum"]:
        yield "nesterov", "--nesterov needs --momentum; give both or leave --nesterov out."
    if warmup >= epochs:
        yield "warmup_epochs", f"--warmup-epochs must be at least 0 and below --epochs {epochs}, got {warmup!r}."
    elif warmup and options["schedule"] != "cosine":
        yield "warmup_epochs", "--warmup-epochs goes with --schedule cosine; give that as well, or leave it out."
    if micro_batch and micro_batch > batch_size:
        yield "micro_batch", f"--micro-batch must be at most --batch-size {batch_size}, got {micro_batch}."
    if "bn_momentum" in is_set and options["bn_statistics"] == "frozen":
        frozen = "--bn-momentum moves no statistics with --bn-statistics frozen"
        yield "bn_momentum", f"{frozen}; leave one of them out."


def _check_together(options: Mapping[str, Any]) -> None:
    """Raises UserError for options that contradict each other."""
    for _, message in _meaningless(options):
        raise UserError(message)
    if {"crop", "random-resized-crop"} <= set(options["augment"]):
        raise UserError("--augment crop and random-resized-crop each choose a part of an image; leave one of them out.")
    if options["resume"] and options["overwrite"]:
        raise UserError("--resume continues the run that --overwrite would delete; leave one of them out.")
    if options["resume"] and options["out"] is None:
        raise UserError("--resume needs the run directory to continue; give it with --out.")


def without_meaningless(config: TrainConfig, decided: dict[str, Any]) -> TrainConfig:
    """Resets the options of a preset or an earlier run that do not apply given the options typed.

    Args:
      config: the configuration of the preset or run.
      decided: the typed options among `DECIDING`.
    """
    options = config.options()
    return TrainConfig(**options | {name: DEFAULTS[name] for name, _ in _meaningless(options | decided)})


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type. An int is accepted as a float, a bool is not accepted as a number."""
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
    """Describes a field's type for a message: `a whole number or nothing`."""
    arguments = get_args(hint)
    if get_origin(hint) is tuple:
        item = arguments[0]
        items = ", ".join(get_args(item)) if get_origin(item) is Literal else _WORDS[item].removeprefix("a ") + "s"
        return f"a list of {items}"
    if get_origin(hint) is Literal:
        return " or ".join(arguments)
    return " or ".join(_WORDS[one] for one in arguments or (hint,))


# Options that each preset sets. `cifar10` is the job of the Keras notebook; `demo` shows it in a minute, offline;
# `finetune` is the recipe of the Keras lab that the notebook descends from, which trains all layers (published runs
# reach 95.1 to 95.5 %, not measured here); `pretrain` trains a quarter-width backbone from scratch.
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "demo": {
        "dataset": "shapes",
        "weights": "demo",
        "train_examples": 5000,
        "test_examples": 1000,
        # With only 316 steps, momentum and a learning rate that decays to zero help most.
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


def preset(name: str, **options: Any) -> TrainConfig:
    """The configuration that a preset stands for, with some options changed.

    Those of the preset that have no meaning beside `options` get their defaults, as on the command line:
    `preset("pretrain", mode="live")`, where `dataclasses.replace` would refuse its `bn_momentum`.

    Args:
      name: of the preset.
      **options: single options by name.

    Raises:
      UserError: when there is no such preset, or for a value that is not allowed.
      TypeError: for an option that there is not.
    """
    theirs = TrainConfig(preset=name, **PRESETS.get(name, {}))
    _check_values(theirs.options() | options)
    decided = {option: value for option, value in options.items() if option in DECIDING}
    return replace(without_meaningless(theirs, decided), **options)
