"""Detects a weights file's format by its first bytes, not by its name."""

import os
from pathlib import Path

from cifar_jax.errors import WeightsError

# Weights files in directories of transformers and timm, in order of preference.
IN_DIRECTORY = ("model.safetensors", "pytorch_model.bin")

_USE = "--weights takes a weights file, a directory of transformers or timm, or a name listed by `info`"
WEB_PAGE = (b"<!doctype", b"<html", b"<?xml")


def find_weights(directory: Path) -> Path:
    """Finds the weights file in a directory.

    Raises:
      WeightsError: if there is none.
    """
    for name in IN_DIRECTORY:
        if os.path.isfile(directory / name):
            return directory / name
    raise WeightsError(f"{directory} is a directory without {' or '.join(IN_DIRECTORY)}. {_USE}.")


def detect_format(path: Path) -> str:
    """Detects a file's format by its first bytes, and names common mistakes such as a saved web page.

    Returns:
      "hdf5", "zip", "pickle" or "safetensors".

    Raises:
      WeightsError: if the file is missing, unreadable, empty, a web page, or of another format.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise WeightsError(f"{path} is not a regular file. {_USE}.")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist. {_USE}.") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}). Check its name and permissions.") from error
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    # Checked before pickles: some safetensors header lengths have the same first bytes as a pickle.
    if start[8:9] == b"{" and 8 + int.from_bytes(start[:8], "little") <= size:
        return "safetensors"
    if len(start) > 1 and start[0] == 0x80 and start[1] <= 5:
        return "pickle"
    if path.suffix == ".safetensors":
        return "safetensors"  # its reader reports the error
    if not start:
        raise WeightsError(f"{path} is empty. Get a fresh copy of the file.")
    if start.lstrip().lower().startswith(WEB_PAGE):
        raise WeightsError(
            f"{path} is a web page, not weights: the server probably sent an error or a login page. Download it again."
        )
    raise WeightsError(
        f"{path} is not a Keras HDF5 file, a PyTorch checkpoint or a safetensors file. Use a file in one of these "
        "formats."
    )
