"""What a compiled function says of itself in its text."""

import re
from typing import NamedTuple

_COLLECTIVE = re.compile(
    r" = (.+?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)
_ARRAY = re.compile(r"\b(?:pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One exchange between devices, each time that the line is run."""

    name: str
    elements: int  # of its results, together
    bytes: int


def collectives(text: str) -> list[Collective]:
    """The exchanges in the text of a compiled function, `jax.jit(f).lower(...).compile().as_text()`."""
    return [Collective(name, *_size(shape)) for shape, name in _COLLECTIVE.findall(text)]


def _size(shape: str) -> tuple[int, int]:
    """Elements and bytes of an array such as `f32[8,10]{1,0}`, or of a tuple of them."""
    elements = total = 0
    for bits, sides in _ARRAY.findall(shape):
        count = 1
        for side in filter(None, sides.split(",")):
            count *= int(side)
        elements += count
        total += count * max(int(bits or 8), 8) // 8
    return elements, total
