"""The options of each command, as dataclasses that tyro reads."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import tyro

from cifar_jax.cli.parsing import REGISTRY, program
from cifar_jax.config import DECIDING, PRESETS, TrainConfig, preset, without_meaningless
from cifar_jax.config.groups import DEFAULTS, GROUP_OF, HINTS, OF_THE_COMMAND
from cifar_jax.data.load import check_name
from cifar_jax.errors import UserError
from cifar_jax.files import read_json_value


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every command."""

    json: bool = False
    """print JSON"""
    debug: bool = False
    """show tracebacks"""


@dataclass(frozen=True)
class EvaluateOptions(Common):
    """Score a run's head on its test images again, all of them."""

    run: tyro.conf.Positional[str]
    """the run directory"""
    allow_incomplete: bool = False
    """score an interrupted, failed or diverged run too, after a warning"""
    data_dir: str | None = None
    """where TFDS keeps its data sets, if it has moved since"""
    weights: str | None = None
    """a copy of the run's backbone, if it has moved since"""


@dataclass(frozen=True)
class PredictOptions(Common):
    """Say what is in image files: the three likeliest classes with their probabilities."""

    run: tyro.conf.Positional[str]
    """the run directory"""
    images: tyro.conf.Positional[tuple[str, ...]]
    """PNG, JPEG or other image files of any size"""
    direct: bool = False
    """resize straight to the network's size, not through 32x32 as the training images"""
    allow_incomplete: bool = False
    """use an interrupted, failed or diverged run too, after a warning"""
    weights: str | None = None
    """a copy of the run's backbone, if it has moved since"""


@dataclass(frozen=True)
class InfoOptions(Common):
    """Versions, devices, and which known weights and data sets are on this machine; or what the cache holds."""

    topic: tyro.conf.Positional[Literal["all", "environment", "weights", "data", "devices", "cache"]] = "all"
    """what to tell of; environment, weights and data if it is left out"""
    clear: bool = False
    """with cache: remove features, decoded images and compiled functions from it, but no downloaded weights"""
    data_dir: str | None = None
    """where TFDS keeps its data sets; else $TFDS_DATA_DIR, else ~/tensorflow_datasets"""
    cache_dir: str | None = None
    """where downloads and features are kept; else $CIFAR_JAX_CACHE, else ~/.cache/cifar_jax"""


@dataclass(frozen=True)
class FeaturesOptions(Common):
    """Write the features of a data set or of image files, for use elsewhere."""

    src: tyro.conf.Positional[tuple[str, ...]]
    """a data set (cifar10, shapes, or another 32x32 classification set of TFDS), or PNG, JPEG or other image files"""
    out: str
    """the file to write: .npz, or for image files also .npy, which holds the bare matrix"""
    weights: str = "keras-resnet50"
    """the backbone: a file or directory, or a name that `info` lists; of a data set also random / random-w16"""
    variant: str | None = None
    """how to run the weights, where their file leaves a choice"""
    image_size: int | None = None
    """side in pixels to which images are upsampled; a multiple of 32; else the weights' own (224 for ImageNet's)"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """what the backbone computes in; the features are float32 either way"""
    direct: bool = False
    """image files: resize straight to the network's size, not through 32x32 as the images of the data sets"""
    train_examples: int | None = None
    """data set: that many training images, balanced over the classes; else all"""
    test_examples: int | None = None
    """data set: that many test images, balanced over the classes; else all"""
    seed: int = 0
    """data set: seed of subsets, drawn images and untrained networks"""
    extract_batch_size: int | None = None
    """images at a time through the backbone; else chosen by device and image size"""
    data_dir: str | None = None
    """where TFDS keeps its data sets; else $TFDS_DATA_DIR, else ~/tensorflow_datasets"""
    cache_dir: str | None = None
    """where data, features and downloads are kept; else $CIFAR_JAX_CACHE, else ~/.cache/cifar_jax"""
    profile: str | None = None
    """write a trace of the extraction to that directory, for XProf or Perfetto"""
    overwrite: bool = False
    """replace the file if it is there"""

    def config(self) -> TrainConfig:
        """The configuration of a job that extracts the same features.

        Raises:
          UserError: for a value that is not allowed, or an unknown data set.
        """
        from cifar_jax.export.features import is_data_set

        theirs = {field.name for field in fields(self)} & set(GROUP_OF)
        values = {name: getattr(self, name) for name in theirs - set(OF_THE_COMMAND)}
        config = TrainConfig(dataset=self.src[0], batch_size=1, **values)
        if is_data_set(self.src):
            check_name(config.data.dataset, config.run.data_dir)
        return config


@dataclass(frozen=True)
class ConvertOptions(Common):
    """Write weights in another form: DST .safetensors is our own, .h5 that of Keras; --to names others."""

    src: tyro.conf.Positional[str]
    """a weights file, a directory of timm or transformers, or a name that `info` lists"""
    dst: tyro.conf.Positional[str]
    """the file to write"""
    to: Literal["ours", "keras", "torchvision", "huggingface"] | None = None
    """the form, where the ending of DST leaves it open"""
    variant: str | None = None
    """how SRC is run, where it leaves that open"""
    overwrite: bool = False
    """replace DST if it is there"""
    cache_dir: str | None = None
    """where downloads are kept; else $CIFAR_JAX_CACHE, else ~/.cache/cifar_jax"""


@dataclass(frozen=True)
class VerifyOptions(Common):
    """Say what a weights file is, how it is run and why, what becomes of each tensor, and all that is wrong with it."""

    file: tyro.conf.Positional[str]
    """a weights file, a directory of timm or transformers, or a name that `info weights` lists"""
    variant: str | None = None
    """how it is run, where it leaves that open"""
    against: Literal["keras", "torchvision", "timm", "transformers"] | None = None
    """a library that is asked what it computes with the same file, stage by stage; it must be installed"""
    cache_dir: str | None = None
    """where downloads are kept; else $CIFAR_JAX_CACHE, else ~/.cache/cifar_jax"""


def parse_train(arguments: list[str]) -> TrainConfig:
    """Parses the options of `train`, whose defaults are those of a preset or of an earlier run's config.json.

    Raises:
      UserError: for a value that is not allowed, or an unknown data set.
      SystemExit: when tyro has shown what is wrong, or the help.
    """
    # Here and not as tyro's alias, which would have the library import tyro for its configuration.
    arguments = [re.sub(r"^--lr(?==|$)", "--learning-rate", argument) for argument in arguments]
    # They set the defaults of the rest, so they must be known before that can be parsed.
    name, file = _value_of("--preset", arguments), _value_of("--config", arguments)
    if file is not None and name is not None:
        raise UserError(f"--config {file} includes a preset; leave out --preset {name}.")
    default = preset(name or next(iter(PRESETS))) if file is None else _config_in(Path(file))
    # What is typed may take the meaning from options of theirs, which nobody typed.
    default = without_meaningless(default, _typed(DECIDING, arguments))
    config: TrainConfig = parse(TrainConfig, arguments, "train", default=default)
    config = replace(config, run=replace(config.run, config=None))
    # Before the weights are looked for: a name typed wrong should not cost their download.
    check_name(config.data.dataset, config.run.data_dir)
    return config


def _config_in(path: Path) -> TrainConfig:
    """The configuration in a config.json, or in that of a run directory."""
    file = path / "config.json" if os.path.isdir(path) else path
    hint = "name a run directory or its config.json."
    try:
        found = read_json_value(file)
    except (OSError, ValueError) as error:
        raise UserError(f"--config {file} cannot be read ({_reason(error)}); {hint}") from error
    if not isinstance(found, dict) or not {"preset", "dataset", "weights"} <= set(found):
        raise UserError(f"--config {file} was not written by `train`; {hint}")
    _require_options_alone(file)
    try:
        return TrainConfig.from_json(found | {name: DEFAULTS[name] for name in OF_THE_COMMAND})
    except UserError as error:
        reason = str(error).rstrip(".")
        raise UserError(f"--config {file} is not as `train` wrote it ({reason}); {hint}") from error


def _require_options_alone(file: Path) -> None:
    """Refuses to run again, without its parts, a run that was passed some from Python."""
    from cifar_jax.runs.layout import read_inputs  # JAX takes a second

    if (inputs := read_inputs(file.parent)) and inputs.parts:
        parts = ", ".join(f"{part} {name}" for part, name in inputs.parts.items())
        raise UserError(
            f"--config {file}: that run was passed what options cannot name ({parts}); run its Python script again."
        )


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _value_of(option: str, arguments: list[str]) -> str | None:
    """The value that an option is given, the last one if there are several, as tyro has it."""
    found = None
    for argument, following in pairwise([*arguments, ""]):
        name, given, value = argument.partition("=")
        if name.replace("_", "-") == option and (given or (following and not following.startswith("-"))):
            found = value if given else following
    return found


def _typed(names: Iterable[str], arguments: list[str]) -> dict[str, Any]:
    """Values of the options with these names that are typed, without numbers that are none, of which tyro will tell."""
    found: dict[str, Any] = {}
    for name in names:
        if (text := _value_of(f"--{name.replace('_', '-')}", arguments)) is not None:
            with contextlib.suppress(ValueError):
                found[name] = HINTS[name](text) if HINTS[name] in (int, float) else text
    return found


def parse(options: Any, arguments: list[str], command: str, **how: Any) -> Any:
    """Parses the options of a command by tyro, which shows in its own words what it does not understand.

    Raises:
      UserError: for a flag that is given a value, of which tyro would name the value only.
      SystemExit: when tyro has shown what is wrong, or the help.
    """
    flags = set(_flags(options))
    for argument in arguments:
        flag, given, value = argument.partition("=")
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        if given and flag.startswith("--") and name in flags:
            raise UserError(f"{flag} takes no value, got {value or 'an empty one'}; leave out ={value}.")
    # The groups are sections of the help, and no part of an option's name.
    how |= {"config": (tyro.conf.OmitArgPrefixes,), "registry": REGISTRY}
    return tyro.cli(options, args=arguments, prog=f"{program()} {command}", **how)


def _flags(options: Any) -> Iterator[str]:
    """The names of options that take no value."""
    for field in fields(options):
        if is_dataclass(field.type):
            yield from _flags(field.type)
        elif field.type is bool:
            yield field.name
