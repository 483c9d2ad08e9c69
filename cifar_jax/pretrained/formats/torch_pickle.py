"""Reads PyTorch's pickles without executing them: an interpreter of the few instructions that a state dict needs.

Python's own unpickler imports what a pickle names, calls it, and believes every size. Here a name is a key of the
tables below, a call is one of six functions of this module, and what comes out are numbers, strings, lists, dicts and
descriptions of tensors. Whatever else a pickle asks for is refused by its name.
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

# A ResNet152 with its optimizer's state takes 100,000. Bounds time and memory, whatever a few bytes may claim.
MOST_INSTRUCTIONS = 500_000

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
    """A run of numbers that tensors are views of; its bytes lie elsewhere in the file."""

    key: str
    dtype: np.dtype
    size: int


@dataclass(frozen=True)
class Tensor:
    """A tensor as a pickle describes it: a view of a storage, sizes and strides in elements of its dtype."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, content: bytes | memoryview) -> np.ndarray:
        """The view, of the storage's bytes; nothing is copied.

        Raises:
          ValueError: when it would reach outside of the storage, or repeat it.
        """
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
            raise ValueError("a tensor of impossible sizes")
        held = len(content) // self.dtype.itemsize
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        # Strides of zero make terabytes of one number.
        if last >= held or math.prod(self.shape) > held:
            raise ValueError("a tensor that reaches outside of its storage")
        flat = np.frombuffer(content, self.dtype, count=held)[self.offset :]
        strides = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)


@dataclass(frozen=True)
class _Global:
    """A name that a pickle asks for; only a key of the tables here."""

    name: str


def _tensor(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> Tensor:
    return Tensor(_is(storage, Storage), storage.dtype, offset, _is(shape, tuple), _is(strides, tuple))


def _tensor_v3(storage: Storage, offset: int, shape: Any, strides: Any, grad: bool, hooks: Any, *more: Any) -> Tensor:
    return Tensor(
        _is(storage, Storage), _is(more[0], np.dtype), offset, _is(shape, tuple), _is(strides, tuple)
    )  # more: dtype, metadata


def _parameter(tensor: Tensor, *_: Any) -> Tensor:
    return _is(tensor, Tensor)


def _ordered_dict(pairs: list[Any] = []) -> dict[Any, Any]:  # noqa: B006 (never changed)
    made: dict[Any, Any] = {}
    for key, value in _is(pairs, list):
        made[_key(key)] = value
    return made


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": lambda sizes: tuple(_is(sizes, tuple | list)),
    "torch.device": lambda kind, index=0: f"{kind}:{index}",
}


def read_pickle(stream: BinaryIO, what: str) -> Any:
    """What the next pickle of a stream holds: numbers, strings, tuples, lists, dicts and `Tensor`s.

    Args:
      stream: over bytes in memory; is left behind the pickle.
      what: the file, for the error.

    Raises:
      WeightsError: when the pickle is damaged, or asks for what no plain checkpoint needs.
    """
    machine = _Machine(what)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of escapes in texts that are none
            return machine.run(stream)
    except (ValueError, TypeError, LookupError, ArithmeticError, struct.error) as error:
        raise WeightsError(f"{what} is damaged: its pickle cannot be read ({error}); get the file again.") from error


# Instructions whose argument is the value that they push.
_PUSHES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = frozenset(("PROTO", "FRAME", "STOP"))


class _Machine:
    """The stack of a pickle, the marks in it, and what it remembers."""

    def __init__(self, what: str):
        self.what = what
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> Any:
        """Does the instructions of a pickle; what is on the stack at its end."""
        for count, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
            if count == MOST_INSTRUCTIONS:
                raise WeightsError(f"{self.what} is too long a pickle for a ResNet; save its state dict alone.")
            self.step(instruction.name, argument)
        if self.marks:
            raise ValueError("it ends inside of a list")
        return self.pop()

    def step(self, name: str, argument: Any) -> None:
        """Does one instruction."""
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
        elif name not in _NOTHING:
            act = _ACTIONS.get(name)
            if act is None:
                raise _refused(self.what, f"the pickle instruction {name}")
            act(self, argument)

    def pop(self) -> Any:
        """Takes the topmost value off; never one below a mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("its stack is empty")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """Takes off all values above the last mark."""
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def push_global(self, name: str) -> None:
        """Pushes what a name stands for."""
        if name not in CALLS and name not in VALUES:
            raise _refused(self.what, name)
        self.stack.append(VALUES[name] if name in VALUES else _Global(name))

    def reduce(self) -> None:
        """Calls one of the functions of this module."""
        arguments, function = _is(self.pop(), tuple), _is(self.pop(), _Global)
        self.stack.append(CALLS[function.name](*arguments))

    def set_items(self, items: list[Any]) -> None:
        """Puts key, value, key, value, ... into the dict on top."""
        target = _is(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def storage(self, about: Any) -> None:
        """Pushes the storage that a persistent id describes: ("storage", type, key, device, size[, view])."""
        kind, dtype, key, _, size, *view = _is(about, tuple)
        if kind != "storage" or any(part is not None for part in view):
            raise _refused(self.what, "a view of a storage, as only the first PyTorch wrote")
        if not (isinstance(dtype, np.dtype) and isinstance(key, str) and type(size) is int and 0 <= size < 2**48):
            raise ValueError("a storage of impossible size")
        self.stack.append(Storage(key, dtype, size))

    def make_dict(self, items: list[Any]) -> None:
        """Pushes the dict of key, value, key, value, ..."""
        self.stack.append({})
        self.set_items(items)

    def extend(self, items: list[Any]) -> None:
        """Puts items behind those of the list on top."""
        _is(self.stack[-1], list).extend(items)

    def drop(self, _: Any) -> None:
        """Forgets what was popped."""

    def build(self) -> None:
        """An OrderedDict's attributes (`_metadata`), which nobody needs."""
        self.pop()
        _is(self.stack[-1], dict)


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


def _is(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} where it needs another value")
    return value


def _key(key: Any) -> str | int:
    # Hashing a tuple nested a million deep would overflow the stack of the process.
    return _is(key, str | int)


def _refused(what: str, name: str) -> WeightsError:
    return WeightsError(
        f"{what} asks for {name!r}, which no plain checkpoint needs, so it was not read any further; save "
        "model.state_dict() alone, or as safetensors, and give that file."
    )
