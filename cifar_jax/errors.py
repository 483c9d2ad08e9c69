"""The two ways a command ends badly: the user's mistake (exit code 2) and a failed run (exit code 1).

Each message is one sentence or two that say what is wrong, where, and what to do next.
"""


class UserError(Exception):
    """Something the user can mend: an option, a file, a directory. Exit code 2."""


class RunError(Exception):
    """The job itself failed: training diverged, the disk filled up. Exit code 1."""
