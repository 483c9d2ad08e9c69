"""Rules by which tyro parses numbers and lists, with plain error messages, and the program's name for usage lines."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

REGISTRY = ConstructorRegistry()
NUMBERS: dict[type, str] = {int: "a whole number", float: "a number"}


def program() -> str:
    """Returns the command that started this program, for usage and help."""
    return "cifar-jax" if Path(sys.argv[0]).stem == "cifar-jax" else "python -m cifar_jax"


@REGISTRY.primitive_rule
def number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Rule for options that take an int or a float, and for optional ones also None."""
    kinds = set(get_args(info.type) or [info.type])
    optional = NoneType in kinds
    kinds -= {NoneType}
    if len(kinds) != 1 or not kinds <= set(NUMBERS):
        return None
    (kind,) = kinds
    read = _reader(kind)
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=("{None}|" if optional else "") + kind.__name__.upper(),
        instance_from_str=lambda args: None if optional and args[0] == "None" else read(args[0]),
        is_instance=lambda value: (optional and value is None) or isinstance(value, kind | int),
        str_from_instance=lambda value: [str(value)],
    )


@REGISTRY.primitive_rule
def listed(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Rule for options that take a list of ints or of choices, separated by spaces or commas."""
    if info.type_origin is not tuple or get_args(info.type)[1:] != (...,):
        return None
    item_type = get_args(info.type)[0]
    if get_origin(item_type) is Literal:
        read, metavar = _chooser(get_args(item_type)), "{" + ",".join(get_args(item_type)) + "}"
    elif item_type is int:
        read, metavar = _reader(int), "INT"
    else:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{metavar} [{metavar} ...]]",
        instance_from_str=lambda args: tuple(read(item) for item in _items(args)),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [str(item) for item in value],
    )


def _items(args: list[str]) -> list[str]:
    return re.split(r"\s*,\s*|\s+", re.sub(r",\s*$", "", " ".join(args).strip())) if args else []


def _reader(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"expected {NUMBERS[kind]}, got {text or 'nothing'}.") from None

    return read


def _chooser(choices: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, got {text or 'nothing'}.")
        return text

    return read
