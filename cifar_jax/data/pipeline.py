"""Reading of images batch by batch, decoded ahead in threads where they do not lie in memory."""

import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from cifar_jax.data.pictures import Images, Resized
from cifar_jax.data.sources.images import ImageError
from cifar_jax.runtime.logs import root_handlers_kept

MOST_THREADS = 16
AHEAD = 3  # batches that are decoded before they are asked for
AHEAD_BYTES = 2**28  # of decoded images that wait, unless a batch alone has more
ELEMENTS_AHEAD = 16


def read_batches(
    images: Any, batches: Sequence[Int[np.ndarray, "m"]], threads: int | None = None
) -> Iterator[UInt8[np.ndarray, "m h w 3"]]:
    """Yields the images of each batch of rows, in order.

    Args:
      images: an array of any kind, or `Resized`: then decoded in threads, some batches ahead.
      batches: rows of each batch.
      threads: number of threads; the number of cores, at most 16, if None.

    Raises:
      ImageError: for the first picture that cannot be read.
    """
    if not isinstance(images, Resized):
        yield from (images[rows] for rows in batches)
        return
    rows = np.concatenate([*batches, np.zeros(0, np.int64)])
    most = max((len(batch) for batch in batches), default=0)
    with closing(_decoded(images, rows, most, threads or num_threads())) as decoded:
        for batch in batches:
            found = np.empty((len(batch), *images.shape[1:]), np.uint8)
            for number in range(len(batch)):
                found[number] = next(decoded)
            yield found


def num_threads() -> int:
    """Number of threads that decode."""
    return min(MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _decoded(
    images: Resized, rows: Int[np.ndarray, "m"], batch_size: int, threads: int
) -> Generator[UInt8[np.ndarray, "h w 3"], None, None]:
    """Yields the images at `rows`, decoded ahead in threads."""
    if not len(rows):
        return
    with root_handlers_kept():
        import grain  # takes two seconds

    ahead = max(threads, min(AHEAD * batch_size, AHEAD_BYTES // math.prod(images.shape[1:])))
    # A thread takes a few images at a time: Grain's time for an element grows with the elements that wait, from 0.1 ms
    # for 16 of them to 21 ms for 4,096 (grain 0.2.18).
    size = max(1, ahead // max(2 * threads, ELEMENTS_AHEAD))
    groups = np.split(rows, range(size, len(rows), size))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=-(-ahead // size))

    def read(number: int) -> list[UInt8[np.ndarray, "h w 3"]]:
        return [images.image(int(row)) for row in groups[number]]

    reading = iter(grain.MapDataset.range(len(groups)).map(read).to_iter_dataset(options))
    try:
        for group in reading:
            yield from group
    except ImageError as error:
        error.__notes__ = []  # Grain's, on its own frames
        raise
    finally:
        reading.close()


def batch_reader(
    images: Images, batches_of: Callable[[int], Sequence[Int[np.ndarray, "m"]]]
) -> Callable[[int, int], UInt8[np.ndarray, "m h w 3"]]:
    """Makes a function `(epoch, step) -> images` of a batch, which decodes the following steps of the epoch ahead.

    Args:
      images: the images of a split.
      batches_of: `epoch -> rows of each step`.
    """
    if not isinstance(images, Resized):
        return lambda epoch, step: images[batches_of(epoch)[step]]
    ahead: Any = iter(())
    following = (-1, -1)

    def read(epoch: int, step: int) -> UInt8[np.ndarray, "m h w 3"]:
        nonlocal ahead, following
        if (epoch, step) != following:
            ahead = read_batches(images.of_epoch(epoch), batches_of(epoch)[step:])
        following = epoch, step + 1
        found: UInt8[np.ndarray, "m h w 3"] = next(ahead)
        return found

    return read
