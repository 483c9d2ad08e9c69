"""Rows and pairs as lines of a terminal's width, in which no name and no number is cut or broken."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from cifar_jax.cli.text import printable

GAP = "  "
LEAST = 20  # columns that a text is given, however narrow the terminal


def table_lines(rows: Sequence[Mapping[str, Any]], width: int) -> Iterator[Text]:
    """A table of equal rows; where it is wider than the terminal, each row as its first cell and the others below.

    Args:
      rows: with the same columns each.
      width: of the terminal.
    """
    names = list(rows[0])
    cells = [[printable(str(cell)) for cell in row.values()] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(names, *cells, strict=True)]
    if sum(widths) + len(GAP) * (len(widths) - 1) > width:
        for row in cells:
            yield from _record(names, row, width)
        return
    yield Text(_aligned(names, widths), style="bold")
    for row in cells:
        yield Text(_aligned(row, widths))


def pair_lines(pairs: Mapping[str, str], width: int | None) -> Iterator[Text]:
    """Names and what they are, a line each; where that is longer than the terminal, it goes on below itself.

    Args:
      pairs: the names and what they are.
      width: of the terminal; None leaves lines as long as they are.
    """
    cells = {printable(name): printable(text) for name, text in pairs.items()}
    left = max(map(cell_len, cells)) + len(GAP)
    for name, text in cells.items():
        first, *others = [text] if width is None else wrapped(text, width - left)
        yield Text.assemble((_filled(name, left), "bold"), first)
        for line in others:
            yield Text(" " * left + line)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of a text: broken behind commas and semicolons, and elsewhere only where a part is too long for a line.

    What holds a path or a command stays in one piece, which the terminal breaks, so that it can be copied.
    """
    width = max(width, LEAST)
    parts: list[str] = []
    for part in re.split(r"(?<=[,;]) ", text):
        parts += part.split(" ") if cell_len(part) > width and "/" not in part else [part]
    lines = parts[:1]
    for part in parts[1:]:
        if cell_len(f"{lines[-1]} {part}") <= width:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return lines


def sentence_lines(text: str, width: int) -> list[str]:
    """Lines of sentences, broken between words; a command in backticks and a path stay in one piece."""
    lines: list[str] = []
    for word in re.split(r" (?=(?:[^`]*`[^`]*`)*[^`]*$)", text):
        if lines and cell_len(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _record(names: Sequence[str], row: Sequence[str], width: int) -> Iterator[Text]:
    """A row as lines: its first cell, and below it `name: cell` as often as fits, cells without content left out."""
    for line in wrapped(row[0], width):
        yield Text(line, style="bold")
    pairs, used = Text(), 0
    for name, cell in zip(names[1:], row[1:], strict=True):
        if not cell:
            continue
        size = len(GAP) + cell_len(f"{name}: {cell}")
        if size > width >= len(GAP) + cell_len(cell):  # such as a long digest
            if pairs:
                yield pairs
            yield Text.assemble(GAP, (f"{name}:", "dim"))
            yield Text(cell.rjust(min(width, cell_len(cell) + 2 * len(GAP))))
            pairs, used = Text(), 0
            continue
        if pairs and used + size > width:
            yield pairs
            pairs, used = Text(), 0
        pairs += Text.assemble(GAP, (f"{name}: ", "dim"), cell)
        used += size
    if pairs:
        yield pairs


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return GAP.join(_filled(cell, width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _filled(cell: str, width: int) -> str:
    return cell + " " * (width - cell_len(cell))
