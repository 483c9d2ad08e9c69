"""Tests of console output on a terminal of 80 columns: layout without cut names or numbers, and escaping."""

import io
import logging
import re
import time

import pytest
from rich.console import Console

from cifar_jax.cli.console import ConsoleReporter
from cifar_jax.cli.escape import printable
from cifar_jax.cli.info import collect
from cifar_jax.cli.tables import table_lines, wrapped
from cifar_jax.pretrained import registry
from cifar_jax.runtime.progress import EpochRow

WIDTH = 80
logger = logging.getLogger("cifar_jax.anything")


@pytest.fixture
def terminal():
    """A reporter on a terminal of 80 columns, which captures both streams."""
    terminal = {"force_terminal": True, "width": WIDTH, "color_system": None}
    console = Console(file=io.StringIO(), highlight=False, soft_wrap=True, emoji=False, **terminal)
    return ConsoleReporter(console, console)


def shown(reporter):
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", reporter.out.file.getvalue())
    reporter.out.file.truncate(0)
    return text.splitlines()


def test_info_table_shows_names_and_digests_in_full(terminal, tmp_path):
    rows = collect("weights", cache_dir=str(tmp_path))["weights"]
    terminal.table(rows)
    lines = shown(terminal)
    for row in rows:
        assert row["name"] in lines  # on a line of its own
    text = "\n".join(lines)
    for entry in registry.entries().values():
        assert re.search(rf"digest:\s+{entry.digest}(  |$)", text, re.MULTILINE)
        assert f"MB: {entry.size / 1e6:.1f}" in text
    paths = {row["local copy"] for row in rows}
    assert [line for line in lines if len(line) > WIDTH and not any(path in line for path in paths)] == []


def test_table_falls_back_to_records_when_too_wide():
    rows = [{"name": f"keras-{'x' * n}", "MB": "1.5", "empty": "", "path": f"/{'p' * 20}"} for n in (1, 9)]
    narrow, wide = ([line.plain for line in table_lines(rows, width)] for width in (30, WIDTH))
    assert [line.split() for line in wide] == [
        ["name", "MB", "empty", "path"], *([row["name"], row["MB"], row["path"]] for row in rows)
    ]  # fmt: skip
    assert len({line.index("/") for line in wide[1:]} | {wide[0].index("path")}) == 1
    assert narrow[:3] == ["keras-x", "  MB: 1.5", f"  path: {rows[0]['path']}"]
    assert max(map(len, narrow)) <= 30


def test_header_wraps_values_at_commas_only(terminal):
    seconds = ", ".join(f"phase {n} {n}.{n}" for n in range(12))
    terminal.header({"seconds": seconds, "run": f"/{'x/' * 60}"})
    *lines, path = shown(terminal)
    assert path.endswith("  /" + "x/" * 60)  # left to the terminal to wrap, so that it can be copied
    assert len(lines) > 1 and max(map(len, lines)) <= WIDTH
    assert " ".join(line.removeprefix("seconds").strip() for line in lines) == seconds


def test_wrapped_breaks_long_parts_but_not_commands():
    command = "python -m cifar_jax predict /a/b IMAGE... " * 2
    assert wrapped(command, 30) == [command]
    assert wrapped("one two three four five six seven", 20) == ["one two three four", "five six seven"]


def test_log_lines_wrap_between_words_but_not_in_paths_or_commands(terminal):
    path, command = "/" + "long/" * 20, "`python -m cifar_jax predict runs/first IMAGE...`"
    text = f"The features come from the cache, {path}, which is fine; the next thing to type is this: {command}."
    with terminal.logged():
        logger.info(text)
    lines = shown(terminal)
    assert " ".join(lines) == text and f"{path}," in lines and lines[-1] == f"{command}."
    assert all(len(line) <= WIDTH for line in lines if path not in line)


def test_epochs_are_a_table_with_one_header(terminal):
    for number in (9, 10):
        terminal.epoch(EpochRow(number, 1.23456, 0.5, 2.0, 0.25, 1234.56), 10)
    head, first, second = shown(terminal)
    assert head.split("  ") == ["epoch", "train loss", "accuracy", "val loss", "accuracy", "seconds"]
    assert first.split() == ["9/10", "1.2346", "0.5000", "2.0000", "0.2500", "1234.6"]
    assert len(head) == len(first) == len(second) <= WIDTH


@pytest.mark.parametrize(("compiles", "begins"), [(True, "compiling"), (False, "starting")])
def test_progress_bar_shows_compiling_or_starting_until_first_progress(terminal, compiles, begins):
    def wait_for(*parts):
        """Returns the bar once it shows all parts; it is drawn ten times a second."""
        deadline = time.monotonic() + 10
        while not all(part in (line := terminal.out.file.getvalue().splitlines()[-1]) for part in parts):
            assert time.monotonic() < deadline, line
            time.sleep(0.02)
        return line

    with terminal.progress("Features of training images", 50_000, compiles=compiles) as bar:
        bar(0)
        wait_for("Features of training images", "0/50000", begins)
        bar(64)
        assert begins not in wait_for("64/50000")


def test_log_line_appears_above_the_progress_bar(terminal):
    with terminal.logged(), terminal.progress("Features of training images", 50_000) as bar:
        bar(64)
        logger.info("The cache is corrupt.")
        lines = shown(terminal)
    assert "The cache is corrupt." in lines[:-1] and "Features of training images" in lines[-1]


def test_muted_reporter_prints_nothing(terminal):
    terminal.mute()
    with terminal.logged(), terminal.progress("Features of training images", 50_000) as bar:
        bar(64)
        logger.warning("The cache is corrupt.")
        terminal.header({"run": "runs/first"})
    assert terminal.out.file.getvalue() == ""


def test_control_characters_are_escaped(terminal):
    evil = "cat\x1b[31m\n\x07\x9b\u202edog"
    escaped = r"cat\x1b[31m\n\x07\x9b\u202edog"
    assert printable(evil) == escaped and printable("Käfer 猫 😀 :cat:") == "Käfer 猫 😀 :cat:"
    terminal.header({evil: evil})
    with terminal.logged():
        logger.info(f"{evil} :cat: [red] %s {{}}")
        logger.warning(evil)
    terminal.table([{"name": evil, "other": evil}])
    lines = shown(terminal)
    assert lines[0] == f"{escaped}  {escaped}" and lines[1] == f"{escaped} :cat: [red] %s {{}}"
    assert lines[2] == f"Warning: {escaped}" and lines[-1] == f"{escaped}  {escaped}"
    assert "\x9b" not in terminal.out.file.getvalue()
