"""Reads the checkpoints of PyTorch (.pth, .pt, .bin), of both its containers, without PyTorch."""

import io
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.errors import WeightsError
from cifar_jax.pretrained.formats.archive import Archive, open_archive
from cifar_jax.pretrained.formats.torch_pickle import Storage, Tensor, read_pickle

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

# Where training programs put a state dict, in the order in which they are looked for.
NESTED = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "ema", "net", "module")
# What wrappers put in front of every name.
PREFIXES = ("module.", "_orig_mod.", "ema_model.", "ema.", "model.", "net.", "backbone.")
WRAPPERS_OWN = ("n_averaged",)  # how many models an average is of

Content = Callable[[Storage], bytes | memoryview]  # a storage -> its bytes


@dataclass(frozen=True)
class Checkpoint:
    """A state dict.

    Attributes:
      tensors: by name, prefixes of wrappers taken off; views of what was read, of the file's dtypes.
      place: what the state dict is called inside the file; empty when the file is one.
      others: further state dicts in it.
    """

    tensors: dict[str, np.ndarray]
    place: str = ""
    others: tuple[str, ...] = ()


def read_torch(path: Path) -> Checkpoint:
    """Reads a checkpoint written by torch.save, in the zip container or in the older one.

    In memory is the file once, in pieces of a storage each; the tensors are views of them.

    Raises:
      WeightsError: when the file is damaged, holds no state dict, or asks for anything but tensors.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if not zipped:
        return _read_legacy(path)
    with open_archive(path) as archive:
        return _read_zip(archive, path)


def _read_zip(archive: Archive, path: Path) -> Checkpoint:
    pickles = [name for name in archive.names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise WeightsError(f"{path} is a zip file but neither of PyTorch nor of Keras; give the weights file itself.")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.names and archive.read(f"{root}byteorder") != b"little":
        raise WeightsError(f"{path} was written by a big-endian machine; save it again on another.")
    value = read_pickle(io.BytesIO(archive.read(pickles[0])), str(path))

    def content(storage: Storage) -> bytes:
        name = f"{root}data/{storage.key}"
        if name not in archive.names:
            raise ValueError(f"it has no {name}")
        if archive.size(name) != storage.size * storage.dtype.itemsize:
            raise ValueError(f"{name} has another size than is said of it")
        return archive.read(name)

    return _checkpoint(value, content, path)


def _read_legacy(path: Path) -> Checkpoint:
    whole = path.read_bytes()
    stream = io.BytesIO(whole)
    if read_pickle(stream, str(path)) != LEGACY_MAGIC or read_pickle(stream, str(path)) != LEGACY_PROTOCOL:
        raise WeightsError(f"{path} is a pickle but no checkpoint of PyTorch; give a file that torch.save wrote.")
    system = read_pickle(stream, str(path))
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise WeightsError(f"{path} was written by a big-endian machine; save it again on another.")
    value, keys = (read_pickle(stream, str(path)) for _ in range(2))
    places, start = {}, stream.tell()
    sizes = {tensor.storage.key: tensor.storage for tensor in _all_tensors(value)}
    for key in keys if isinstance(keys, list) else []:
        # Storages lie one behind the other, each behind its number of elements; where one begins, those before it say.
        if key not in sizes or start + 8 > len(whole):
            break
        (count,) = struct.unpack_from("<q", whole, start)
        places[key] = start + 8
        if count != sizes[key].size:
            raise WeightsError(f"{path} is damaged: a storage has another size than is said of it; get the file again.")
        start += 8 + count * sizes[key].dtype.itemsize
    view = memoryview(whole)

    def content(storage: Storage) -> memoryview:
        if storage.key not in places:
            raise ValueError(f"it has no storage {storage.key}")
        at = places[storage.key]
        if at + storage.size * storage.dtype.itemsize > len(whole):
            raise ValueError("it ends before its storages do")
        return view[at : at + storage.size * storage.dtype.itemsize]

    return _checkpoint(value, content, path)


def _all_tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested dicts, lists and tuples, each container seen once."""
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
        raise WeightsError(f"{path} holds {bad[0]!r}, which is no tensor; save model.state_dict() and give that file.")
    read: dict[str, bytes | memoryview] = {}
    tensors = {}
    try:
        for name, tensor in state.items():
            storage = tensor.storage
            if storage.key not in read:
                read[storage.key] = content(storage)
            tensors[str(name)] = tensor.array(read[storage.key])
    except (ValueError, OverflowError) as error:
        raise WeightsError(f"{path} is damaged or cut short ({error}); get the file again.") from error
    return Checkpoint(without_prefixes(tensors), place, others)


def _state_dict(value: Any, path: Path) -> tuple[dict[Any, Any], str, tuple[str, ...]]:
    """The dict that has the tensors, what it is called, and other such dicts beside it."""
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
        raise WeightsError(f"{path} holds no state dict, at its top or as {', '.join(NESTED)}; give one that does.")
    return value, ".".join(place), others


def without_prefixes(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same under the names that the network gave them, whatever it was wrapped in."""
    named = {name: tensor for name, tensor in tensors.items() if name not in WRAPPERS_OWN}
    while prefix := next((p for p in PREFIXES if named and all(name.startswith(p) for name in named)), None):
        named = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    return named
