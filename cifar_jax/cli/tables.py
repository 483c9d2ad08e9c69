"""Layout of tables and name-value pairs for a terminal's width, without cutting or breaking names and numbers."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from cifar_jax.cli.escape import printable

GAP = "  "
MIN_WIDTH = 20  # columns of a text, however narrow the terminal


def table_lines(rows: Sequence[Mapping[str, Any]], width: int) -> Iterator[Text]:
    """Lays out rows as a table, or if that is too wide, each row as its first cell with the others below.

    Args:
      rows: mappings from column to cell, all with the same columns.
      width: columns of the terminal.
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
    """Lays out name-value pairs, one a line; long values wrap with a hanging indent.

    Args:
      pairs: values by name.
      width: columns of the terminal; None does not wrap.
    """
    cells = {printable(name): printable(text) for name, text in pairs.items()}
    left = max(map(cell_len, cells)) + len(GAP)
    for name, text in cells.items():
        first, *rest = [text] if width is None else wrapped(text, width - left)
        yield Text.assemble((_padded(name, left), "bold"), first)
        for line in rest:
            yield Text(" " * left + line)


def wrapped(text: str, width: int) -> list[str]:
    """Wraps a text after commas and semicolons, and between words only where a part is too long for a line.

    Parts with a path or a command stay whole and are left to the terminal to wrap, so that they can be copied.
    """
    width = max(width, MIN_WIDTH)
    parts: list[str] = []
    for part in re.split(r"(?<=[,;]) ", text):
        parts += part.split(" ") if cell_len(part) > width and "/" not in part else [part]
    return _lines_of(parts, width)


def sentence_lines(text: str, width: int) -> list[str]:
    """Wraps sentences between words; commands in backticks and paths stay whole."""
    return _lines_of(re.split(r" (?=(?:[^`]*`[^`]*`)*[^`]*$)", text), width)


def _lines_of(parts: Sequence[str], width: int) -> list[str]:
    """Joins parts by spaces into lines of at most `width` columns, or of one part."""
    lines = list(parts[:1])
    for part in parts[1:]:
        if cell_len(f"{lines[-1]} {part}") <= width:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return lines


def _record(names: Sequence[str], row: Sequence[str], width: int) -> Iterator[Text]:
    """Lays out a row as its first cell and below it as many `name: cell` per line as fit, without empty cells."""
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
    return GAP.join(_padded(cell, width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _padded(cell: str, width: int) -> str:
    return cell + " " * (width - cell_len(cell))
