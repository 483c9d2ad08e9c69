"""Profiler traces of the host and the devices."""

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
    """Writes a JAX profiler trace of the block to a directory, for XProf or https://ui.perfetto.dev; None writes none.

    Raises:
      UserError: if the directory cannot be created.
      RunError: if the profiler wrote no trace.
    """
    if directory is None:
        yield
        return
    path = Path(os.path.expanduser(directory))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--profile {path} cannot be created ({error.strerror}); choose another directory.") from error
    before = _traces(path)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing every Python call takes 100 MB and minutes for a demo
    with jax.profiler.trace(path, profiler_options=options):
        yield
    if not (traces := _traces(path) - before):
        raise RunError(f"The profiler wrote no trace to {path}; free disk space or choose another --profile.")
    logger.info(f"Profiler trace written to {traces.pop()[0].parent}.")


def _traces(directory: Path) -> set[tuple[Path, int]]:
    """Returns the traces in a directory with their times, as JAX names them by the second and may overwrite one."""
    return {(path, path.stat().st_mtime_ns) for path in directory.rglob("*.xplane.pb")}
