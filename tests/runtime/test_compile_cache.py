"""Tests of the compilation cache: reuse, checksums, replacement of corrupt entries, and unusable directories."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, files_below
from jax._src import compilation_cache, monitoring

from cifar_jax.runtime.compile_cache import CheckedCache, use_compile_cache

pytestmark = pytest.mark.usefixtures("own_compile_cache")


@pytest.fixture
def events():
    """Counts of compiled functions read from the cache and written to it."""
    counts = {"hits": 0, "misses": 0}

    def listen(event, **_):
        name = event.rpartition("cache_")[2]
        if name in counts:
            counts[name] += 1

    monitoring.register_event_listener(listen)
    yield counts
    monitoring.unregister_event_listener(listen)


def compile_again():
    """Compiles a function after clearing JAX's in-memory caches, and returns its result."""
    jax.clear_caches()
    return np.asarray(jax.jit(lambda x: jnp.sin(x) @ x.T)(np.arange(6, dtype=np.float32).reshape(2, 3)))


def entries(cache_dir):
    return sorted((cache_dir / "xla").glob("*.xla"))


DAMAGE = {
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "flipped in its digest": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "flipped at its end": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "of another cache": lambda content: content[32:],
}


def test_compiled_functions_are_reused(tmp_path, events):
    use_compile_cache(str(tmp_path))
    first = compile_again()
    assert events["misses"] == len(entries(tmp_path)) > 0 and events["hits"] == 0
    second = compile_again()
    assert events["hits"] == events["misses"] == len(entries(tmp_path))
    np.testing.assert_array_equal(first, second)
    assert not [path for path in files_below(tmp_path) if Path(path).name.startswith(".")]
    assert (tmp_path / "xla").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("how", DAMAGE)
def test_corrupt_entry_is_replaced(tmp_path, events, how):
    """No warning is shown; pytest would make it an error."""
    use_compile_cache(str(tmp_path))
    expected = compile_again()
    whole = {path: path.read_bytes() for path in entries(tmp_path)}
    for path, content in whole.items():
        path.write_bytes(DAMAGE[how](content))
    events.update(hits=0, misses=0)
    np.testing.assert_array_equal(compile_again(), expected)
    assert (events["hits"], events["misses"]) == (0, len(whole)) and entries(tmp_path) == sorted(whole)
    events.update(hits=0, misses=0)
    np.testing.assert_array_equal(compile_again(), expected)
    assert (events["hits"], events["misses"]) == (len(whole), 0)


def test_jax_itself_keeps_a_corrupt_entry(tmp_path):
    """The reason for this project's own cache. If this test fails, it may no longer be needed."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    usual = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    own, compilation_cache.get_file_cache = compilation_cache.get_file_cache, jax_file_cache
    compilation_cache.reset_cache()
    try:
        compile_again()
        for path in tmp_path.glob("*-cache"):
            path.write_bytes(path.read_bytes()[:100])
        for _ in range(2):
            with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
                compile_again()
    finally:
        compilation_cache.get_file_cache = own
        jax.config.update("jax_persistent_cache_min_compile_time_secs", usual)


def jax_file_cache(path):
    from jax._src.lru_cache import LRUCache

    return LRUCache(path, max_size=-1), path


def test_least_recently_used_entries_are_evicted(tmp_path):
    cache = CheckedCache(tmp_path, max_bytes=4 * (32 + 100))
    for number in range(6):
        cache.put(f"key{number}", bytes([number]) * 100)
        os.utime(tmp_path / f"key{number}.xla", (0, number))
        if number == 3:
            assert cache.get("key0") == bytes(100)  # makes it the most recently used one
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"key{number}.xla" for number in (0, 3, 4, 5)]
    cache.put("large", bytes(1000))
    assert cache.get("large") is None and cache.get("key5") == bytes([5]) * 100
    CheckedCache(tmp_path, max_bytes=2 * (32 + 100))
    assert len(list(tmp_path.iterdir())) == 2


def test_unusable_directory_is_logged_once(tmp_path, said):
    (tmp_path / "file").write_text("notes")
    use_compile_cache(str(tmp_path / "file"))
    (tmp_path / "open" / "xla").mkdir(parents=True)
    (tmp_path / "open" / "xla").chmod(0o777)
    use_compile_cache(str(tmp_path / "open"))
    compile_again()
    assert len(said) == 2 and all("Compiled functions cannot be kept in" in text for text in said)
    assert "others can write there" in said[1] and files_below(tmp_path / "open") == ["xla"]


def test_vanished_directory_is_logged_once(tmp_path, said):
    use_compile_cache(str(tmp_path))
    (tmp_path / "xla").rmdir()
    (tmp_path / "xla").write_text("in its place")
    for _ in range(2):
        compile_again()
    assert len(said) == 1 and said[0].startswith(f"Compiled functions cannot be kept in {tmp_path / 'xla'} (")


def test_unsupported_jax_is_logged(tmp_path, monkeypatch, said):
    monkeypatch.delattr(compilation_cache, "get_file_cache")
    use_compile_cache(str(tmp_path))
    assert len(said) == 1 and f"JAX {jax.__version__} takes no cache" in said[0]
    assert jax.config.jax_compilation_cache_dir is None


def test_jax_compilation_cache_dir_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
    use_compile_cache(str(tmp_path / "ours"))
    assert files_below(tmp_path) == [] and jax.config.jax_compilation_cache_dir is None


def test_importing_the_library_sets_up_no_cache(tmp_path):
    check = (
        "import sys, jax, cifar_jax, cifar_jax.cli.main\n"
        "print(jax.config.jax_compilation_cache_dir, {'tensorstore', 'orbax'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    shown = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True)
    assert shown.stdout == "None set()\n", shown.stderr
