"""One seed, one key for each use of randomness: what one use draws never moves another."""

import jax
from jaxtyping import PRNGKeyArray

# Appended to, never reordered: a stream's place in this list is part of what a seed means.
STREAMS = ("init", "order", "step", "hold_out", "backbone", "train_subset", "test_subset", "pictures", "augment")


def stream_key(seed: int, stream: str) -> PRNGKeyArray:
    """The key of a named stream; fold in an epoch or a step where a stream is drawn from more than once.

    Raises:
      ValueError: when there is no such stream.
    """
    return stream_of(jax.random.key(seed), stream)


def stream_of(key: PRNGKeyArray, stream: str) -> PRNGKeyArray:
    """The key of a named stream of a key; see `stream_key`."""
    return jax.random.fold_in(key, STREAMS.index(stream))
