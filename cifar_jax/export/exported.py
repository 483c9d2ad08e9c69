"""Loading of exported models: an ONNX file, or a directory with a StableHLO program."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float32, UInt8
from safetensors.numpy import load

from cifar_jax.config import TrainConfig
from cifar_jax.data.load import Kind
from cifar_jax.data.pictures import Images
from cifar_jax.data.pipeline import read_batches
from cifar_jax.data.resize import Resize
from cifar_jax.errors import RunError, UserError, extra_missing
from cifar_jax.export.stablehlo import METADATA, PROGRAM, WEIGHTS
from cifar_jax.export.trained_model import DATA_OPTIONS, FORMAT
from cifar_jax.features.engines.onnx_graph import FEATURES, IMAGE, PROBABILITIES
from cifar_jax.files import read_json_value
from cifar_jax.models.preprocess import EvalTransform, require_images
from cifar_jax.runs.predict import Picture, Predictions, predict

DEFAULT_BATCH = 32  # images at a time
ONNX = ".onnx"
MOST_BYTES = 2**31  # of an ONNX file, which protobuf allows

logger = logging.getLogger(__name__)

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
          RunError: if probabilities are not finite.
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
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        size = min(batch_size or DEFAULT_BATCH, max(len(images), 1))
        starts = range(0, max(len(images), 1), size)
        slices = [slice(start, min(start + size, len(images))) for start in starts]
        wanted = [np.arange(rows.start, rows.stop) for rows in slices]
        for rows, batch in zip(slices, read_batches(images, wanted), strict=True):
            if self.pads and len(batch) < size:
                padding = np.zeros((size - len(batch), *batch.shape[1:]), np.uint8)
                batch = np.concatenate([batch, padding])
            found = {name: values[: rows.stop - rows.start] for name, values in self.call(batch).items()}
            if not np.isfinite(found[PROBABILITIES]).all():
                raise RunError(f"{self.path} gives probabilities that are not finite: it is damaged; export it again.")
            yield rows, found

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
    def loss(self) -> str:
        """The loss that the run was trained and scored with."""
        return str(self.about["loss"])

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
    """Whether a path is meant as an exported model rather than as a run: a file, a directory that `export` wrote."""
    path = Path(os.path.expanduser(path))
    # Not Path.exists, which raises for a name that is too long.
    return os.path.isfile(path) or (not os.path.exists(path) and path.suffix.lower() == ONNX) or was_exported(path)


def was_exported(path: Path) -> bool:
    """Whether a directory has the description that `export` writes."""
    for name in (METADATA, "config.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if read_json_value(path / name).get("format") == FORMAT:
                return True
    return False


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
    model = read_exported(path)
    if model.about.get("status") != "complete":
        logger.warning(f"{model.path} was exported from an incomplete run ({model.about.get('status')}).")
    return replace(model, data_dir=data_dir)


def read_exported(path: str | os.PathLike[str]) -> ExportedModel:
    """Loads an exported model; see `load_exported`."""
    path = Path(os.path.expanduser(path))
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; name an .onnx file, or a directory that `export` wrote.")
    if (path / METADATA).is_file():
        return _load_stablehlo(path)
    if path.is_file() and path.suffix.lower() == ONNX:
        return _load_onnx(path)
    raise UserError(
        f"{path} is not a run, an .onnx file or a directory with StableHLO; name a run directory or one of these. "
        "Other formats are for their own libraries."
    )


def _load_onnx(path: Path) -> ExportedModel:
    try:
        import onnxruntime
    except ImportError:
        raise extra_missing(f"{path}", "onnxruntime", "onnx") from None
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} is larger than an ONNX file can be (2 GiB); name another file.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # its errors are raised too
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        inputs, outputs = (
            {one.name: one.shape for one in ends} for ends in (session.get_inputs(), session.get_outputs())
        )
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
        return dict(zip(names, session.run(names, {IMAGE: np.asarray(images)}), strict=True))

    model = ExportedModel(path, "onnx", about, call, pads=False)
    return _checked(model, inputs.get(IMAGE, []), outputs.get(PROBABILITIES, []), outputs.get(FEATURES, []))


def _shapes(ends: Iterable[Any]) -> dict[str, Sequence[Any]]:
    return {end.name: end.shape for end in ends}


def _load_stablehlo(path: Path) -> ExportedModel:
    try:
        about = read_json_value(path / METADATA)
        content = {name: (path / name).read_bytes() for name in (PROGRAM, WEIGHTS)}
        for name, digest in about["stablehlo"]["sha256"].items():
            if hashlib.sha256(content[name]).hexdigest() != digest:
                raise ValueError(f"checksum mismatch in {name}")
        weights = load(content[WEIGHTS])
        exported = jax.export.deserialize(bytearray(content[PROGRAM]))
    except OSError as error:
        name = Path(error.filename or METADATA).name
        raise UserError(f"The exported model {path} lacks {name} ({error.strerror}); export the run again.") from error
    except Exception as error:  # of a damaged program, whatever its reader raises
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"The exported model {path} cannot be loaded ({reason}). If its program is too old for this JAX, or "
            "damaged, export the run again."
        ) from error
    images, (features, probabilities) = exported.in_avals[-1].shape, (one.shape for one in exported.out_avals)
    run, placed = jax.jit(exported.call), jax.device_put(weights)

    def call(images: UInt8[np.ndarray, "n side side 3"]) -> Outputs:
        found: Outputs = jax.device_get(run(placed, images))
        return found

    return _checked(ExportedModel(path, "stablehlo", about, call, pads=True), images, probabilities, features)


def _checked(
    model: ExportedModel, images: Sequence[Any], probabilities: Sequence[Any], features: Sequence[Any]
) -> ExportedModel:
    """Returns the model, if its description is complete and is that of its program, given by the shapes of its ends.

    Raises:
      UserError: if it is not.
    """
    try:
        about = model.about
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!r}")
        names, resize = about["class_names"], model.resize
        if not isinstance(names, list) or len({name for name in names if isinstance(name, str)}) != len(names):
            raise ValueError("class_names")
        side = resize.side
        if resize.method == "eval-transform":
            EvalTransform(resize.shorter, side, resize.interpolation)  # checks them
        elif resize.method != "upsample":
            raise ValueError("resize")
        if list(images[1:]) != [side, side, 3] or list(probabilities[1:]) != [len(names)] or len(features) != 2:
            raise ValueError("its input or its outputs are others")
        _ = (model.image_size, model.config, model.data_kind, model.loss, model.test_sha256)
    except (AttributeError, KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(
            f"{model.path} does not say what it is as `export` writes it ({error}); name a model that `export` wrote."
        ) from error
    return model
