"""Sentences for the user: the library logs them and prints nothing, a command shows each of them once."""

import logging
import subprocess
import sys

import pytest
from helpers import TINY, command, is_one_error

from cifar_jax.errors import UserError
from cifar_jax.runtime.caches import FEATURES, clear

LIBRARY = logging.getLogger("cifar_jax")


@pytest.fixture
def cache(tmp_path):
    """A cache with a file that it did not write, which is told of when the cache is cleared; named by an adversary."""
    place = tmp_path / "[red]50%s %(name)s {0}\n\x1b[31m" / "cache"
    (place / FEATURES).mkdir(parents=True)
    (place / FEATURES / "notes.txt").touch()
    return place


@pytest.fixture(autouse=True)
def left_alone():
    """Whatever a test does, no handler is left behind and no level changed."""
    before = LIBRARY.level, list(LIBRARY.handlers), LIBRARY.propagate
    yield
    assert (LIBRARY.level, LIBRARY.handlers, LIBRARY.propagate) == before


def test_the_library_logs_and_prints_nothing(cache, caplog, capsys):
    caplog.set_level(logging.INFO, "cifar_jax")
    clear(cache)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("cifar_jax.runtime.caches", "INFO")
    assert record.getMessage().startswith(f"{cache / FEATURES / 'notes.txt'} stays")
    assert tuple(capsys.readouterr()) == ("", "")


@pytest.mark.parametrize("configured", [False, True])
def test_who_imports_it_sees_what_logging_is_told_to_show(tmp_path, configured):
    (tmp_path / FEATURES).mkdir()
    (tmp_path / FEATURES / "notes.txt").touch()
    code = "import logging, pathlib, sys, cifar_jax.runtime.caches as cache\n"
    code += "logging.basicConfig(level=logging.INFO)\n" * configured
    code += "cache.clear(pathlib.Path(sys.argv[1]))\n"
    ran = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert ran.stdout == ""
    if configured:
        assert ran.stderr.startswith(f"INFO:cifar_jax.runtime.caches:{tmp_path}") and ran.stderr.count("\n") == 1
    else:
        assert ran.stderr == ""


def test_a_command_shows_each_sentence_once_however_often_it_runs(tmp_path, capsys, narrow):
    train = ["train", *TINY, "--epochs", "1", "--cache-dir", tmp_path / "cache"]
    shown = [command(capsys, *train, "--out", tmp_path / name) for name in ("first", "second", "third")]
    assert [result.code for result in shown] == [0, 0, 0]
    first, *others = (result.err.splitlines() for result in shown)
    assert len(first) == 1 and first[0].startswith("Warning: --weights random-w16 is an UNTRAINED network")
    for lines in others:
        assert lines[0] == first[0] and len(lines) == 3
        assert all(line.startswith("The features come from the cache, ") for line in lines[1:])


def test_an_error_ends_what_a_command_shows(tmp_path, capsys):
    is_one_error(command(capsys, "evaluate", tmp_path), 2, str(tmp_path))
    with pytest.raises(UserError):
        command(capsys, "evaluate", tmp_path, "--debug")
    LIBRARY.warning("Logged after the command")
    assert capsys.readouterr().err == ""


def test_what_a_name_holds_is_shown_and_does_nothing(cache, capsys):
    result = command(capsys, "info", "cache", "--clear", "--cache-dir", cache)
    (line,) = result.err.splitlines()
    escaped = str(cache).replace("\n", r"\n").replace("\x1b", r"\x1b")
    assert result.code == 0 and line.startswith(f"{escaped}/{FEATURES}/notes.txt stays, as the cache did not write it")


def test_a_level_that_the_caller_chose_silences_no_command_and_stays(cache, capsys):
    LIBRARY.setLevel(logging.ERROR)
    try:
        assert "notes.txt stays" in command(capsys, "info", "cache", "--clear", "--cache-dir", cache).err
        assert LIBRARY.level == logging.ERROR
    finally:
        LIBRARY.setLevel(logging.NOTSET)
