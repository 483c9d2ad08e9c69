"""Export of a trained run to one of the formats that other runtimes read."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cifar_jax.errors import RunError, UserError, no_such
from cifar_jax.export.exported import read_exported
from cifar_jax.export.format_names import FormatName
from cifar_jax.export.hub import write_hub
from cifar_jax.export.keras_model import write_keras
from cifar_jax.export.onnx_file import write_onnx
from cifar_jax.export.pytorch import write_pytorch
from cifar_jax.export.stablehlo import write_stablehlo
from cifar_jax.export.target import check_out, replacing_directory
from cifar_jax.export.trained_model import CHECKED, TOLERANCE, TrainedModel, drawn_images, trained_model
from cifar_jax.export.web import write_web
from cifar_jax.files import replacing
from cifar_jax.runs.reader import Run


class Format(NamedTuple):
    """A format.

    Attributes:
      write: writes a model to a path, an empty file or directory, and returns what is worth saying about it.
      suffix: ending of its files; empty for a directory.
      reads_back: whether `load_exported` reads it.
    """

    write: Callable[[TrainedModel, Path], dict[str, str]]
    suffix: str
    reads_back: bool = False


FORMATS: dict[str, Format] = {
    "onnx": Format(write_onnx, ".onnx", reads_back=True),
    "stablehlo": Format(write_stablehlo, "", reads_back=True),
    "keras": Format(write_keras, ".keras"),
    "pytorch": Format(write_pytorch, ""),
    "hub": Format(write_hub, ""),
    "web": Format(write_web, ".html"),
}


def export_run(
    run: Run, form: FormatName, out: str | Path, *, overwrite: bool = False, ort_web: str | None = None
) -> dict[str, str]:
    """Exports a run: image in, probabilities out, in float32. The file or directory appears whole or not at all.

    ONNX, StableHLO and Keras are loaded again and compared with the run on a few images.

    Args:
      run: from `load_run`.
      form: the format, a key of `FORMATS`.
      out: the file or directory to write.
      overwrite: whether to replace an existing file, or a directory that was exported and not changed since.
      ort_web: of `web`: a copy of onnxruntime-web to build into the page, see `web.read_ort_web`.

    Returns:
      Descriptions of what was written, by name.

    Raises:
      UserError: if `out` is unsuitable, a package is not installed, or the format cannot express the run.
      RunError: if it cannot be written, or does not give the probabilities of the run.
    """
    if form not in FORMATS:
        raise UserError(no_such("format", form, FORMATS))
    if ort_web is not None and form != "web":
        raise UserError(f"--ort-web is for --format web, not --format {form}; leave it out.")
    path, wanted = out_path(out), FORMATS[form]
    check_out(path, form, wanted.suffix, overwrite)
    model = trained_model(run)
    write = partial(write_web, ort_web=ort_web) if form == "web" else wanted.write
    try:
        with replacing(path) if wanted.suffix else replacing_directory(path) as temporary:
            about = write(model, temporary)
            size = _size(temporary)
            checked = _check(run, temporary) if wanted.reads_back else {}
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{path} cannot be written ({reason}); free disk space or choose another --out.") from error
    classes = f"{len(model.class_names):,} classes"
    shown = {"format": form, "out": f"{out}, {size / 1e6:,.1f} MB", "input": model.about["input"]}
    return shown | {"output": f"probabilities of {classes}"} | about | checked


def out_path(out: str | Path) -> Path:
    """The absolute path of an export, as `.` and `..` have no names beside which to write."""
    return Path(os.path.abspath(os.path.expanduser(out)))


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _check(run: Run, path: Path) -> dict[str, str]:
    """Compares what was written with the run, on synthetic images, where what reads it is installed.

    Raises:
      RunError: if they differ.
    """
    if path.suffix == ".onnx" and importlib.util.find_spec("onnxruntime") is None:
        return {"checked": "not at all, as onnxruntime is not installed"}
    in_float32 = replace(run.config.backbone, precision="float32")
    run = replace(run, config=replace(run.config, backbone=in_float32))
    images = drawn_images(run.resize)
    expected = np.concatenate([probabilities for _, probabilities in run.probabilities(images)])
    if not np.isfinite(expected).all():
        raise RunError(f"The run in {run.path} gives probabilities that are not finite; nothing was exported.")
    difference = float(np.abs(read_exported(path)(images)["probabilities"] - expected).max())
    if not difference <= TOLERANCE:
        raise RunError(
            f"What was exported gives other probabilities than the run, by up to {difference:.1e}; nothing was kept. "
            "Please report this."
        )
    return {"checked": f"largest difference of probabilities {difference:.1e} on {CHECKED} drawn images"}
