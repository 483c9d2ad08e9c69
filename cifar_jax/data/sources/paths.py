"""Pictures as a user names them on a command line: files, folders, patterns, and lists on standard input."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from cifar_jax.data.sources.folder import walk
from cifar_jax.data.sources.images import SUFFIXES
from cifar_jax.errors import UserError

STDIN = "-"
_MAGIC = "*?["


def picture_paths(sources: Sequence[str], read_stdin: Callable[[], bytes] | None = None) -> list[str]:
    """Lists the picture files that sources stand for, in the order of the sources.

    A folder stands for the pictures at any depth below it, sorted; hidden files and links to folders are left out. A
    name with `*`, `?` or `[` that does not exist is a pattern, in which `**` stands for folders at any depth; it
    gives the pictures that it matches and those in the folders that it matches, sorted. `-` stands for a list of files
    and folders on standard input, one a line, or separated by NUL. Any other name is that of a file, which may be
    missing: reading it will tell. So is a pattern that matches nothing.

    Args:
      sources: names as typed.
      read_stdin: reads standard input to its end.

    Raises:
      UserError: if a folder has no pictures or cannot be read, or nothing comes from standard input.
    """
    return [path for source in sources for path in _expanded(source, read_stdin)]


def is_pattern(name: str) -> bool:
    """Whether a name is a pattern rather than that of an existing file or folder, which may have brackets."""
    return any(sign in name for sign in _MAGIC) and not os.path.lexists(name)


def pictures_below(folder: str) -> list[str]:
    """Lists the pictures at any depth below a folder, sorted; empty if there are none."""
    return [
        os.path.join(*pair) for pair in sorted((place, name) for place, name, is_picture in walk(folder) if is_picture)
    ]


def _expanded(source: str, read_stdin: Callable[[], bytes] | None) -> list[str]:
    if source == STDIN and read_stdin is not None:
        listed = _listed(read_stdin())
        if not listed:
            raise UserError("- reads a list of image files from standard input, but nothing came from there.")
        return [path for name in listed for path in _named(name)]
    if is_pattern(source):
        return _matches(source) or [source]
    return _named(source)


def _named(name: str) -> list[str]:
    name = name if os.path.lexists(name) else os.path.expanduser(name)
    if not os.path.isdir(name):
        return [name]
    found = pictures_below(name)
    if not found:
        raise UserError(f"{name} is a directory without image files, at any depth; give one with PNG or JPEG files.")
    return found


def _listed(content: bytes) -> list[str]:
    """Splits a list of names, which end with NUL if there is one, else with a line."""
    if b"\0" in content:
        return [os.fsdecode(name) for name in content.split(b"\0") if name]
    lines = [os.fsdecode(line) for line in content.split(b"\n")]
    # Lists made on Windows end their lines with a carriage return, which a name may end with as well.
    return [line if os.path.lexists(line) else line.rstrip("\r") for line in lines if line.strip()]


def _matches(pattern: str) -> list[str]:
    """Lists the pictures that a pattern matches, and those in folders that it matches; hidden ones need a dot."""
    parts = os.path.expanduser(pattern).split(os.sep)
    fixed = 0  # leading parts that exist as they are, whatever signs they have
    while fixed < len(parts) - 1 and not is_pattern(os.sep.join(parts[: fixed + 1])):
        fixed += 1
    root, rest = os.sep.join([*parts[:fixed], ""]), parts[fixed:]
    shows_hidden = any(part.startswith(".") for part in rest)
    try:
        matched = list(Path(root).glob(os.sep.join(rest)))
    except ValueError:  # such as `**` beside other signs in one part
        return []
    found: set[str] = set()
    for path in matched:
        relative = os.path.relpath(path, root or ".")
        if not shows_hidden and any(part.startswith(".") and part != "." for part in relative.split(os.sep)):
            continue
        name = root + relative if relative != "." else root or "."
        found.update(_pictures_at(name))
    return sorted(found, key=os.path.split)


def _pictures_at(name: str) -> list[str]:
    if os.path.isdir(name):
        return [] if os.path.islink(name) else pictures_below(name)
    return [name] if name.lower().endswith(SUFFIXES) else []
