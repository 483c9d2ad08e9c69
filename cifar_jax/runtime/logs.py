"""Log handlers that libraries add when they are imported."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def root_handlers_kept() -> Iterator[None]:
    """Removes the handlers that the block adds to the root logger, which would print every log record once more.

    absl, with which TFDS and Grain log, adds one when it is imported.
    """
    handlers = list(logging.root.handlers)
    try:
        yield
    finally:
        for handler in set(logging.root.handlers).difference(handlers):
            logging.root.removeHandler(handler)
