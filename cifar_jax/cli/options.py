"""Options of each command, as dataclasses that tyro parses."""

import contextlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_type_hints

import tyro

from cifar_jax.cli.parsing import REGISTRY, program
from cifar_jax.config import DECIDING, PRESETS, TrainConfig, preset, without_meaningless
from cifar_jax.config.option_groups import DEFAULTS, GROUP_OF, HINTS, OF_THE_COMMAND
from cifar_jax.errors import UserError
from cifar_jax.export.format_names import FormatName
from cifar_jax.files import read_json_value


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options shared by the commands other than `train`."""

    json: bool = False
    """print JSON"""
    debug: bool = False
    """show tracebacks"""


@dataclass(frozen=True)
class EvaluateOptions(Common):
    """Score a run, or a model that was exported from one, on its test images or on other labelled pictures."""

    run: tyro.conf.Positional[str]
    """the run directory; or an .onnx file or a StableHLO directory that `export` wrote"""
    dataset: str | None = None
    """other pictures to score it on: a folder (ROOT/CLASS/... or ROOT/{train,test}/CLASS/...), an .npz file, a TFDS set
    or shapes, whose classes are matched by name; all of them, or the test images if the set has some"""
    label_key: str | None = None
    """name of the label, where the TFDS set of --dataset has several"""
    skip_unreadable: bool = False
    """leave out pictures of --dataset that cannot be read; if omitted, the first one is an error"""
    batch_size: int | None = None
    """images at a time; if omitted, 32 for an exported model, and for a run as in training"""
    allow_incomplete: bool = False
    """also score an interrupted, failed or diverged run, with a warning"""
    data_dir: str | None = None
    """TFDS data directory, if it has moved since the run"""
    weights: str | None = None
    """path of the run's backbone weights, if they have moved since the run"""


@dataclass(frozen=True)
class PredictOptions(Common):
    """Print the most likely classes of pictures with their probabilities, a row for each picture.

    With --json or --csv a row has path, label, probability and error, and the probability of every class.
    """

    run: tyro.conf.Positional[str]
    """the run directory; or an .onnx file or a StableHLO directory that `export` wrote"""
    sources: tyro.conf.Positional[tuple[str, ...]]
    """PNG, JPEG or other image files of any size, folders of them at any depth, quoted patterns such as
    "photos/**/*.jpg", or - for a list of paths on standard input, one a line or separated by NUL"""
    csv: bool = False
    """print CSV with a header"""
    top: int = 3
    """number of classes in a row, without --json and --csv"""
    batch_size: int | None = None
    """images at a time; if omitted, 32 for an exported model, and for a run by device and image size"""
    direct: bool = False
    """for a run on small images, which pictures are reduced to first: resize them directly to the network's input
    size"""
    allow_incomplete: bool = False
    """also use an interrupted, failed or diverged run, with a warning"""
    weights: str | None = None
    """path of the run's backbone weights, if they have moved since the run"""


@dataclass(frozen=True)
class ExportOptions(Common):
    """Export a trained run for other runtimes: image in, probabilities out, in one file or directory."""

    run: tyro.conf.Positional[str]
    """the run directory"""
    format: FormatName
    """onnx: a file for ONNX Runtime, OpenVINO and others; stablehlo: a directory for JAX on CPU, GPU or TPU; keras: a
    .keras file; pytorch: a directory of weights and a module; hub: the same and a model card, for the Hugging Face hub;
    web: a page that classifies photos in the browser"""
    out: str
    """file to write (.onnx, .keras, .html for web), or directory"""
    ort_web: str | None = None
    """web: directory of onnxruntime-web (dist of its npm package) to build into the page; if omitted, the page loads it
    from a CDN"""
    overwrite: bool = False
    """replace the file, or a directory that was exported, if it exists"""
    allow_incomplete: bool = False
    """also export an interrupted, failed or diverged run, with a warning"""
    weights: str | None = None
    """path of the run's backbone weights, if they have moved since the run"""


INFO_TOPICS = ("all", "environment", "weights", "data", "devices", "cache")


@dataclass(frozen=True)
class InfoOptions(Common):
    """Show versions, devices, known weights and local data sets, the contents of the cache, or what a data set holds.

    A data set is described as `train` would find it, and a contact sheet of it is written.
    """

    topic: tyro.conf.Positional[str] = "all"
    """all (environment, weights and data), environment, weights, data, devices, cache; or a data set, as --dataset of
    `train` takes it"""
    clear: bool = False
    """with `info cache`: delete cached features, decoded images and compiled functions, but no downloaded weights"""
    sheet: str | None = None
    """data set: PNG file to write the contact sheet to, which is replaced; if omitted, NAME-contact-sheet.png, and none
    with --json"""
    seed: int = 0
    """data set: random seed of the images on the contact sheet, and of held-out test images"""
    label_key: str | None = None
    """data set: name of the label to learn, where a TFDS set has several"""
    skip_unreadable: bool = False
    """data set: leave out pictures of a folder that cannot be read"""
    data_dir: str | None = None
    """TFDS data directory; if omitted, $TFDS_DATA_DIR or ~/tensorflow_datasets"""
    cache_dir: str | None = None
    """cache directory; if omitted, $CIFAR_JAX_CACHE or ~/.cache/cifar_jax"""


@dataclass(frozen=True)
class FeaturesOptions(Common):
    """Write the features of a data set or of image files to a file.

    A folder that has pictures directly in it is a list of images; one that has only folders is a data set with labels.
    """

    src: tyro.conf.Positional[tuple[str, ...]]
    """a data set (a folder with a folder for each class, an .npz file, a TFDS set by name or directory, or shapes); or
    image files, folders of them, quoted patterns such as "photos/**/*.jpg", or - for a list of paths on standard
    input"""
    out: str
    """file to write: .npz, or for image files also .npy, which holds the bare feature matrix"""
    weights: str = "keras-resnet50"
    """backbone weights: a file, a directory or a name from `info weights`; for a data set also random or random-w16"""
    variant: str | None = None
    """network variant to run the weights with, where the file does not determine it"""
    image_size: int | None = None
    """side of the network's input in pixels, a multiple of 32; if omitted, the weights' own (224 for ImageNet)"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """dtype the backbone computes in; the features are float32 either way"""
    resize: Literal["auto", "upsample", "eval-transform"] = "auto"
    """how pictures become the network's input, as for train: upsample repeats the pixels of small squares of one size;
    eval-transform resizes the shorter side and crops the centre; auto upsamples squares of at most 64 pixels"""
    interpolation: Literal["auto", "nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "auto"
    """eval-transform: filter of the resize; auto takes that of the weights"""
    skip_unreadable: bool = False
    """leave out files that cannot be read, and list them; if omitted, the first one is an error"""
    test_fraction: float = 0.2
    """data set: fraction of the images to test on, where it has neither test nor validation images"""
    label_key: str | None = None
    """data set: name of the label, where a TFDS set has several"""
    train_examples: int | None = None
    """data set: number of training images, balanced over the classes; if omitted, all"""
    test_examples: int | None = None
    """data set: number of test images, balanced over the classes; if omitted, all"""
    seed: int = 0
    """data set: random seed of subsets, synthetic images and untrained networks"""
    extract_batch_size: int | None = None
    """batch size of the feature extraction; if omitted, chosen by device and image size"""
    data_dir: str | None = None
    """TFDS data directory; if omitted, $TFDS_DATA_DIR or ~/tensorflow_datasets"""
    cache_dir: str | None = None
    """cache directory for data, features and downloads; if omitted, $CIFAR_JAX_CACHE or ~/.cache/cifar_jax"""
    profile: str | None = None
    """directory to write a profiler trace of the extraction to, for XProf or Perfetto"""
    overwrite: bool = False
    """replace the file if it exists"""

    def config(self) -> TrainConfig:
        """Returns the configuration of a job that extracts these features.

        Raises:
          UserError: for an invalid value, an unknown data set, or an option of data sets with image files.
        """
        from cifar_jax.data.load import check_name
        from cifar_jax.export.features import is_data_set

        shared = {field.name for field in fields(self)} & set(GROUP_OF)
        values = {name: getattr(self, name) for name in shared - set(OF_THE_COMMAND)}
        config = TrainConfig(dataset=self.src[0], batch_size=1, **values)
        if is_data_set(self.src):
            check_name(config.data.dataset, config.run.data_dir)
            return config
        for name in ("test_fraction", "label_key", "train_examples", "test_examples"):
            if (value := getattr(self, name)) != DEFAULTS[name]:
                option = f"--{name.replace('_', '-')} {value}"
                raise UserError(f"{option} applies to a data set, but {self.src[0]} is a list of images; leave it out.")
        return config


@dataclass(frozen=True)
class ConvertOptions(Common):
    """Convert weights: DST ending in .safetensors gets this project's format, .h5 Keras's; --to selects others."""

    src: tyro.conf.Positional[str]
    """a weights file, a timm or transformers directory, or a name from `info weights`"""
    dst: tyro.conf.Positional[str]
    """file to write"""
    to: Literal["ours", "keras", "torchvision", "huggingface"] | None = None
    """format to write, where the extension of DST does not determine it"""
    variant: str | None = None
    """network variant of SRC, where the file does not determine it"""
    overwrite: bool = False
    """replace DST if it exists"""
    cache_dir: str | None = None
    """cache directory for downloads; if omitted, $CIFAR_JAX_CACHE or ~/.cache/cifar_jax"""


@dataclass(frozen=True)
class VerifyOptions(Common):
    """Check a weights file: its format, network variant and why, the use of each tensor, and every problem found."""

    file: tyro.conf.Positional[str]
    """a weights file, a timm or transformers directory, or a name from `info weights`"""
    variant: str | None = None
    """network variant to run it with, where the file does not determine it"""
    against: Literal["keras", "torchvision", "timm", "transformers"] | None = None
    """library to compare outputs with on the same file, stage by stage; it must be installed"""
    cache_dir: str | None = None
    """cache directory for downloads; if omitted, $CIFAR_JAX_CACHE or ~/.cache/cifar_jax"""


def parse_train(arguments: list[str]) -> TrainConfig:
    """Parses the options of `train`, with defaults from a preset or an earlier run's config.json.

    Raises:
      UserError: for an invalid value or an unknown data set.
      SystemExit: if tyro printed an error or the help.
    """
    # Not a tyro alias, which would make the library import tyro for its configuration.
    arguments = [re.sub(r"^--lr(?==|$)", "--learning-rate", argument) for argument in arguments]
    # These two set the defaults of all other options, so they are parsed first.
    name, file = _value_of("--preset", arguments), _value_of("--config", arguments)
    if file is not None and name is not None:
        raise UserError(f"--config {file} includes a preset; leave out --preset {name}.")
    default = preset(name or next(iter(PRESETS))) if file is None else _config_in(Path(file))
    # Options given on the command line may make some of these defaults meaningless.
    default = without_meaningless(default, _typed(DECIDING, arguments))
    config: TrainConfig = parse(TrainConfig, arguments, "train", default=default)
    config = replace(config, run=replace(config.run, config=None))
    from cifar_jax.data.load import check_name

    # Checked before the weights are loaded, so that a mistyped name does not cost their download.
    check_name(config.data.dataset, config.run.data_dir)
    return config


def _config_in(path: Path) -> TrainConfig:
    """Reads the configuration from a config.json or a run directory."""
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
        raise UserError(f"--config {file} is invalid ({reason}); {hint}") from error


def _require_options_alone(file: Path) -> None:
    """Refuses to run again, without its parts, a run that was passed some from Python."""
    from cifar_jax.runs.directory import read_inputs  # JAX takes a second

    if (inputs := read_inputs(file.parent)) and inputs.parts:
        parts = ", ".join(f"{part} {name}" for part, name in inputs.parts.items())
        raise UserError(
            f"--config {file}: that run was passed what options cannot name ({parts}); run its Python script again."
        )


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _value_of(option: str, arguments: list[str]) -> str | None:
    """Returns the value of an option as typed, the last one if repeated, as tyro does; None if it is not given."""
    found = None
    for argument, following in pairwise([*arguments, ""]):
        name, given, value = argument.partition("=")
        if name.replace("_", "-") == option and (given or (following and not following.startswith("-"))):
            found = value if given else following
    return found


def _typed(names: Iterable[str], arguments: list[str]) -> dict[str, Any]:
    """Returns the values of the named options that are given, skipping invalid numbers, which tyro will report."""
    found: dict[str, Any] = {}
    for name in names:
        if (text := _value_of(f"--{name.replace('_', '-')}", arguments)) is not None:
            with contextlib.suppress(ValueError):
                found[name] = HINTS[name](text) if HINTS[name] in (int, float) else text
    return found


def parse(options: Any, arguments: list[str], command: str, **settings: Any) -> Any:
    """Parses the options of a command with tyro, which prints its own errors.

    Raises:
      UserError: for a flag that is given a value; tyro's own message would not name the flag.
      SystemExit: if tyro printed an error or the help.
    """
    hints = HINTS if options is TrainConfig else get_type_hints(options)
    flags = {name for name, hint in hints.items() if hint is bool}
    for argument in arguments:
        flag, given, value = argument.partition("=")
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        if given and flag.startswith("--") and name in flags:
            raise UserError(f"{flag} takes no value, got {value or 'an empty one'}; leave out ={value}.")
    # Groups are sections of the help and not part of an option's name.
    settings |= {"config": (tyro.conf.OmitArgPrefixes,), "registry": REGISTRY}
    return tyro.cli(options, args=arguments, prog=f"{program()} {command}", **settings)
