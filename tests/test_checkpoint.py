"""Checkpoints: the same bits back, only the newest kept, damage noticed."""

import jax
import numpy as np
import pytest

from cifar_jax.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from cifar_jax.errors import UserError
from cifar_jax.head import init_head


@pytest.fixture
def head():
    return {"head": init_head(jax.random.key(0), 16, (8,), 4)}


def test_gives_the_same_bits_back(tmp_path, head):
    save_checkpoint(tmp_path, 1, head)
    like = jax.eval_shape(lambda: head)
    restored = load_checkpoint(tmp_path, like)
    assert jax.tree.structure(restored) == jax.tree.structure(head)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(head), strict=True):
        np.testing.assert_array_equal(x, y)


def test_newest_replaces_the_older_and_itself(tmp_path, head):
    for epoch in (1, 2, 2, 10):
        save_checkpoint(tmp_path, epoch, head)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["0010"]
    assert [path.name for path in tmp_path.iterdir()] == ["0010"]


def test_a_flipped_bit_in_the_arrays_is_noticed(tmp_path, head):
    target = save_checkpoint(tmp_path, 1, head)
    payload = max((path for path in target.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(payload.read_bytes())
    content[len(content) // 2] ^= 0x10
    payload.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged|cannot be read"):
        load_checkpoint(tmp_path, head)


def test_a_network_of_another_shape_is_refused(tmp_path, head):
    save_checkpoint(tmp_path, 1, head)
    with pytest.raises(UserError, match="another network"):
        load_checkpoint(tmp_path, {"head": init_head(jax.random.key(0), 16, (9,), 4)})


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path, {})


def test_other_epochs_stay_where_they_are_asked_for_and_parts_are_read_alone(tmp_path, head):
    for epoch in (1, 2, 3):
        save_checkpoint(tmp_path, epoch, head | {"more": {"epoch": np.int32(epoch) * np.ones(2, np.int32)}}, keep=[1])
    assert [path.name for path in list_checkpoints(tmp_path)] == ["0001", "0003"]
    like = jax.eval_shape(lambda: {"more": {"epoch": np.ones(2, np.int32)}})
    assert load_checkpoint(tmp_path, like)["more"]["epoch"][0] == 3
    assert load_checkpoint(tmp_path, like, epoch=1)["more"]["epoch"][0] == 1
    assert set(load_checkpoint(tmp_path, head)) == {"head"}
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path, like, epoch=2)
    with pytest.raises(UserError, match="holds no other"):
        load_checkpoint(tmp_path, {"other": head["head"]})
