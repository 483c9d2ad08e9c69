"""Reader for PyTorch checkpoints (.pth, .pt, .bin) in both the zip and the legacy container, without PyTorch."""

import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.errors import WeightsError
from cifar_jax.pretrained.formats.archive import open_archive
from cifar_jax.pretrained.formats.torch_pickle import Storage, Tensor, read_pickle

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

# Keys under which training programs store a state dict, in order of preference.
NESTED = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "ema", "net", "module")
# Prefixes that module wrappers add to every name.
PREFIXES = ("module.", "_orig_mod.", "ema_model.", "ema.", "model.", "net.", "backbone.")
WRAPPERS_OWN = ("n_averaged",)  # AveragedModel's own tensor, the number of averaged models

Content = Callable[[Storage], bytes | memoryview]  # returns the bytes of a storage


@dataclass(frozen=True)
class Checkpoint:
    """A state dict read from a checkpoint.

    Attributes:
      tensors: tensors by name, without wrapper prefixes, in the file's dtypes; views of the bytes read.
      place: key of the state dict in the file; empty if the file is a bare state dict.
      others: keys of further state dicts in the file.
    """

    tensors: dict[str, np.ndarray]
    place: str = ""
    others: tuple[str, ...] = ()


def read_torch(path: Path) -> Checkpoint:
    """Reads a checkpoint written by torch.save, in the zip or the legacy container.

    The file's bytes are in memory only once; the tensors are views of its storages.

    Raises:
      WeightsError: if the file is corrupt, holds no state dict, or needs anything but tensors.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if not zipped:
        return _read_legacy(path)
    with open_archive(path) as archive:
        return _read_zip(archive, path)


def _read_zip(archive: zipfile.ZipFile, path: Path) -> Checkpoint:
    names = set(archive.namelist())
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise WeightsError(
            f"{path} is a zip file but neither a PyTorch checkpoint nor a Keras archive. Use the weights file itself."
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise WeightsError(f"{path} was written on a big-endian machine. Save it again on a little-endian one.")
    value = read_pickle(io.BytesIO(archive.read(pickles[0])), str(path))

    def content(storage: Storage) -> bytes:
        name = f"{root}data/{storage.key}"
        if name not in names:
            raise ValueError(f"missing entry {name}")
        if archive.getinfo(name).file_size != storage.size * storage.dtype.itemsize:
            raise ValueError(f"size mismatch in {name}")
        return archive.read(name)

    return _checkpoint(value, content, path)


def _read_legacy(path: Path) -> Checkpoint:
    data = path.read_bytes()
    stream = io.BytesIO(data)
    if read_pickle(stream, str(path)) != LEGACY_MAGIC or read_pickle(stream, str(path)) != LEGACY_PROTOCOL:
        raise WeightsError(f"{path} is a pickle but not a PyTorch checkpoint. Use a file written by torch.save.")
    system = read_pickle(stream, str(path))
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise WeightsError(f"{path} was written on a big-endian machine. Save it again on a little-endian one.")
    value, keys = (read_pickle(stream, str(path)) for _ in range(2))
    offsets, start = {}, stream.tell()
    storages = {tensor.storage.key: tensor.storage for tensor in _all_tensors(value)}
    for key in keys if isinstance(keys, list) else []:
        # Storages follow one another, each preceded by its number of elements, so offsets must be summed up in order.
        if key not in storages or start + 8 > len(data):
            break
        (count,) = struct.unpack_from("<q", data, start)
        offsets[key] = start + 8
        if count != storages[key].size:
            raise WeightsError(f"{path} is corrupt: size mismatch in a storage. Get a fresh copy of the file.")
        start += 8 + count * storages[key].dtype.itemsize
    view = memoryview(data)

    def content(storage: Storage) -> memoryview:
        if storage.key not in offsets:
            raise ValueError(f"missing storage {storage.key}")
        at = offsets[storage.key]
        if at + storage.size * storage.dtype.itemsize > len(data):
            raise ValueError("a storage ends after the file does")
        return view[at : at + storage.size * storage.dtype.itemsize]

    return _checkpoint(value, content, path)


def _all_tensors(value: Any) -> list[Tensor]:
    """Returns all tensors in nested dicts, lists and tuples, visiting each container once."""
    found, seen, todo = [], set(), [value]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            todo += item.values() if isinstance(item, dict) else item
    return found


def _checkpoint(value: Any, content: Content, path: Path) -> Checkpoint:
    state, place, others = _state_dict(value, path)
    if bad := [str(name) for name, tensor in state.items() if not isinstance(tensor, Tensor)]:
        raise WeightsError(f"{bad[0]!r} in {path} is not a tensor. Save model.state_dict() and use that file.")
    read: dict[str, bytes | memoryview] = {}
    tensors = {}
    try:
        for name, tensor in state.items():
            storage = tensor.storage
            if storage.key not in read:
                read[storage.key] = content(storage)
            tensors[str(name)] = tensor.array(read[storage.key])
    except (ValueError, OverflowError) as error:
        raise WeightsError(f"{path} is corrupt or truncated ({error}). Get a fresh copy of the file.") from error
    return Checkpoint(without_prefixes(tensors), place, others)


def _state_dict(value: Any, path: Path) -> tuple[dict[Any, Any], str, tuple[str, ...]]:
    """Returns the dict with the tensors, its key path, and the keys of other such dicts."""
    place: list[str] = []
    others: tuple[str, ...] = ()
    while isinstance(value, dict) and len(place) < 3:
        nested = [key for key in NESTED if isinstance(value.get(key), dict) and value[key]]
        if not nested:
            break
        place.append(nested[0])
        others = others or tuple(nested[1:])
        value = value[nested[0]]
    if not isinstance(value, dict) or not any(isinstance(item, Tensor) for item in value.values()):
        raise WeightsError(
            f"{path} holds no state dict, neither at its top level nor under {', '.join(NESTED)}. Save "
            "model.state_dict() and use that file."
        )
    return value, ".".join(place), others


def without_prefixes(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames tensors to the network's own names by removing the prefixes of module wrappers."""
    named = {name: tensor for name, tensor in tensors.items() if name not in WRAPPERS_OWN}
    while prefix := next((p for p in PREFIXES if named and all(name.startswith(p) for name in named)), None):
        named = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    return named
