"""The two ways a command ends badly: the user's mistake (exit code 2) and a failed run (exit code 1).

Each message is one sentence or two that say what is wrong, where, and what to do next.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType


class UserError(Exception):
    """Something the user can mend: an option, a file, a directory. Exit code 2."""


class RunError(Exception):
    """The job itself failed: training diverged, the disk filled up. Exit code 1."""


class WeightsError(UserError):
    """A weights file that is missing, damaged, or not the network that it should be."""


NO_ALIASES: Mapping[str, str] = MappingProxyType({})


def did_you_mean(name: str, known: Iterable[str], aliases: Mapping[str, str] = NO_ALIASES) -> str:
    """A question that offers the known name nearest to an unknown one, or an empty string where none is near.

    A name that begins with the unknown one is near too.

    Args:
      name: as typed; case is ignored.
      known: the names there are.
      aliases: from other names that people use, in lower case, to known ones.

    Example:
      >>> did_you_mean("CIFAR10", ["shapes", "cifar10"])
      ' Did you mean cifar10?'
    """
    spellings = {one.lower(): one for one in known} | dict(aliases)
    typed = name.strip().lower()
    near = get_close_matches(typed, spellings, n=1) or [one for one in spellings if typed and one.startswith(typed)]
    return f" Did you mean {spellings[near[0]]}?" if near else ""


def no_such(what: str, name: str, known: Iterable[str], aliases: Mapping[str, str] = NO_ALIASES) -> str:
    """The message for an unknown name: what it may be instead, and which one was probably meant."""
    names = list(known)
    return f"There is no {what} {name!r}.{did_you_mean(name, names, aliases)} Choose one of {', '.join(names)}."
