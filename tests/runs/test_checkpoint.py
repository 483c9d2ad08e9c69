"""Checkpoints: the same bits back, only the newest kept, damage noticed and the one before it used."""

import os

import jax
import numpy as np
import pytest
from helpers import flip_bit, full_disk
from safetensors.numpy import load_file

from cifar_jax.errors import RunError, UserError
from cifar_jax.files import read_sealed, write_sealed
from cifar_jax.models.head import init_head
from cifar_jax.runs.checkpoint import (
    Position,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    position_of,
    prune,
    save_checkpoint,
)

ONE, TWO, THREE, TEN = Position(1), Position(2), Position(3), Position(10)


@pytest.fixture
def head():
    return {"params": {"head": init_head(jax.random.key(0), 16, (8,), 4)}}


def test_gives_the_same_bits_back(tmp_path, head):
    save_checkpoint(tmp_path, ONE, head)
    like = jax.eval_shape(lambda: head)
    restored = load_checkpoint(tmp_path, like)
    assert jax.tree.structure(restored) == jax.tree.structure(head)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(head), strict=True):
        np.testing.assert_array_equal(x, y)


def names_of(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_position_is_saved_once_and_others_are_removed_when_told(tmp_path, head):
    for position in (ONE, Position(1, 500), TWO, TWO, Position(2, 20), TEN):
        save_checkpoint(tmp_path, position, head)
    names = ["0001", "0001.000500", "0002", "0002.000020", "0010"]
    assert [path.name for path in list_checkpoints(tmp_path)] == names_of(tmp_path) == names
    prune(tmp_path, keep=[ONE, Position(2, 20), THREE])
    assert names_of(tmp_path) == ["0001", "0002.000020"]
    assert [position_of(tmp_path / name) for name in names_of(tmp_path)] == [ONE, Position(2, 20)]
    prune(tmp_path / "none", keep=[])


@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_a_flipped_bit_in_the_arrays_is_noticed(tmp_path, head, where):
    target = save_checkpoint(tmp_path, ONE, head)
    flip_bit(target / "arrays.safetensors", where)
    with pytest.raises(UserError, match=r"checksum mismatch|cannot be read"):
        load_checkpoint(tmp_path, head)


def test_a_damaged_one_is_said_and_the_one_before_it_used(tmp_path, head, log_messages):
    for position in (ONE, TWO, THREE):
        save_checkpoint(tmp_path, position, head, {"at": position.epoch})
    assert newest_whole(tmp_path) == (THREE, {"at": 3}) and log_messages == []
    (tmp_path / "0003" / "checkpoint.json").write_text("{")
    flip_bit(tmp_path / "0002" / "arrays.safetensors", -1)
    assert newest_whole(tmp_path) == (ONE, {"at": 1})
    assert len(log_messages) == 2 and "0003 cannot be read" in log_messages[0]
    assert "0002 is corrupt: checksum mismatch in params/head/" in log_messages[1]
    payload = tmp_path / "0001" / "arrays.safetensors"
    payload.write_bytes(payload.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"can be used\. Start the run again with --overwrite"):
        newest_whole(tmp_path)
    assert newest_whole(tmp_path / "none") is None


def test_a_network_of_another_shape_is_refused(tmp_path, head):
    save_checkpoint(tmp_path, ONE, head)
    with pytest.raises(UserError, match="another head, backbone or optimiser"):
        load_checkpoint(tmp_path, {"params": {"head": init_head(jax.random.key(0), 16, (9,), 4)}})


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path, {})


def test_the_directory_of_a_run_that_was_removed_is_not_made_again(tmp_path, head):
    with pytest.raises(RunError, match="could not be written"):
        save_checkpoint(tmp_path / "removed" / "checkpoints", ONE, head)
    assert not (tmp_path / "removed").exists()


def test_each_is_found_by_its_position_and_parts_are_read_alone(tmp_path, head):
    for position in (ONE, THREE):
        save_checkpoint(tmp_path, position, head | {"more": {"epoch": np.full(2, position.epoch, np.int32)}})
    like = jax.eval_shape(lambda: {"more": {"epoch": np.ones(2, np.int32)}})
    assert load_checkpoint(tmp_path, like)["more"]["epoch"][0] == 3
    assert load_checkpoint(tmp_path, like, ONE)["more"]["epoch"][0] == 1
    assert set(load_checkpoint(tmp_path, head)) == {"params"}
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path, like, TWO)
    with pytest.raises(UserError, match="has no other/0/bias"):
        load_checkpoint(tmp_path, {"other": head["params"]["head"]})


def test_names_tell_what_a_checkpoint_holds(tmp_path, head):
    target = save_checkpoint(tmp_path, ONE, head | {"step": np.int32(7), "opt_state": ({"trace": np.ones(2)},)})
    assert sorted(path.name for path in target.iterdir()) == ["arrays.safetensors", "checkpoint.json"]
    arrays = load_file(target / "arrays.safetensors")
    assert set(arrays) == {
        *(f"params/head/{layer}/{name}" for layer in (0, 1) for name in ("kernel", "bias")),
        *("opt_state/0/trace", "step"),
    }
    assert arrays["step"].shape == () and arrays["step"] == 7


@pytest.mark.parametrize("name", ["lr[0.1]", "a\\b", "*?", "caf\udce9", "x" * 200])
def test_the_path_may_have_any_name(tmp_path, head, log_messages, name):
    (tmp_path / name).mkdir()
    directory = tmp_path / name / "checkpoints"
    save_checkpoint(directory, ONE, head)
    assert newest_whole(directory) == (ONE, {}) and log_messages == []
    assert jax.tree.all(jax.tree.map(np.array_equal, load_checkpoint(directory, head), head))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_it(tmp_path, head):
    save_checkpoint(tmp_path, ONE, head)
    with full_disk(at=500), pytest.raises(RunError, match=r"0002 could not be written .*Free some space"):
        save_checkpoint(tmp_path, TWO, head)
    assert names_of(tmp_path) == ["0001"]


def test_what_does_not_read_back_is_not_kept(tmp_path, head, monkeypatch):
    """A disk that changes what is written: the checkpoint before it stays."""
    save_checkpoint(tmp_path, ONE, head)

    def flush_badly(descriptor):
        (arrays,) = tmp_path.glob(".0002.*/*/arrays.safetensors")
        if os.path.samestat(os.fstat(descriptor), arrays.stat()):
            flip_bit(arrays, -1)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", flush_badly)
        with pytest.raises(RunError, match=r"0002 could not be written .*checksum mismatch"):
            save_checkpoint(tmp_path, TWO, head)
    assert names_of(tmp_path) == ["0001"]


def test_an_older_format_is_refused(tmp_path, head, log_messages):
    target = save_checkpoint(tmp_path, ONE, head)
    about = read_sealed(target / "checkpoint.json")
    write_sealed(target / "checkpoint.json", about | {"format": 3})
    for read in (lambda: load_checkpoint(tmp_path, head), lambda: newest_whole(tmp_path)):
        with pytest.raises(UserError, match=r"written by another version of this program\. Train again"):
            read()
    assert log_messages == []
