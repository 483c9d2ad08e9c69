"""Writes PyTorch checkpoints without PyTorch, including invalid ones."""

import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cifar_jax.pretrained.formats.torch_file import LEGACY_MAGIC, LEGACY_PROTOCOL

STORAGE_OF = {
    np.dtype("<f4"): "FloatStorage",
    np.dtype("<f2"): "HalfStorage",
    np.dtype("<f8"): "DoubleStorage",
    np.dtype("<i8"): "LongStorage",
    np.dtype(jnp.bfloat16): "BFloat16Storage",
}


class Global(NamedTuple):
    """A global name in a pickle."""

    module: str
    name: str


class Call(NamedTuple):
    """The result of a call."""

    function: Global
    arguments: tuple[Any, ...]


class Persistent(NamedTuple):
    """An object with a persistent id."""

    about: tuple[Any, ...]


class View(NamedTuple):
    """A tensor as a view of a storage, with offset and strides in elements."""

    key: str
    flat: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
ORDERED_DICT = Global("collections", "OrderedDict")


def pickled(value: Any) -> bytes:
    """Returns a pickle of protocol 2."""
    return b"\x80\x02" + encode(value) + b"."


def encode(value: Any) -> bytes:
    """Returns the opcodes that push a value."""
    match value:
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case int():
            content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(content)]) + content
        case float():
            return b"G" + struct.pack(">d", value)
        case Global():
            return b"c" + f"{value.module}\n{value.name}\n".encode()
        case Call():
            return encode(value.function) + encode(tuple(value.arguments)) + b"R"
        case Persistent():
            return encode(value.about) + b"Q"
        case tuple():
            return b"(" + b"".join(map(encode, value)) + b"t"
        case list():
            return b"](" + b"".join(map(encode, value)) + b"e"
        case dict():
            items = b"".join(encode(part) for item in value.items() for part in item)
            return encode(Call(ORDERED_DICT, ())) + b"(" + items + b"u"
    raise TypeError(value)


def views(tensors: Mapping[str, Any]) -> dict[str, View]:
    """Turns each array into a view of its own storage; views stay as they are."""
    made = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        if not isinstance(tensor, View):
            array = np.asarray(tensor)
            strides = tuple(stride // array.itemsize for stride in array.copy("C").strides)
            tensor = View(str(number), array.ravel(), 0, array.shape, strides)
        made[name] = tensor
    return made


def tensor(view: View) -> Call:
    """Returns a tensor as it is pickled."""
    storage = ("storage", Global("torch", STORAGE_OF[view.flat.dtype]), view.key, "cpu", view.flat.size)
    return Call(REBUILD, (Persistent(storage), view.offset, view.shape, view.strides, False, Call(ORDERED_DICT, ())))


def write_zip(path: Path, value: Any, storages: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Writes any value in the zip container of PyTorch since 1.6."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", value if isinstance(value, bytes) else pickled(value))
        file.writestr("archive/byteorder", "little")
        for key, content in storages.items():
            file.writestr(f"archive/data/{key}", content)
        file.writestr("archive/version", "3\n")
    return path


def write_legacy(path: Path, value: Any, storages: Mapping[str, np.ndarray]) -> Path:
    """Writes any value in the legacy container."""
    file = io.BytesIO()
    for part in (LEGACY_MAGIC, LEGACY_PROTOCOL, {"protocol_version": 1001, "little_endian": True}, value, [*storages]):
        file.write(pickled(part))
    for flat in storages.values():
        file.write(struct.pack("<q", flat.size) + flat.tobytes())
    path.write_bytes(file.getvalue())
    return path


def write_torch(path: Path, tensors: Mapping[str, Any], legacy: bool = False, wrap: Any = lambda state: state) -> Path:
    """Writes a checkpoint of arrays and views, with its state dict wrapped by a function."""
    held = views(tensors)
    state = wrap({name: tensor(view) for name, view in held.items()})
    flats = {view.key: view.flat for view in held.values()}
    if legacy:
        return write_legacy(path, state, flats)
    return write_zip(path, state, {key: flat.tobytes() for key, flat in flats.items()})
