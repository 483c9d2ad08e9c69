"""Random keys: one seed, and an independent key for each use of randomness."""

import jax
from jaxtyping import PRNGKeyArray

# Append only: a stream's position in this list determines the key that a seed gives it.
STREAMS = (
    *("init", "order", "step", "hold_out", "backbone", "train_subset", "test_subset", "pictures", "augment"),
    *("test_split", "crops"),
)


def stream_key(seed: int, stream: str) -> PRNGKeyArray:
    """Returns the key of a named stream. Fold in the epoch or step if the stream is used more than once.

    Raises:
      ValueError: if there is no such stream.
    """
    return stream_of(jax.random.key(seed), stream)


def stream_of(key: PRNGKeyArray, stream: str) -> PRNGKeyArray:
    """Returns the key of a named stream of a key; see `stream_key`."""
    return jax.random.fold_in(key, STREAMS.index(stream))
