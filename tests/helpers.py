"""What several tests share: commands run in process, narrow networks, files as Keras writes them, a tiny run."""

import functools
import io
import resource
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest

from cifar_jax.cli import main
from cifar_jax.pretrained import UNTRAINED, keras_names, load, variants
from cifar_jax.pretrained.merge import variable_shapes
from cifar_jax.resnet import ResNetConfig

NARROW = ResNetConfig(stage_sizes=(1, 1), width=4)
# A job of seconds, as it is typed.
TINY = (
    *("--preset", "demo", "--weights", "random-w16", "--image-size", "32", "--hidden", "8"),
    *("--train-examples", "128", "--test-examples", "20"),
)


class Result(NamedTuple):
    """What a command gave: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Result:
    """Runs a command in this process."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return Result(code, *capsys.readouterr())


def is_one_error(result: Result, code: int, *parts: str) -> None:
    """The command ended with that code and an error of one line, the last it wrote, that holds the parts."""
    lines = result.err.splitlines()
    assert result.code == code and [line for line in lines if line.startswith("Error: ")] == lines[-1:], result
    assert "Traceback" not in result.err, result
    for part in parts:
        assert part in lines[-1], (part, lines[-1])


def files_below(directory: Path) -> list[str]:
    """Every file and directory below one, hidden ones too, sorted; nothing if it does not exist."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@contextmanager
def full_disk(at: int) -> Iterator[None]:
    """No file can grow beyond that many bytes: writes fail as on a full disk, whatever library makes them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def narrow_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ResNet50 a network of two narrow blocks, pretrained and untrained, so that a check takes no minute."""
    monkeypatch.setattr(load, "RESNET50", NARROW.stage_sizes)
    for name, variant in variants.VARIANTS.items():
        config = replace(variant.config, stage_sizes=NARROW.stage_sizes, width=NARROW.width)
        monkeypatch.setitem(variants.VARIANTS, name, replace(variant, config=config))
    for name, (config, _) in UNTRAINED.items():
        narrow = replace(config, stage_sizes=NARROW.stage_sizes, width=NARROW.width)
        monkeypatch.setitem(UNTRAINED, name, (narrow, 32))


def keras_tensors(config: ResNetConfig = NARROW, family: str = "keras") -> dict[str, np.ndarray]:
    """A network's tensors under their Keras names, in Keras's shapes."""
    rng = np.random.default_rng(0)
    shapes, names = variable_shapes(config), keras_names.name_map(config.stage_sizes, family)
    tensors = {}
    for path, shape in shapes.items():
        values = rng.uniform(0.5, 1.5, shape) if path[-1] in ("scale", "var") else rng.normal(0, 0.1, shape)
        # Keras keeps a 1x1 convolution as one; the network here has a dense layer in its place.
        keras_shape = (1, 1, *shape) if path[-1] == "kernel" and len(shape) == 2 else shape
        tensors[names[path]] = values.astype(np.float32).reshape(keras_shape)
    return tensors


def write_keras_h5(path: Path, tensors: Mapping[str, np.ndarray], **attributes: Any) -> Path:
    """Writes `layer/tensor` arrays as Keras's `save_weights` lays them out."""
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


def encoded(names: Iterable[str]) -> np.ndarray:
    """Names as Keras keeps them in attributes."""
    return np.array([name.encode() for name in names])


class TinyRun(NamedTuple):
    """A run directory and what the command that made it wrote."""

    path: Path
    result: Result


def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A finished run of a narrow network on drawn images, made once. Copy it before changing it."""
    return _tiny_run(tmp_path_factory.getbasetemp() / "tiny")


@functools.cache
def _tiny_run(root: Path) -> TinyRun:
    out, err = io.StringIO(), io.StringIO()
    arguments = ["train", *TINY, "--epochs", "2", "--out", str(root / "run"), "--cache-dir", str(root / "cache")]
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(out), redirect_stderr(err):
        narrow_networks(monkeypatch)
        code = main(arguments)
    return TinyRun(root / "run", Result(code, out.getvalue(), err.getvalue()))


def write_tfds(root: Path, name: str = "tiny", train: int = 40, test: int = 20, **features: Any) -> Path:
    """Prepares a data set as TFDS does, below `root`; returns where it lies."""
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
            version="1.0.0",
            features=tfds.features.FeaturesDict(feature),
            split_datasets={"train": examples(train, 0), "test": examples(test, 1)},
            data_dir=root,
        )
        builder.download_and_prepare()
    return Path(builder.data_dir)


@contextmanager
def quiet_tensorflow() -> Iterator[Any]:
    """TensorFlow and TFDS as the library imports them."""
    from cifar_jax.data.tfds import _tensorflow

    with _tensorflow(Path()) as tfds, redirect_stdout(io.StringIO()):
        import tensorflow as tf

        yield tf, tfds
