"""The libraries that read TFDS sets, imported without their log messages, and downloads with them."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

from cifar_jax.errors import UserError
from cifar_jax.runtime.logs import root_handlers_kept

# TFDS's own ten retries with growing waits are three and a half minutes of silence without a network.
DOWNLOAD_RETRIES = 3

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet_tfds(place: Path) -> Iterator[Any]:
    """Imports tensorflow-datasets, which does not import TensorFlow, and silences its log until the block ends.

    Raises:
      UserError: if it cannot be imported; `place` is what cannot be read then.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"Reading {place} needs tensorflow-datasets, which cannot be imported ({cause(error)}); install it with "
            "`pip install -r requirements.txt`, or use synthetic images, which do not need it: --dataset shapes."
        ) from error
    noisy = [logging.getLogger(name) for name in ("absl", "urllib3")]
    levels = [other.level for other in noisy]
    for other in noisy:
        other.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    with root_handlers_kept():
        try:
            yield tfds
        finally:
            for other, level in zip(noisy, levels, strict=True):
                other.setLevel(level)


@contextlib.contextmanager
def quiet_tensorflow(place: Path) -> Iterator[Any]:
    """Imports TensorFlow and yields TFDS, with their logs silenced and the accelerators, which JAX needs, hidden.

    Raises:
      UserError: if TensorFlow cannot be imported; `place` is what cannot be read then.
    """
    # Read when TensorFlow is first imported. Only log lines are lost, as reading records does not use oneDNN's kernels.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError(
            f"Reading {place} needs TensorFlow, which cannot be imported ({cause(error)}); install it with "
            "`pip install -r requirements.txt`, or use synthetic images, which do not need it: --dataset shapes."
        ) from error
    for kind in ("GPU", "TPU"):
        with contextlib.suppress(RuntimeError):  # raised if the caller has already initialised TensorFlow on them
            tf.config.set_visible_devices([], kind)
    with quiet_tfds(place) as tfds:
        yield tfds


def download(name: str, root: Path) -> Path:
    """Downloads and prepares a data set with TFDS, and returns its directory.

    Raises:
      UserError: if TFDS does not know it, or it cannot be downloaded.
    """
    logger.info(f"{name} is not prepared in {root}; downloading and preparing it there with tensorflow-datasets.")
    with (
        quiet_tensorflow(root) as tfds,
        _few_retries(),
        _removing_empty_directories(root, name),
        contextlib.redirect_stdout(sys.stderr),
    ):
        try:
            builder = tfds.builder(name, data_dir=root)
            builder.download_and_prepare()
        except tfds.core.registered.DatasetNotFoundError as error:
            raise UserError(
                f"There is no data set {name!r} in {root} or TFDS; give another --dataset, such as cifar10 or shapes, "
                "or the --data-dir in which it was prepared."
            ) from error
        except Exception as error:  # TFDS passes on whatever its network and file layers raise
            raise UserError(
                f"The data set {name!r} is not in {root} and could not be downloaded ({cause(error)}). Prepare it on "
                f"a machine with a network by `tfds build {name} --data_dir {root}`, copy it here and give its "
                "directory with --data-dir or TFDS_DATA_DIR, or use synthetic images: --dataset shapes."
            ) from error
    return Path(builder.data_dir)


@contextlib.contextmanager
def _removing_empty_directories(root: Path, name: str) -> Iterator[None]:
    """Removes the empty directories that the block created if it fails."""
    own = (root / "downloads", root / re.split("[:/]", name)[0], root, *root.parents)
    made = [path for path in own if not path.exists()]
    try:
        yield
    except BaseException:
        for top in made:
            for directory in (*sorted(top.rglob("*"), reverse=True), top):
                with contextlib.suppress(OSError):  # a file, or a directory that contains one
                    directory.rmdir()
        raise


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    from tensorflow_datasets.core.download import downloader

    usual = downloader.MAX_RETRIES
    downloader.MAX_RETRIES = DOWNLOAD_RETRIES
    try:
        yield
    finally:
        downloader.MAX_RETRIES = usual


def cause(error: Exception) -> str:
    """Returns the cause of an error in one line."""
    if isinstance(error, requests.ConnectionError) and error.request is not None:
        return f"no connection to {error.request.url!r}"
    # TensorFlow puts the graph location before the cause and the operation after it.
    text = re.sub(r"^\{\{.*?\}\} | \[Op:\w+\].*", "", str(error).strip())
    lines = text.splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".:")[:200]
