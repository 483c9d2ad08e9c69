"""What holds for any data: metrics and their definition, cache keys, positions, what a checkpoint keeps of progress."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import NARROW
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays

from cifar_jax.data import Dataset
from cifar_jax.features.cache import features_key
from cifar_jax.files import read_sealed, write_sealed
from cifar_jax.pretrained import random_backbone
from cifar_jax.runs.checkpoint import Position, position_of
from cifar_jax.runs.resume import Progress, RateChange
from cifar_jax.runtime.progress import EpochRow
from cifar_jax.train.evaluate import eval_step, evaluate
from cifar_jax.train.loop import EpochPart
from cifar_jax.train.step import StepMetrics

FAST = settings(max_examples=40, deadline=None)
IDENTITY = {"head": ({"kernel": jnp.eye(4), "bias": jnp.zeros(4)},)}  # of one layer, whose logits are its features

# Of few sizes, as JAX compiles a step anew for each.
logits = st.sampled_from([1, 5, 17]).flatmap(
    lambda num: arrays.arrays(np.float32, (num, 4), elements=st.floats(-50, 50, width=32, allow_subnormal=False))
)


@FAST
@given(logits, st.data(), st.sampled_from([1, 4, 64]))
def test_metrics_are_what_they_are_defined_as(values, data, batch_size):
    labels = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values))), np.int32)
    result = evaluate(eval_step, IDENTITY, values, labels, batch_size)
    wide = values.astype(np.float64)
    shifted = wide - wide.max(1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    predicted = values.argmax(1)
    assert result.num == len(labels) == result.confusion.sum()
    assert result.accuracy == (predicted == labels).mean() == np.trace(result.confusion) / len(labels)
    assert result.loss == pytest.approx(-log_probs[np.arange(len(labels)), labels].mean(), rel=1e-4, abs=1e-5)
    for label in range(4):
        of_class = predicted[labels == label]
        assert (result.confusion[label] == np.bincount(of_class, minlength=4)).all()
        assert result.class_accuracy[label] == pytest.approx((of_class == label).mean()) if len(of_class) else True


@pytest.fixture(scope="module")
def backbone(shapes):
    return random_backbone(jax.random.key(0), shapes.images[:64], NARROW, 32)


@FAST
@given(
    st.integers(0, 3 * 32 * 32 * 3 - 1),
    st.integers(0, 7),
    st.sampled_from([32, 64]),
    st.sampled_from(["float16", "float32"]),
)
def test_a_key_is_another_where_one_bit_of_the_images_is(backbone, shapes, position, bit, image_size, dtype):
    def key_of(images):
        digest = Dataset(images, shapes.labels[:3]).digests().images
        return features_key(backbone, image_size, "float32", digest, dtype)

    images = shapes.images[:3].copy()
    key = key_of(images)
    assert key == key_of(np.asfortranarray(images))
    images.reshape(-1)[position] ^= 1 << bit
    changed = key_of(images)
    assert changed != key
    images.reshape(-1)[position] ^= 1 << bit
    assert key_of(images) == key


@FAST
@given(st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 999_999)), min_size=1))
def test_names_of_positions_sort_as_they_do(pairs):
    positions = [Position(*pair) for pair in pairs]
    assert [position_of(Path("checkpoints") / position.name) for position in positions] == positions
    by_name = sorted(positions, key=lambda position: position.name)
    assert by_name == sorted(positions)


numbers = st.floats(width=32)
rows = st.builds(EpochRow, st.integers(1, 99), numbers, numbers, numbers, numbers, st.floats(0, 1e6))
parts = st.integers(1, 5).flatmap(
    lambda steps: st.builds(
        EpochPart,
        st.builds(
            StepMetrics,
            arrays.arrays(np.float32, steps, elements=numbers),
            arrays.arrays(np.int32, steps),
            arrays.arrays(np.int32, steps),
            arrays.arrays(np.bool_, steps),
        ),
        st.floats(0, 1e6),
    )
)
rates = st.floats(0, 1e30)
progresses = st.builds(
    Progress,
    st.builds(Position, st.integers(0, 99), st.integers(0, 999)),
    st.lists(rows, max_size=3).map(tuple),
    st.none() | parts,
    st.lists(st.builds(RateChange, st.integers(1, 99), st.integers(1, 999), rates, st.none() | rates)).map(tuple),
)


@FAST
@given(progresses)
def test_what_a_checkpoint_keeps_of_progress_comes_back_to_the_bit(tmp_path_factory, progress):
    path = tmp_path_factory.mktemp("progress") / "progress.json"
    write_sealed(path, progress.to_json())
    found = Progress.from_json(read_sealed(path))
    assert (found.position, found.rates) == (progress.position, progress.rates)
    assert json.dumps([row._asdict() for row in found.rows]) == json.dumps([row._asdict() for row in progress.rows])
    assert (found.part is None) == (progress.part is None)
    if found.part and progress.part:
        assert found.part.seconds == progress.part.seconds
        for ours, theirs in zip(found.part.metrics, progress.part.metrics, strict=True):
            np.testing.assert_array_equal(ours, theirs, strict=True)
