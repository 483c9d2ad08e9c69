"""What is read from an HDF5 file: this file's own groups and arrays, and no others."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cifar_jax.pretrained.errors import WeightsError

# The largest tensor of a ResNet152 has 2.4 million. A file of a few bytes can claim any number.
MOST_NUMBERS = 100_000_000


def own(group: h5py.Group, name: str, path: Path) -> Any:
    """What a group holds under a name, read from this file and no other: that one was asked for and hashed."""
    at: Any = group
    for part in filter(None, name.split("/")):
        link = at.get(part, getlink=True) if isinstance(at, h5py.Group) else None
        if not isinstance(link, h5py.HardLink):
            raise WeightsError(f"{path} has no {group.name.rstrip('/')}/{name} of its own; get the file again.")
        at = at[part]
    return at


def tensor(group: h5py.Group, weight: str, path: Path) -> np.ndarray:
    """An array of floating-point numbers of this very file, in float32.

    Raises:
      WeightsError: when it is something else, lies in another file, or claims more numbers than any ResNet has.
    """
    data = own(group, weight, path)
    if not isinstance(data, h5py.Dataset) or data.dtype.kind != "f" or data.size is None:
        raise WeightsError(
            f"{path} holds {group.name}/{weight}, which is not an array of floating-point numbers; get the file again."
        )
    if data.external or data.is_virtual:
        raise WeightsError(f"{path} keeps {group.name}/{weight} in another file; get the file again.")
    if data.size > MOST_NUMBERS:
        raise WeightsError(f"{path} holds {group.name}/{weight} {data.shape}, too large for a ResNet50.")
    return np.asarray(data[()], np.float32)
