"""Loading of exported models: an ONNX file, or a directory with a StableHLO program."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float32, UInt8
from safetensors.numpy import load_file

from cifar_jax.config import TrainConfig
from cifar_jax.data.load import Kind
from cifar_jax.data.pictures import Images
from cifar_jax.data.pipeline import read_batches
from cifar_jax.data.resize import Resize
from cifar_jax.errors import UserError, extra_missing
from cifar_jax.export.stablehlo import METADATA, PROGRAM, WEIGHTS
from cifar_jax.export.trained_model import DATA_OPTIONS, FORMAT
from cifar_jax.features.engines.onnx_graph import FEATURES, IMAGE, PROBABILITIES
from cifar_jax.files import read_json_value
from cifar_jax.models.preprocess import require_images
from cifar_jax.runs.predict import Picture, Predictions, predict

DEFAULT_BATCH = 32  # images at a time
ONNX = ".onnx"
MOST_BYTES = 2**31  # of an ONNX file, which protobuf allows

Outputs = dict[str, Float32[np.ndarray, "n ..."]]


@dataclass(frozen=True, repr=False)
class ExportedModel:
    """An exported classifier, which predicts as the run did that it comes from.

    Attributes:
      path: the file or directory.
      form: its format.
      about: what is known of it; see `export.trained_model.about_of`.
      call: `images -> {"probabilities", "features"}` of one batch.
      pads: whether each batch size is compiled anew, so that the last batch is padded.
      data_dir: the TFDS data directory, for the images of the run.
    """

    path: Path
    form: Literal["onnx", "stablehlo"]
    about: Mapping[str, Any]
    call: Callable[[UInt8[np.ndarray, "n side side 3"]], Outputs]
    pads: bool
    data_dir: str | None = None

    def __repr__(self) -> str:
        """A one-line description."""
        return f"ExportedModel({self.path}: {self.form}, {self.about['input']}, {len(self.class_names)} classes)"

    def __call__(self, images: UInt8[np.ndarray, "n side side 3"], batch_size: int | None = None) -> Outputs:
        """Computes `probabilities` float32 [n, classes] and `features` float32 [n, features] of images of its size.

        Args:
          images: RGB pixels.
          batch_size: images at a time; 32 if None.

        Raises:
          ValueError: if the images have another dtype or size.
        """
        found = [values for _, values in self._stream(images, batch_size)]
        return {name: np.concatenate([values[name] for values in found]) for name in (PROBABILITIES, FEATURES)}

    def predict(self, pictures: "Iterable[Picture] | UInt8[np.ndarray, 'n h w 3']") -> Predictions:
        """Predicts pictures of any size, by path or as pixels, resized as the run resized them; see `Run.predict`."""
        return predict(self, pictures)

    def probabilities(
        self, images: Images, batch_size: int | None = None
    ) -> Iterator[tuple[slice, Float32[np.ndarray, "rows classes"]]]:
        """Yields rows of images, as `resize` makes them, and their class probabilities; see `Classifier`."""
        for rows, values in self._stream(images, batch_size):
            yield rows, values[PROBABILITIES]

    def _stream(self, images: Images, batch_size: int | None) -> Iterator[tuple[slice, Outputs]]:
        require_images(images)
        if images.shape[1:3] != (self.resize.side,) * 2:
            height, width = images.shape[1:3]
            raise ValueError(
                f"images must be {self.resize.side}x{self.resize.side}, got {height}x{width}; `predict` resizes them"
            )
        size = min(batch_size or DEFAULT_BATCH, max(len(images), 1))
        starts = range(0, max(len(images), 1), size)
        slices = [slice(start, min(start + size, len(images))) for start in starts]
        wanted = [np.arange(rows.start, rows.stop) for rows in slices]
        for rows, batch in zip(slices, read_batches(images, wanted), strict=True):
            if self.pads and len(batch) < size:
                padding = np.zeros((size - len(batch), *batch.shape[1:]), np.uint8)
                batch = np.concatenate([batch, padding])
            yield rows, {name: values[: rows.stop - rows.start] for name, values in self.call(batch).items()}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names by label."""
        return tuple(self.about["class_names"])

    @property
    def resize(self) -> Resize:
        """How a picture becomes the input."""
        return Resize.from_json(self.about["resize"])

    @property
    def image_size(self) -> int:
        """Side in pixels of the network's input."""
        return int(self.about["image_size"])

    @property
    def config(self) -> TrainConfig:
        """Options that name and divide the images of the run; the others have their defaults."""
        data = self.about["data"]
        options = {name: data[name] for name in DATA_OPTIONS if data.get(name) is not None}
        return TrainConfig(dataset=data["dataset"], data_dir=self.data_dir, **options)

    @property
    def data_kind(self) -> Kind:
        """What the data set of the run was."""
        kind: Kind = self.about["data"]["kind"]
        return kind

    @property
    def test_sha256(self) -> str:
        """Digest of the test images of the run."""
        return str(self.about["data"]["test_sha256"])

    def direct_resize(self) -> Resize:
        """Raises UserError: the input of an exported model has one size."""
        side = self.resize.side
        raise UserError(
            f"--direct does not go with an exported model: the input of {self.path} is {side}x{side}; leave it out."
        )


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether a path is meant as an exported model rather than as a run: an ONNX file, a directory of StableHLO."""
    path = Path(path)
    return path.suffix.lower() == ONNX or (path / PROGRAM).is_file() or path.is_file()


def load_exported(path: str | os.PathLike[str], data_dir: str | None = None) -> ExportedModel:
    """Loads an exported model: an ONNX file, or a directory with a StableHLO program.

    It needs nothing of the run that it was exported from. ONNX runs on ONNX Runtime, on the CPU; StableHLO on JAX's
    default device.

    Args:
      path: the file or directory.
      data_dir: the TFDS data directory, for those who score the model on the test images of the run.

    Raises:
      UserError: if there is no such model, it was not exported by this project, it is corrupt, its program is too old
        for this JAX, or onnxruntime is not installed.

    Example:
      >>> model = load_exported("pets.onnx")  # doctest: +SKIP
      >>> model.predict(["photo.jpg"]).class_names  # doctest: +SKIP
      ('cats',)
    """
    path = Path(os.path.expanduser(path))
    if (path / PROGRAM).is_file():
        return replace(_load_stablehlo(path), data_dir=data_dir)
    if path.is_dir():
        raise UserError(f"{path} is no exported model: it has no {PROGRAM}. Name an .onnx file, or such a directory.")
    if not path.is_file():
        raise UserError(f"{path} does not exist; name an .onnx file, or a directory that `export` wrote.")
    if path.suffix.lower() != ONNX:
        raise UserError(
            f"{path} is neither a run directory, an .onnx file nor a directory with StableHLO; other formats are for "
            "their own libraries."
        )
    return replace(_load_onnx(path), data_dir=data_dir)


def _load_onnx(path: Path) -> ExportedModel:
    try:
        import onnxruntime
    except ImportError:
        raise extra_missing(f"{path}", "onnxruntime", "onnx") from None
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} is larger than an ONNX file can be (2 GiB); name another file.")
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name another file.") from error
    except Exception as error:  # its own exceptions have no common base
        reason = str(error).partition("\n")[0]
        raise UserError(f"ONNX Runtime cannot load {path} ({reason}); export it again.") from error
    try:
        about = {name: json.loads(value) for name, value in metadata.items()}
    except ValueError:
        about = {}

    def call(images: UInt8[np.ndarray, "n side side 3"]) -> Outputs:
        names = [PROBABILITIES, FEATURES]
        return dict(zip(names, session.run(names, {IMAGE: images}), strict=True))

    return _checked(ExportedModel(path, "onnx", about, call, pads=False))


def _load_stablehlo(path: Path) -> ExportedModel:
    try:
        about = read_json_value(path / METADATA)
        weights = load_file(path / WEIGHTS)
        exported = jax.export.deserialize(bytearray((path / PROGRAM).read_bytes()))
    except Exception as error:  # of a damaged program, whatever its reader raises
        reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        raise UserError(
            f"The exported model {path} cannot be loaded ({reason}). If its program is too old for this JAX, or "
            "damaged, export the run again."
        ) from error
    run, placed = jax.jit(exported.call), jax.device_put(weights)

    def call(images: UInt8[np.ndarray, "n side side 3"]) -> Outputs:
        found: Outputs = jax.device_get(run(placed, images))
        return found

    return _checked(ExportedModel(path, "stablehlo", about, call, pads=True))


def _checked(model: ExportedModel) -> ExportedModel:
    """Returns the model, if its description is complete.

    Raises:
      UserError: if it is not.
    """
    try:
        if model.about["format"] != FORMAT:
            raise ValueError(f"format {model.about['format']!r}")
        _ = (model.class_names, model.resize, model.image_size, model.config, model.data_kind, model.test_sha256)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{model.path} does not say what it is as `export` writes it ({error}); name a model that `export` wrote."
        ) from error
    return model
