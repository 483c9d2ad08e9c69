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
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from cifar_jax.errors import WeightsError

# Bounds the time and memory that a small malicious file can cost. A ResNet152 with optimizer state takes 100,000.
MAX_DIMENSIONS = 64  # of a tensor, as in NumPy
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


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    dtype = _expect(storage, Storage).dtype
    return Tensor(storage, dtype, offset, _expect(shape, tuple), _expect(strides, tuple))


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    return replace(_tensor(storage, offset, shape, strides), dtype=_expect(dtype, np.dtype))


def _parameter(tensor: Tensor, *_: Any) -> Tensor:
    return _expect(tensor, Tensor)


def _size(sizes: Any) -> tuple[Any, ...]:
    if len(_expect(sizes, tuple | list)) > MAX_DIMENSIONS:
        raise ValueError(f"a shape of {len(sizes)} dimensions")
    return tuple(sizes)


def _ordered_dict(pairs: list[Any] = []) -> dict[Any, Any]:  # noqa: B006 (never mutated)
    return {_key(key): value for key, value in _expect(pairs, list)}


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _size,
    "torch.device": lambda *_: "device",  # where a tensor lay does not matter here
}


def read_pickle(stream: BinaryIO, what: str) -> Any:
    """Reads the next pickle of a stream: numbers, strings, tuples, lists, dicts and `Tensor`s.

    Args:
      stream: stream over bytes in memory; left positioned after the pickle.
      what: the file's name in error messages.

    Raises:
      WeightsError: if the pickle is corrupt, or needs more than a plain checkpoint does.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of invalid escape sequences in strings
            return _Machine(what).run(stream)
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, struct.error) as error:
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
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if name in _PUSHES:
                stack.append(argument)
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case _ if name in _TUPLES:
                stack.append(tuple([self.pop() for _ in range(_TUPLES[name])][::-1]))
            case "MARK":
                self.marks.append(len(stack))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE":
                stack.append(tuple(self.pop_mark()))
            case "APPEND":
                item = self.pop()
                _expect(stack[-1], list).append(item)
            case "APPENDS":
                items = self.pop_mark()
                _expect(stack[-1], list).extend(items)
            case "SETITEM":
                value, key = self.pop(), self.pop()
                _expect(stack[-1], dict).update(_to_dict([key, value]))
            case "SETITEMS":
                items = self.pop_mark()
                _expect(stack[-1], dict).update(_to_dict(items))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(self.global_value(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                stack.append(self.global_value(f"{_expect(module, str)}.{_expect(attribute, str)}"))
            case "REDUCE":
                arguments, function = _expect(self.pop(), tuple), _expect(self.pop(), _Global)
                stack.append(CALLS[function.name](*arguments))
            case "BUILD":  # an OrderedDict's attributes (`_metadata`) are not needed
                self.pop()
                _expect(stack[-1], dict)
            case "BINPERSID":
                stack.append(self.storage(self.pop()))
            case _:
                raise _unsupported(self.what, f"the pickle opcode {name}")

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

    def global_value(self, name: str) -> Any:
        """Returns the value of a global name."""
        if name not in CALLS and name not in VALUES:
            raise _unsupported(self.what, name)
        return VALUES[name] if name in VALUES else _Global(name)

    def storage(self, about: Any) -> Storage:
        """Returns the storage described by a persistent id: ("storage", type, key, device, size[, view])."""
        kind, dtype, key, _, size, *view = _expect(about, tuple)
        if kind != "storage" or any(part is not None for part in view):
            raise _unsupported(self.what, "a view of a storage, which only the first PyTorch releases wrote")
        if not (isinstance(dtype, np.dtype) and isinstance(key, str) and type(size) is int and 0 <= size < 2**48):
            raise ValueError("a storage has an invalid size")
        return Storage(key, dtype, size)


def _to_dict(items: list[Any]) -> dict[Any, Any]:
    """Returns a dict of items given as key, value, key, value, ..."""
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


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
