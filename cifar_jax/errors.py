"""Exceptions of the library: user errors (exit code 2) and failed runs (exit code 1).

Each message says in one or two sentences what is wrong, where, and what to do next.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType


class UserError(Exception):
    """A mistake that the user can fix, such as a wrong option, file or directory. Exit code 2."""


class RunError(Exception):
    """A failure of the job itself, such as diverged training or a full disk. Exit code 1."""


class WeightsError(UserError):
    """A weights file that is missing, corrupt, or not of the expected network."""


NO_ALIASES: Mapping[str, str] = MappingProxyType({})


def did_you_mean(name: str, known: Iterable[str], aliases: Mapping[str, str] = NO_ALIASES) -> str:
    """Returns ` Did you mean ...?` with the known name most similar to an unknown one, or an empty string if none is.

    A known name that starts with the unknown one counts as similar.

    Args:
      name: the unknown name; case is ignored.
      known: the known names.
      aliases: known names by alias, in lower case.

    Example:
      >>> did_you_mean("CIFAR10", ["shapes", "cifar10"])
      ' Did you mean cifar10?'
    """
    spellings = {one.lower(): one for one in known} | dict(aliases)
    typed = name.strip().lower()
    near = get_close_matches(typed, spellings, n=1) or [one for one in spellings if typed and one.startswith(typed)]
    return f" Did you mean {spellings[near[0]]}?" if near else ""


def no_such(what: str, name: str, known: Iterable[str], aliases: Mapping[str, str] = NO_ALIASES) -> str:
    """Returns the error message for an unknown name, with a suggestion and the list of known names."""
    names = list(known)
    return f"There is no {what} {name!r}.{did_you_mean(name, names, aliases)} Choose one of {', '.join(names)}."


def some_of(names: Sequence[str], most: int = 5) -> str:
    """Lists the first few of some names for a message, and says how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def extra_missing(what: str, package: str, extra: str) -> UserError:
    """Returns the error for a package that is not installed, which names the extra of this project that has it."""
    return UserError(
        f"{what} needs the package {package}; install it with `pip install 'cifar-jax[{extra}]'`, in a checkout "
        f"`pip install '.[{extra}]'`."
    )
