"""The stream of an extractor: overlap, one compilation, and the same bits whatever is missing."""

import time

import jax
import numpy as np
import pytest
from helpers import NARROW

from cifar_jax.features.extractor import make_extractor, pipelined
from cifar_jax.pretrained import random_backbone


class Device:
    """A device that computes one batch after the other, each in a fixed time, while its caller goes on."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.free_at = seconds, 0.0

    def start(self, batch: np.ndarray) -> "Result":
        self.free_at = max(self.free_at, time.monotonic()) + self.seconds
        return Result(self.free_at, batch)


class Result:
    def __init__(self, ready_at: float, batch: np.ndarray) -> None:
        self.ready_at, self.batch = ready_at, batch

    def copy_to_host_async(self) -> None:
        pass

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        time.sleep(max(0.0, self.ready_at - time.monotonic()))
        return self.batch


def seconds_of(num_batches: int, in_flight: int) -> float:
    """Time that batches take whose preparation and use take most of the time of their computation."""

    def batches():
        for number in range(num_batches):
            time.sleep(0.004)  # read, padded, transferred
            yield number, np.full(2, number)

    device, start = Device(0.01), time.monotonic()
    for number, result in pipelined(device.start, batches(), in_flight):
        assert (result == number).all()
        time.sleep(0.004)  # copied out, written to the cache
    return time.monotonic() - start


def test_the_device_never_waits_for_the_host():
    overlapped, one_by_one = seconds_of(60, in_flight=3), seconds_of(60, in_flight=1)
    assert overlapped < 0.8 * one_by_one  # 10 ms a batch, in place of 18


@pytest.fixture(scope="module")
def backbone(shapes):
    return random_backbone(jax.random.key(0), shapes.images[:64], NARROW, 32)


def test_pieces_have_the_same_bits_whichever_others_there_are(backbone, shapes):
    extractor = make_extractor(backbone, batch_size=16)
    pieces = [slice(0, 40), slice(40, 80), slice(80, 100)]
    whole = dict_of(extractor.stream(shapes.images, pieces))
    for some in ([pieces[1]], [pieces[0], pieces[2]], [pieces[2]]):
        for start, values in dict_of(extractor.stream(shapes.images, some)).items():
            np.testing.assert_array_equal(values, whole[start])
    assert list(whole) == [0, 16, 32, 40, 56, 72, 80, 96] and len(whole[32]) == 8 and len(whole[96]) == 4


def dict_of(stream):
    return {rows.start: values for rows, values in stream}


def test_ragged_numbers_of_images_take_one_compilation(backbone, shapes):
    jax.clear_caches()  # other tests have compiled the same function
    extractor = make_extractor(backbone, batch_size=32)
    assert count_compilations(lambda: [extractor(shapes.images[:num]) for num in (100, 7, 33)]) == 1


def count_compilations(run) -> int:
    counted = []
    jax.monitoring.register_event_duration_secs_listener(
        listener := lambda name, *_, **__: counted.append(name) if name.endswith("backend_compile_duration") else None
    )
    try:
        run()
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    return len(counted)


@pytest.mark.parametrize(
    ("num_images", "batch_size", "expected"), [(None, 8, 8), (3, 8, 4), (None, 20, 16), (None, 4096, 1024)]
)
def test_a_batch_is_no_larger_than_asked_for_or_needed(backbone, num_images, batch_size, expected):
    assert make_extractor(backbone, batch_size=batch_size, num_images=num_images).batch_size == expected
