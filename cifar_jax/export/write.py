"""Export of a trained run to one of the formats that other runtimes read, checked by reading it back."""

import contextlib
import importlib.util
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from cifar_jax.errors import RunError, UserError
from cifar_jax.export.exported import load_exported
from cifar_jax.export.hub import write_hub
from cifar_jax.export.keras_model import write_keras
from cifar_jax.export.onnx_file import write_onnx
from cifar_jax.export.pytorch import write_pytorch
from cifar_jax.export.stablehlo import METADATA, write_stablehlo
from cifar_jax.export.trained_model import CHECKED, FORMAT, TOLERANCE, TrainedModel, drawn_images, trained_model
from cifar_jax.export.web import write_web
from cifar_jax.files import check_target, read_json_value, replacing
from cifar_jax.runs.reader import Run

FormatName: TypeAlias = Literal["onnx", "stablehlo", "keras", "pytorch", "hub", "web"]


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

    What this project can read is loaded again and compared with the run on a few images.

    Args:
      run: from `load_run`.
      form: the format, a key of `FORMATS`.
      out: the file or directory to write.
      overwrite: whether to replace an existing file, or a directory that was exported.
      ort_web: of `web`: a copy of onnxruntime-web to build into the page, see `web.read_ort_web`.

    Returns:
      Descriptions of what was written, by name.

    Raises:
      UserError: if `out` is unsuitable, a package is not installed, or the format cannot express the run.
      RunError: if it cannot be written, or does not give the probabilities of the run.
    """
    path, wanted = Path(os.path.expanduser(out)), FORMATS[form]
    if ort_web is not None and form != "web":
        raise UserError(f"--ort-web is for --format web, not --format {form}; leave it out.")
    check_out(path, form, overwrite)
    model = trained_model(run)
    write = partial(write_web, ort_web=ort_web) if form == "web" else wanted.write
    try:
        with replacing(path) if wanted.suffix else _replacing_directory(path) as temporary:
            about = write(model, temporary)
            size = _size(temporary)
            checked = _check(run, temporary) if wanted.reads_back else {}
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{path} cannot be written ({reason}); free disk space or choose another --out.") from error
    classes = f"{len(model.class_names):,} classes"
    shown = {"format": form, "out": f"{path}, {size / 1e6:,.1f} MB", "input": model.about["input"]}
    return shown | {"output": f"probabilities of {classes}"} | about | checked


def check_out(path: Path, form: FormatName, overwrite: bool) -> None:
    """Checks before any work is done that an export can be written.

    Raises:
      UserError: if the ending is another format's, there is already something, or the directory is read-only.
    """
    suffix = FORMATS[form].suffix
    if suffix:
        if path.suffix != suffix:
            raise UserError(f"--out must end in {suffix} for --format {form}, got {path}.")
        check_target(path, overwrite)
        return
    if path.suffix in {one.suffix for one in FORMATS.values()} - {""}:
        raise UserError(f"--out is a directory for --format {form}; leave out the ending {path.suffix} of {path}.")
    if not os.path.lexists(path):
        check_target(path, overwrite)
    elif not overwrite:
        raise UserError(f"{path} already exists. Pass --overwrite to replace it.")
    elif path.is_symlink() or not _was_exported(path):
        raise UserError(f"{path} is not a directory that `export` wrote, so it is not replaced. Choose another --out.")


def _was_exported(path: Path) -> bool:
    for name in (METADATA, "config.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if read_json_value(path / name).get("format") == FORMAT:
                return True
    return False


@contextlib.contextmanager
def _replacing_directory(path: Path) -> Iterator[Path]:
    """Writes a directory atomically: yields a temporary one beside it, and renames that if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            old = temporary.with_name(f"{temporary.name}.old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    found = load_exported(path)(images)["probabilities"]
    expected = np.concatenate([probabilities for _, probabilities in run.probabilities(images)])
    difference = float(np.abs(found - expected).max())
    if not difference <= TOLERANCE:
        raise RunError(
            f"What was exported gives other probabilities than the run, by up to {difference:.1e}; nothing was kept. "
            "Please report this."
        )
    return {"checked": f"largest difference of probabilities {difference:.1e} on {CHECKED} drawn images"}
