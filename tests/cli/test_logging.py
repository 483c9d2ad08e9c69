"""Tests of log messages for the user: the library logs them without printing, and commands print each one once."""

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
    """A cache with a foreign file, which clearing the cache logs, in a path that contains control characters."""
    place = tmp_path / "[red]50%s %(name)s {0}\n\x1b[31m" / "cache"
    (place / FEATURES).mkdir(parents=True)
    (place / FEATURES / "notes.txt").touch()
    return place


@pytest.fixture(autouse=True)
def logging_is_unchanged():
    """Asserts after each test that the logger's level and handlers are as before."""
    before = LIBRARY.level, list(LIBRARY.handlers), LIBRARY.propagate
    yield
    assert (LIBRARY.level, LIBRARY.handlers, LIBRARY.propagate) == before


def test_library_logs_and_does_not_print(cache, caplog, capsys):
    caplog.set_level(logging.INFO, "cifar_jax")
    clear(cache)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("cifar_jax.runtime.caches", "INFO")
    assert record.getMessage().startswith(f"{cache / FEATURES / 'notes.txt'} is kept")
    assert tuple(capsys.readouterr()) == ("", "")


@pytest.mark.parametrize("configured", [False, True])
def test_importers_control_logging(tmp_path, configured):
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


def test_repeated_commands_print_each_log_line_once(tmp_path, capsys, narrow):
    train = ["train", *TINY, "--epochs", "1", "--cache-dir", tmp_path / "cache"]
    shown = [command(capsys, *train, "--out", tmp_path / name) for name in ("first", "second")]
    assert [result.code for result in shown] == [0, 0]
    first, second = (result.err.splitlines() for result in shown)
    assert len(first) == 1 and first[0].startswith("Warning: --weights random-w16 is an UNTRAINED network")
    assert second[0] == first[0] and len(second) == 3
    assert all(line.startswith("The features come from the cache, ") for line in second[1:])


def test_failed_command_removes_its_log_handler(tmp_path, capsys):
    is_one_error(command(capsys, "evaluate", tmp_path), 2, str(tmp_path))
    with pytest.raises(UserError):
        command(capsys, "evaluate", tmp_path, "--debug")
    LIBRARY.warning("Logged after the command")
    assert capsys.readouterr().err == ""


def test_control_characters_and_format_codes_in_paths_are_escaped(cache, capsys):
    result = command(capsys, "info", "cache", "--clear", "--cache-dir", cache)
    (line,) = result.err.splitlines()
    escaped = str(cache).replace("\n", r"\n").replace("\x1b", r"\x1b")
    assert result.code == 0 and line.startswith(f"{escaped}/{FEATURES}/notes.txt is kept: the cache did not write it")


def test_commands_print_logs_whatever_the_callers_level(cache, capsys):
    LIBRARY.setLevel(logging.ERROR)
    try:
        assert "notes.txt is kept" in command(capsys, "info", "cache", "--clear", "--cache-dir", cache).err
        assert LIBRARY.level == logging.ERROR
    finally:
        LIBRARY.setLevel(logging.NOTSET)
