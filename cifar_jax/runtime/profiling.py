"""A trace of what ran when, on the host and on the devices."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from cifar_jax.errors import RunError, UserError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def profiled(directory: str | None) -> Iterator[None]:
    """Writes a JAX profiler trace of the block to a directory, for XProf or https://ui.perfetto.dev; nothing for None.

    Raises:
      UserError: when the directory cannot be written.
      RunError: when no trace came to be.
    """
    if directory is None:
        yield
        return
    path = Path(os.path.expanduser(directory))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--profile {path} cannot be made ({error.strerror}); choose another directory.") from error
    before = _traces(path)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of every Python function: a hundred megabytes, and minutes, of a demo
    with jax.profiler.trace(path, profiler_options=options):
        yield
    if not (traces := _traces(path) - before):
        raise RunError(f"The profiler wrote no trace to {path}; make room or choose another --profile.")
    logger.info(f"The trace is in {traces.pop()[0].parent}.")


def _traces(directory: Path) -> set[tuple[Path, int]]:
    """The traces in a directory and when each was written: JAX names them by the second, so one can replace another."""
    return {(path, path.stat().st_mtime_ns) for path in directory.rglob("*.xplane.pb")}
