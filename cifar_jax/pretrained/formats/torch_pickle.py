"""Reader for PyTorch's pickles that executes nothing: an interpreter of the few opcodes that a state dict needs.

Python's unpickler imports and calls whatever a pickle names, and trusts every size. Here a name is only a key of the
tables below, a call is one of the few functions of this module, and the results are numbers, strings, lists, dicts and
tensor descriptions. Anything else in a pickle is refused, and named in the error.
"""

import math
import pickletools
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from cifar_jax.errors import WeightsError

# Bounds the time and memory that a small malicious file can cost. A ResNet152 with optimizer state takes 100,000.
MAX_INSTRUCTIONS = 500_000

STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
    "UntypedStorage": np.dtype("u1"),
    "storage.UntypedStorage": np.dtype("u1"),
}
DTYPES = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(jnp.bfloat16),
    "int64": np.dtype("<i8"),
}
VALUES = {f"torch.{name}": dtype for name, dtype in (STORAGES | DTYPES).items()}


@dataclass(frozen=True)
class Storage:
    """A flat array that tensors are views of; its bytes are stored elsewhere in the file."""

    key: str
    dtype: np.dtype
    size: int


@dataclass(frozen=True)
class Tensor:
    """A tensor described by a pickle: a view of a storage, with offset, shape and strides in elements of its dtype."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, content: bytes | memoryview) -> np.ndarray:
        """Returns the tensor as a view of the storage's bytes, without a copy.

        Raises:
          ValueError: if it would reach outside the storage, or have more elements than it.
        """
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
            raise ValueError("a tensor has an invalid shape or strides")
        held = len(content) // self.dtype.itemsize
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        # With strides of zero, a single number could expand to terabytes.
        if last >= held or math.prod(self.shape) > held:
            raise ValueError("a tensor reaches outside its storage")
        flat = np.frombuffer(content, self.dtype, count=held)[self.offset :]
        strides = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)


@dataclass(frozen=True)
class _Global:
    """A global name in a pickle; only ever used as a key of CALLS."""

    name: str


def _tensor(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> Tensor:
    return Tensor(_expect(storage, Storage), storage.dtype, offset, _expect(shape, tuple), _expect(strides, tuple))


def _tensor_v3(storage: Storage, offset: int, shape: Any, strides: Any, grad: bool, hooks: Any, *more: Any) -> Tensor:
    return Tensor(
        _expect(storage, Storage), _expect(more[0], np.dtype), offset, _expect(shape, tuple), _expect(strides, tuple)
    )  # more: dtype, metadata


def _parameter(tensor: Tensor, *_: Any) -> Tensor:
    return _expect(tensor, Tensor)


def _ordered_dict(pairs: list[Any] = []) -> dict[Any, Any]:  # noqa: B006 (never mutated)
    made: dict[Any, Any] = {}
    for key, value in _expect(pairs, list):
        made[_key(key)] = value
    return made


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": lambda sizes: tuple(_expect(sizes, tuple | list)),
    "torch.device": lambda kind, index=0: f"{kind}:{index}",
}


def read_pickle(stream: BinaryIO, what: str) -> Any:
    """Reads the next pickle of a stream: numbers, strings, tuples, lists, dicts and `Tensor`s.

    Args:
      stream: stream over bytes in memory; left positioned after the pickle.
      what: the file's name in error messages.

    Raises:
      WeightsError: if the pickle is corrupt, or needs more than a plain checkpoint does.
    """
    machine = _Machine(what)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of invalid escape sequences in strings
            return machine.run(stream)
    except (ValueError, TypeError, LookupError, ArithmeticError, struct.error) as error:
        raise WeightsError(
            f"{what} is corrupt: its pickle cannot be read ({error}). Get a fresh copy of the file."
        ) from error


# Opcodes whose argument is the value that they push.
_PUSHES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NO_OPS = frozenset(("PROTO", "FRAME", "STOP"))


class _Machine:
    """A pickle machine: a stack, the marks in it, and a memo."""

    def __init__(self, what: str):
        self.what = what
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> Any:
        """Executes a pickle and returns its value."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count == MAX_INSTRUCTIONS:
                raise WeightsError(f"The pickle in {self.what} is too long for a ResNet. Save its state dict alone.")
            self.step(opcode.name, argument)
        if self.marks:
            raise ValueError("ends with an open mark")
        return self.pop()

    def step(self, name: str, argument: Any) -> None:
        """Executes one opcode."""
        if name in _PUSHES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self.stack.append(tuple(reversed([self.pop() for _ in range(_TUPLES[name])])))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name not in _NO_OPS:
            act = _ACTIONS.get(name)
            if act is None:
                raise _unsupported(self.what, f"the pickle opcode {name}")
            act(self, argument)

    def pop(self) -> Any:
        """Pops the top value, never one below a mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("stack underflow")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """Pops all values above the last mark."""
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def push_global(self, name: str) -> None:
        """Pushes the value of a global name."""
        if name not in CALLS and name not in VALUES:
            raise _unsupported(self.what, name)
        self.stack.append(VALUES[name] if name in VALUES else _Global(name))

    def reduce(self) -> None:
        """Calls one of the functions of this module."""
        arguments, function = _expect(self.pop(), tuple), _expect(self.pop(), _Global)
        self.stack.append(CALLS[function.name](*arguments))

    def set_items(self, items: list[Any]) -> None:
        """Adds items, given as key, value, key, value, ..., to the dict on top of the stack."""
        target = _expect(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def storage(self, about: Any) -> None:
        """Pushes the storage described by a persistent id: ("storage", type, key, device, size[, view])."""
        kind, dtype, key, _, size, *view = _expect(about, tuple)
        if kind != "storage" or any(part is not None for part in view):
            raise _unsupported(self.what, "a view of a storage, which only the first PyTorch releases wrote")
        if not (isinstance(dtype, np.dtype) and isinstance(key, str) and type(size) is int and 0 <= size < 2**48):
            raise ValueError("a storage has an invalid size")
        self.stack.append(Storage(key, dtype, size))

    def make_dict(self, items: list[Any]) -> None:
        """Pushes a dict of items given as key, value, key, value, ..."""
        self.stack.append({})
        self.set_items(items)

    def extend(self, items: list[Any]) -> None:
        """Extends the list on top of the stack."""
        _expect(self.stack[-1], list).extend(items)

    def drop(self, _: Any) -> None:
        """Discards a popped value."""

    def build(self) -> None:
        """Discards an OrderedDict's attributes (`_metadata`), which are not needed."""
        self.pop()
        _expect(self.stack[-1], dict)


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": lambda machine, _: machine.drop(machine.pop()),
    "POP_MARK": lambda machine, _: machine.drop(machine.pop_mark()),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_mark())),
    "LIST": lambda machine, _: machine.stack.append(machine.pop_mark()),
    "DICT": lambda machine, _: machine.make_dict(machine.pop_mark()),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "MEMOIZE": lambda machine, _: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
    "GLOBAL": lambda machine, name: machine.push_global(name.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.push_global(".".join([machine.pop(), machine.pop()][::-1])),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.storage(machine.pop()),
}


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"unexpected {type(value).__name__}")
    return value


def _key(key: Any) -> str | int:
    # Hashing a tuple nested a million levels deep would overflow the C stack.
    return _expect(key, str | int)


def _unsupported(what: str, name: str) -> WeightsError:
    return WeightsError(
        f"{what} contains {name!r}, which a plain checkpoint does not need, so it was not loaded for safety. Save "
        "model.state_dict() alone, or as safetensors, and use that file."
    )
