"""Shared test helpers: commands run in process, narrow networks, weights files in Keras's layouts, a tiny run."""

import functools
import io
import json
import logging
import math
import re
import resource
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from PIL import Image

from cifar_jax.cli.main import main
from cifar_jax.data import load_splits
from cifar_jax.errors import UserError
from cifar_jax.models import resnet
from cifar_jax.models.backbone import FunctionBackbone
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained import UNTRAINED, variants
from cifar_jax.pretrained.formats.keras3 import snake_case
from cifar_jax.pretrained.merge import from_network, variable_shapes
from cifar_jax.pretrained.names import keras as keras_names, torch as torch_names
from cifar_jax.runs.directory import METRICS, SUMMARY
from cifar_jax.runtime.progress import EpochRow, Silent

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

NARROW = ResNetConfig(stage_sizes=(1, 1), width=4)
NARROW_TORCH = replace(NARROW, stride_in_1x1=False, conv_bias=False, bn_epsilon=1e-5)
# Arguments of a training job that takes seconds.
TINY = (
    *("--preset", "demo", "--weights", "random-w16", "--image-size", "32", "--hidden", "8"),
    *("--train-examples", "128", "--test-examples", "20"),
)


# Fields of a configuration that trains in seconds.
SMALL_JOB = {"dataset": "shapes", "train_examples": 72, "test_examples": 20, "epochs": 3, "hidden": (8,)}


class Disturbance(Silent):
    """A reporter that calls a function when an epoch is done, or once as many of its examples are, before it is."""

    def __init__(self, happens: Callable[[], object], epoch: int, examples: int | None = None) -> None:
        self._happens, self._epoch = happens, epoch
        self._examples: float | None = examples

    def epoch(self, row: EpochRow, num_epochs: int) -> None:
        if self._examples is None and row.epoch == self._epoch:
            self._happens()

    @contextmanager
    def progress(self, description: str, total: int, compiles: bool = False) -> Iterator[Callable[[int], None]]:
        def update(done: int) -> None:
            if description == f"Epoch {self._epoch}" and self._examples is not None and done >= self._examples:
                self._examples = math.inf  # once
                self._happens()

        yield update


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def kill_at(epoch: int, examples: int | None = None) -> Disturbance:
    """A reporter that ends a run like kill -9 when an epoch is done, or once as many of its examples are."""

    def kill() -> None:
        raise Killed

    return Disturbance(kill, epoch, examples)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run's epochs without their duration."""
    rows = (json.loads(line) for line in (run / METRICS).read_text().splitlines())
    return [{name: row[name] for name in EpochRow._fields} | {"seconds": 0} for row in rows]


def summary_of(run: Path) -> dict[str, Any]:
    """The contents of a run's summary.json."""
    summary: dict[str, Any] = json.loads((run / SUMMARY).read_text())
    return summary


def mean_fields(variables: Any, images: jax.Array) -> jax.Array:
    """Means of 4 x 4 fields of 32 x 32 images, and a layer behind them: a backbone that compiles in no time."""
    x = images.astype(jnp.float32).reshape(len(images), 4, 8, 4, 8, 3).mean(axis=(2, 4)).reshape(len(images), -1)
    return jnp.tanh((x / 127.5 - 1) @ variables["kernel"])


FIELDS = FunctionBackbone(
    mean_fields, {"kernel": np.random.default_rng(0).normal(0, 0.3, (48, 16)).astype(np.float32)}, "fields"
)


class _ForwardingHandler(logging.Handler):
    def __init__(self, forward: Callable[[str], object]) -> None:
        super().__init__(logging.INFO)
        self._forward = forward

    def emit(self, record: logging.LogRecord) -> None:
        self._forward(record.getMessage())


@contextmanager
def forwarding_logs(forward: Callable[[str], object]) -> Iterator[None]:
    """Calls a function with each message that the library logs, until the block ends."""
    library, handler = logging.getLogger("cifar_jax"), _ForwardingHandler(forward)
    level = library.level
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    try:
        yield
    finally:
        library.setLevel(level)
        library.removeHandler(handler)


class Result(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Result:
    """Runs a command in this process."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return Result(code, *capsys.readouterr())


def is_one_error(result: Result, code: int, *parts: str) -> None:
    """Asserts that the command ended with this code and a one-line error that contains the parts, as its last line.

    A line that the summary could not be written either may follow.
    """
    lines = [line for line in result.err.splitlines() if not line.startswith("Writing the summary failed too: ")]
    assert result.code == code and [line for line in lines if line.startswith("Error: ")] == lines[-1:], result
    assert "Traceback" not in result.err, result
    for part in parts:
        assert part in lines[-1], (part, lines[-1])


# The start of tyro's error messages, with a box around them or, where the encoding has no box characters, without.
TYRO = re.compile(r"[╭─ ]+(Unrecognized options|Value error|Missing argument|Required options|Invalid choice)[ ─╮]+\n")


def is_tyros_error(result: Result, *parts: str) -> None:
    """Asserts that the command ended with exit code 2 and only tyro's message on stderr, which contains the parts."""
    assert result.code == 2 and result.out == "" and TYRO.match(result.err), result
    text = " ".join(re.sub(r"[│╭╮╰╯─]|-{9,}", " ", result.err).split())
    assert re.search(r"For full helptext, (see|run):? .* --help$", text), result
    assert "Traceback" not in text and "Error: " not in text, result
    for part in parts:
        assert part in text, (part, text)


def is_refused(result: Result, *parts: str) -> None:
    """Asserts that the command ended with a user error: a one-line error, or tyro's message."""
    if TYRO.match(result.err):
        is_tyros_error(result, *parts)
    else:
        is_one_error(result, 2, *parts)


def files_below(directory: Path) -> list[str]:
    """Lists all files and directories below a directory, including hidden ones; empty if it does not exist."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def keep_compiled_in(directory: str | None) -> None:
    """Makes JAX keep every compiled function in a directory, or none."""
    reset_cache()
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0 if directory else 1.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1 if directory else 0)


@contextmanager
def full_disk(at: int) -> Iterator[None]:
    """Limits the size of all files to `at` bytes, so that writes of any library fail as on a full disk.

    The compilation cache that tests share is not used meanwhile: JAX would leave truncated entries there, of which it
    warns each time that another test needs one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    shared = jax.config.jax_compilation_cache_dir
    keep_compiled_in(None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        keep_compiled_in(shared)


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes runs skip their figures, which take longer than most tests."""
    monkeypatch.setattr("cifar_jax.report.run_figures.write_samples", lambda *_: None)
    monkeypatch.setattr("cifar_jax.report.run_figures.write_pictures", lambda *_: None)


def narrow_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces ResNet50, pretrained and untrained, by a network of two narrow blocks, for quick tests."""
    monkeypatch.setitem(resnet.DEPTHS, NARROW.stage_sizes, "a narrow one")
    for name, variant in variants.VARIANTS.items():
        config = replace(variant.config, stage_sizes=NARROW.stage_sizes, width=NARROW.width)
        monkeypatch.setitem(variants.VARIANTS, name, replace(variant, config=config))
    for name, (config, _) in UNTRAINED.items():
        narrow = replace(config, stage_sizes=NARROW.stage_sizes, width=NARROW.width)
        monkeypatch.setitem(UNTRAINED, name, (narrow, 32))


def keras_tensors(config: ResNetConfig = NARROW, family: str = "keras") -> dict[str, np.ndarray]:
    """Returns random tensors of a network under their Keras names, in Keras's shapes."""
    rng = np.random.default_rng(0)
    shapes, names = variable_shapes(config), keras_names.FAMILIES[family].name_map(config.stage_sizes)
    tensors = {}
    for path, shape in shapes.items():
        values = rng.uniform(0.5, 1.5, shape) if path[-1] in ("scale", "var") else rng.normal(0, 0.1, shape)
        # The network has a dense layer in place of Keras's 1x1 convolution.
        keras_shape = (1, 1, *shape) if path[-1] == "kernel" and len(shape) == 2 else shape
        tensors[names[path]] = values.astype(np.float32).reshape(keras_shape)
    return tensors


def torch_tensors(config: ResNetConfig, family: str = "torchvision", classes: int = 5) -> dict[str, np.ndarray]:
    """Returns random tensors of a network, including its classifier, under a PyTorch family's names and shapes."""
    rng, names = np.random.default_rng(0), torch_names.FAMILIES[family].name_map(config.stage_sizes)
    tensors = {}
    for path, shape in variable_shapes(config).items():
        values = rng.uniform(0.5, 1.5, shape) if path[-1] in ("scale", "var") else rng.normal(0, 0.1, shape)
        name = names[path]
        tensors[name] = np.ascontiguousarray(from_network(values, torch_axes=True), np.float32)
        if path[-1] == "var":
            tensors[name.replace("running_var", "num_batches_tracked")] = np.array(7)
    weight, bias = torch_names.top_names(family)
    tensors[weight] = rng.normal(size=(classes, config.features)).astype(np.float32)
    tensors[bias] = rng.normal(size=classes).astype(np.float32)
    return tensors


def write_keras_h5(path: Path, tensors: Mapping[str, np.ndarray], **attributes: Any) -> Path:
    """Writes `layer/tensor` arrays in the layout of Keras 2's `save_weights`."""
    layers: dict[str, list[str]] = {}
    for name in tensors:
        layers.setdefault(name.rpartition("/")[0], []).append(name)
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = encoded(layers)
        file.attrs.update(attributes)
        for layer, names in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = encoded(f"{name}:0" for name in names)
            for name in names:
                group[f"{name}:0"] = tensors[name]
    return path


# Tensors of each layer class, in the order in which Keras 3 numbers them.
KERAS3_TENSORS = {
    "Conv2D": ("kernel", "bias"),
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "Dense": ("kernel", "bias"),
}


def write_keras3_h5(path: Path, tensors: Mapping[str, np.ndarray], named: bool = True) -> Path:
    """Writes `layer/tensor` arrays in the layout of Keras 3's `save_weights`, with or without the layers' names."""
    layers: dict[str, list[str]] = {}
    for name in tensors:
        layers.setdefault(name.rpartition("/")[0], []).append(name)
    used: Counter[str] = Counter()
    with h5py.File(path, "w") as file:
        for layer, names in layers.items():
            order, kind = KERAS3_TENSORS[class_of(layer)], snake_case(class_of(layer))
            group = file.create_group(f"layers/{kind}_{used[kind]}/vars" if used[kind] else f"layers/{kind}/vars")
            used[kind] += 1
            if named:
                group.attrs["name"] = layer
            for name in names:
                group[str(order.index(name.rpartition("/")[2]))] = tensors[name]
    return path


def class_of(layer: str) -> str:
    """Returns the Keras class of a ResNet layer."""
    return "BatchNormalization" if "bn" in layer else "Conv2D" if re.search("conv|res", layer) else "Dense"


def keras_description(layers: Iterable[str], epsilon: float = 1.001e-5) -> dict[str, Any]:
    """Returns a Keras model description with the fields that determine the network variant."""
    described = [("ZeroPadding2D", "conv1_pad", {}), ("ZeroPadding2D", "pool1_pad", {})]
    for layer in layers:
        stride = 2 if layer == "conv1_conv" else 1
        size = 7 if layer == "conv1_conv" else 3 if layer.endswith("_2_conv") else 1
        about = {
            "Conv2D": {"use_bias": True, "kernel_size": [size, size], "strides": [stride, stride]},
            "BatchNormalization": {"epsilon": epsilon},
            "Dense": {},
        }
        described.append((class_of(layer), layer, about[class_of(layer)]))
    named = [{"class_name": kind, "config": {"name": name} | about} for kind, name, about in described]
    return {"class_name": "Functional", "config": {"layers": named}}


def encoded(names: Iterable[str]) -> np.ndarray:
    """Encodes names as in Keras's HDF5 attributes."""
    return np.array([name.encode() for name in names])


class TinyRun(NamedTuple):
    """A run directory and the result of the command that made it."""

    path: Path
    result: Result


def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Returns a finished run of a narrow network on synthetic images, made once. Copy it before changing it."""
    return _tiny_run(tmp_path_factory.getbasetemp() / "tiny")


@functools.cache
def _tiny_run(root: Path) -> TinyRun:
    out, err = io.StringIO(), io.StringIO()
    arguments = ["train", *TINY, "--epochs", "2", "--out", str(root / "run"), "--cache-dir", str(root / "cache")]
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(out), redirect_stderr(err):
        narrow_networks(monkeypatch)
        code = main(arguments)
    return TinyRun(root / "run", Result(code, out.getvalue(), err.getvalue()))


def write_tfds(
    root: Path, name: str = "tiny", train: int = 40, test: int = 20, version: str = "1.0.0", **features: Any
) -> Path:
    """Prepares a data set below `root` with TFDS and returns its directory."""
    with quiet_tensorflow() as (tf, tfds):
        feature = {
            "image": tfds.features.Image(shape=(32, 32, 3), dtype=np.uint8),
            "label": tfds.features.ClassLabel(names=[f"class {label}" for label in range(10)]),
        } | {key: make(tfds) for key, make in features.items()}

        def examples(count: int, seed: int) -> Any:
            rng = np.random.default_rng(seed)
            images = rng.integers(0, 256, (count, *feature["image"].shape), np.uint8)
            return tf.data.Dataset.from_tensor_slices({"image": images, "label": np.arange(count) % 10})

        builder = tfds.dataset_builders.TfDataBuilder(
            name=name,
            version=version,
            features=tfds.features.FeaturesDict(feature),
            split_datasets={"train": examples(train, 0), "test": examples(test, 1)},
            data_dir=root,
        )
        builder.download_and_prepare()
    return Path(builder.data_dir)


@contextmanager
def quiet_tensorflow() -> Iterator[Any]:
    """Yields TensorFlow and TFDS, imported as the library imports them."""
    from cifar_jax.data.sources.tfds_library import quiet_tensorflow

    with quiet_tensorflow(Path()) as tfds, redirect_stdout(io.StringIO()):
        import tensorflow as tf

        yield tf, tfds


def flip_bit(path: Path, where: float = 0.5) -> None:
    """Flips a bit of a file, at the fraction `where` of its length, or in its last byte for -1."""
    content = bytearray(path.read_bytes())
    content[-1 if where < 0 else int(where * len(content))] ^= 0x10
    path.write_bytes(content)


def write_pictures_folder(
    root: Path, counts: Mapping[str, int], size: tuple[int, int] = (48, 40), seed: int = 0, suffix: str = ".png"
) -> Path:
    """Writes noisy pictures of one colour a class to `root/CLASS/N.png`; returns `root`.

    Args:
      root: the folder.
      counts: number of pictures by class.
      size: width and height of the first picture in pixels; each further one is a pixel wider, up to eight.
      seed: of the noise, so that no two folders share a picture.
      suffix: of the files.
    """
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            rng = np.random.default_rng((seed, number, i))
            noise = rng.integers(0, 64, (size[1], size[0] + i % 8, 3))
            noise[..., number % 3] += 190
            Image.fromarray(noise.astype(np.uint8)).save(root / name / f"{i}{suffix}")
    return root


def refusal(path: Path, **options: Any) -> str:
    """The message, one line that names the path, with which a data set is refused; `options` are of `load_splits`."""
    with pytest.raises(UserError) as caught:
        load_splits(str(path), **options)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message, message
    return message
