"""Commands and Python blocks of Markdown documents."""

import re
from itertools import groupby
from typing import NamedTuple

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python|pip|make|cifar-jax|tfds) ")
_ONE_OF_SEVERAL = "JAX_PROCESS_ID="


class Command(NamedTuple):
    """A command of a document.

    Attributes:
      document: its name.
      line: counted from 1.
      text: as it stands there, a comment behind it included.
    """

    document: str
    line: int
    text: str

    @property
    def bare(self) -> str:
        """The text without a comment."""
        return re.sub(r"(^|\s+)#.*", "", self.text)


class Block(NamedTuple):
    """A fenced block: its language, the line it begins on, and its text."""

    language: str
    line: int
    text: str


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a document."""
    return [Block(found[1], text.count("\n", 0, found.start(2)) + 1, found[2]) for found in _FENCE.finditer(text)]


def commands(document: str, text: str) -> list[Command]:
    """Every command of a document in its order: lines of `sh` blocks, and code spans that begin as commands do."""
    found = []
    for block in blocks(text):
        if block.language == "sh":
            lines = enumerate(block.text.splitlines(), block.line)
            found += [Command(document, number, line) for number, line in lines if Command("", 0, line).bare.strip()]
    prose = _COMMENT.sub(_blank, _FENCE.sub(_blank, text))
    for span in _SPAN.finditer(prose):
        words = " ".join(span[1].split())
        if _COMMAND.match(words):
            found.append(Command(document, prose.count("\n", 0, span.start()) + 1, words))
    return sorted(found, key=lambda command: command.line)


def steps(typed: list[Command]) -> list[list[Command]]:
    """Commands in the order in which they are typed, each once; neighbours that are processes of one run together."""
    first = {command.bare: command for command in reversed(typed)}
    once = [command for command in typed if first[command.bare] is command]
    numbered = enumerate(once)
    groups = groupby(numbered, lambda pair: "together" if _ONE_OF_SEVERAL in pair[1].text else pair[0])
    return [[command for _, command in group] for _, group in groups]


def _blank(found: re.Match[str]) -> str:
    """Nothing, on as many lines."""
    return "\n" * found[0].count("\n")
