"""Tests of closed, full and missing standard streams: training completes, other commands stop with an exit code."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, TESTS, TINY, Result, tiny_run
from PIL import Image

from cifar_jax.cli.main import main
from cifar_jax.cli.stdio import Output, OutputLost

CANNOT_WRITE = "Error: Standard output could not be written (No space left on device)"


@contextlib.contextmanager
def lost_stream(kind):
    """Yields a text stream on a pipe without a reader, or on a full disk."""
    if kind == "full":
        writer = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = os.pipe()
        os.close(reader)
    with open(writer, "w") as stream:
        yield stream


def run_with(capsys, name, kind, *arguments):
    """Runs a command in this process with one stream lost."""
    capsys.readouterr()
    with lost_stream(kind) as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, name, stream)
        code = main(list(map(str, arguments)))
    return Result(code, *capsys.readouterr())


def is_complete(run):
    summary = json.loads((run / "summary.json").read_text())
    return (summary["status"], summary["epochs"]) == ("complete", 2)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory).path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("name", "kind", "code"),
    [("stdout", "closed", 0), ("stdout", "full", 1), ("stderr", "closed", 0), ("stderr", "full", 0)],
)
def test_training_completes_with_lost_streams(tmp_path, cache, capsys, narrow, name, kind, code):
    out = tmp_path / "run"
    result = run_with(capsys, name, kind, "train", *TINY, "--epochs", "2", "--cache-dir", cache, "--out", out)
    assert result.code == code and is_complete(out)
    if name == "stderr":
        assert result.out.startswith("data ") and "PICTURE..." in result.out.splitlines()[-1]
        assert "Warning" not in result.out
    else:
        warning, *lines = [line for line in result.err.splitlines() if "come from the cache" not in line]
        assert warning.startswith("Warning: --weights random-w16") and len(lines) == code, result
        assert "".join(lines).startswith(CANNOT_WRITE if code else "")


@pytest.mark.parametrize("what", ["info", "predict", "train --help"])
@pytest.mark.parametrize(("kind", "code", "error"), [("closed", 141, ""), ("full", 1, CANNOT_WRITE)])
def test_other_commands_stop_when_stdout_is_lost(tmp_path, run, capsys, narrow, what, kind, code, error):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "picture.png")
    more = [run, tmp_path / "picture.png"] if what == "predict" else []
    result = run_with(capsys, "stdout", kind, *what.split(), *more)
    assert result.code == code and len(result.err.splitlines()) == bool(error), result
    assert result.err.startswith(error)


def in_process(redirections, *arguments):
    """Runs a command in a process whose streams bash redirects."""
    usual = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    command = ["bash", "-c", f'"$@" {redirections}', "bash", sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=usual, text=True, capture_output=True)


@pytest.mark.parametrize(
    ("redirections", "code", "error"),
    [("> /dev/full", 1, CANNOT_WRITE), (">&-", 0, ""), ("2>&-", 0, ""), ("| true; exit ${PIPESTATUS[0]}", 141, "")],
)
def test_the_interpreter_has_nothing_to_add_as_it_exits(redirections, code, error):
    done = in_process(redirections, "-m", "cifar_jax", "train", "--help")
    assert done.returncode == code and len(done.stderr.splitlines()) == bool(error), done
    assert done.stderr.startswith(error)


@pytest.mark.slow
@pytest.mark.parametrize("redirections", [">&-", "2>&-"])
def test_training_completes_with_missing_streams(tmp_path, redirections):
    out = tmp_path / "run"
    train = [TESTS / "narrow_train.py", *TINY, "--epochs", "2", "--cache-dir", tmp_path / "cache", "--out", out]
    done = in_process(redirections, *train)
    assert done.returncode == 0 and is_complete(out) and (out / "confusion.png").exists()
    if redirections == "2>&-":
        assert done.stdout.startswith("data ") and "Warning" not in done.stdout
    else:
        assert done.stderr.startswith("Warning: --weights random-w16") and len(done.stderr.splitlines()) == 1


class FullAfterFirstWrite(io.StringIO):
    """A stream that fails from the second write on."""

    def write(self, text):
        if self.tell() and text:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_output_is_discarded_after_a_failed_write():
    stream = FullAfterFirstWrite()
    output = Output(stream)
    print("one", end="", file=output)
    assert output.error is None
    print("two", file=output)
    print("three", file=output)
    output.flush()
    assert stream.getvalue() == "one" and output.error.strerror == "No space left on device"
    with pytest.raises(OutputLost):
        Output(stream, raises=True).write("two")
