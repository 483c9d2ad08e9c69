"""Tests of compiled functions on disk: reuse, repair of truncated entries, the size limit."""

import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, command, files_below

from cifar_jax.runtime.caches import clear
from cifar_jax.runtime.compile_cache import MAX_BYTES, use_compile_cache

pytestmark = pytest.mark.usefixtures("own_compile_cache")


@pytest.fixture
def events():
    """Counts cache hits and misses of compiled functions."""
    counts = {"hits": 0, "misses": 0}

    def listen(event, **_):
        name = event.rpartition("cache_")[2]
        if name in counts:
            counts[name] += 1

    jax.monitoring.register_event_listener(listen)
    yield counts
    jax.monitoring.unregister_event_listener(listen)


def compile_afresh():
    """Compiles a function that this process has no memory of; returns what it computes."""
    jax.clear_caches()
    return np.asarray(jax.jit(lambda x: jnp.sin(x) @ x.T)(np.arange(6, dtype=np.float32).reshape(2, 3)))


def entries(cache_dir):
    return sorted((cache_dir / "xla").glob("*-cache"))


def age(cache_dir, seconds):
    """Sets the times of all entries back by so many seconds."""
    for path in (cache_dir / "xla").iterdir():
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def test_compiled_functions_are_cached_until_cleared(tmp_path, events):
    use_compile_cache(str(tmp_path))
    first = compile_afresh()
    num = len(entries(tmp_path))
    assert events == {"hits": 0, "misses": num} and num > 0
    np.testing.assert_array_equal(compile_afresh(), first)
    assert events == {"hits": num, "misses": num}
    assert (tmp_path / "xla").stat().st_mode & 0o777 == 0o700
    use_compile_cache(str(tmp_path / "another"))
    compile_afresh()
    assert len(entries(tmp_path / "another")) == num
    assert clear(tmp_path) > 0 and files_below(tmp_path / "xla") == []


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_truncated_entry_is_removed_and_written_again(tmp_path, events, log_messages, size):
    """JAX alone would warn of it at each start; a warning is an error here."""
    use_compile_cache(str(tmp_path))
    expected = compile_afresh()
    whole = {path: path.read_bytes() for path in entries(tmp_path)}
    age(tmp_path, 1000)
    use_compile_cache(str(tmp_path))  # logs nothing about whole entries
    cut = next(iter(whole))
    cut.write_bytes(whole[cut][:size])
    assert log_messages == []
    use_compile_cache(str(tmp_path))
    assert len(log_messages) == 1 and log_messages[0].startswith("Removed 1 truncated compiled functions from ")
    events.update(hits=0, misses=0)
    np.testing.assert_array_equal(compile_afresh(), expected)
    assert events == {"hits": len(whole) - 1, "misses": 1} and entries(tmp_path) == sorted(whole)
    use_compile_cache(str(tmp_path))
    assert len(log_messages) == 1


def test_only_entries_written_since_the_last_check_are_read(tmp_path, log_messages):
    use_compile_cache(str(tmp_path))
    old, new = (tmp_path / "xla" / f"jit_{name}-{'0' * 64}-cache" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(zlib.compress(bytes(1000))[:-1])
    age(tmp_path, 1000)
    use_compile_cache(str(tmp_path))
    assert entries(tmp_path) == []  # they are as old as the last start
    old.write_bytes(b"cut")
    os.utime(old, (0, 0))
    new.write_bytes(b"cut")
    use_compile_cache(str(tmp_path))
    assert entries(tmp_path) == [old]


def test_least_recently_used_entries_above_the_limit_are_removed(tmp_path):
    use_compile_cache(str(tmp_path))
    paths = [tmp_path / "xla" / f"jit_f{number}-{'0' * 64}-cache" for number in range(4)]
    for number, path in enumerate(paths):
        path.touch()
        os.truncate(path, MAX_BYTES // 3)  # of holes
        os.utime(path, (number, number))
    os.utime(paths[0], (100, 0))  # it was read since
    use_compile_cache(str(tmp_path))
    assert entries(tmp_path) == [paths[0], *paths[2:]]


def test_unusable_directory_is_logged_once_and_left_unchanged(tmp_path, log_messages):
    (tmp_path / "file").write_text("notes")
    use_compile_cache(str(tmp_path / "file"))
    (tmp_path / "open" / "xla").mkdir(parents=True)
    (tmp_path / "open" / "xla").chmod(0o777)
    use_compile_cache(str(tmp_path / "open"))
    compile_afresh()
    assert len(log_messages) == 2 and all("Cannot save compiled functions in" in text for text in log_messages)
    assert "others can write there" in log_messages[1] and files_below(tmp_path / "open") == ["xla"]


@pytest.mark.slow
def test_second_command_compiles_nothing(tmp_path, capsys, narrow, events):
    arguments = ["train", *TINY, "--epochs", "1", "--cache-dir", tmp_path / "cache"]
    jax.clear_caches()  # functions that earlier tests compiled would not be written
    assert command(capsys, *arguments, "--out", tmp_path / "first").code == 0
    assert events["misses"] > 0
    jax.clear_caches()
    (kept,) = [files_below(tmp_path / "cache" / "xla")]
    assert command(capsys, *arguments, "--out", tmp_path / "second").code == 0
    assert files_below(tmp_path / "cache" / "xla") == kept and events["hits"] > 0


def test_directory_set_in_the_environment_is_left_unchanged(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "theirs")
    use_compile_cache(str(tmp_path / "ours"))
    assert jax.config.jax_compilation_cache_dir is None and files_below(tmp_path) == []


def test_cache_can_be_disabled(tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        use_compile_cache(str(tmp_path))
        compile_afresh()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert entries(tmp_path) == []
