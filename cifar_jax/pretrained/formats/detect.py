"""What a file is, told by its first bytes and not by its name."""

import os
from pathlib import Path

from cifar_jax.errors import WeightsError

# Weights in a directory as transformers and timm keep them, in the order in which they are looked for.
IN_DIRECTORY = ("model.safetensors", "pytorch_model.bin")

_USE = "--weights takes a weights file, a directory of transformers or timm, or a name that `info` lists"
WEB_PAGE = (b"<!doctype", b"<html", b"<?xml")


def weights_in(directory: Path) -> Path:
    """The weights file of a directory.

    Raises:
      WeightsError: when there is none.
    """
    for name in IN_DIRECTORY:
        if os.path.isfile(directory / name):
            return directory / name
    raise WeightsError(f"{directory} is a directory without {' or '.join(IN_DIRECTORY)}; {_USE}.")


def form_of(path: Path) -> str:
    """Tells apart, from its first bytes, the forms of weights and what is often found in their place.

    Returns:
      "hdf5", "zip", "pickle" or "safetensors".

    Raises:
      WeightsError: when the file is missing, unreadable, empty, a web page, or something else.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise WeightsError(f"{path} is not a regular file; {_USE}.")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist; {_USE}.") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); check its name and permissions.") from error
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    # Before pickles: a header may be as long as makes it begin with the bytes of one.
    if start[8:9] == b"{" and 8 + int.from_bytes(start[:8], "little") <= size:
        return "safetensors"
    if len(start) > 1 and start[0] == 0x80 and start[1] <= 5:
        return "pickle"
    if path.suffix == ".safetensors":
        return "safetensors"  # whose reader says what is wrong
    if not start:
        raise WeightsError(f"{path} is empty; get the file again.")
    if start.lstrip().lower().startswith(WEB_PAGE):
        raise WeightsError(
            f"{path} is a web page, not weights: the download was answered with an error or a login page; get it again."
        )
    raise WeightsError(
        f"{path} is not an HDF5 file of Keras, a checkpoint of PyTorch or a safetensors file; give one of these."
    )
