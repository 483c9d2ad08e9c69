"""Tests of closed, full and missing standard streams: training completes, other commands stop with an exit code."""

import io
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, TESTS, TINY, tiny_run
from PIL import Image

from cifar_jax.cli.stdio import Output, OutputLost


def ended(arguments, stdout="pipe", stderr="pipe"):
    """Runs a command with one stream lost and returns its exit code and the output of the other one.

    A stream is a `pipe` with a reader, a pipe `closed` before the first line, `full`, or `missing`.
    """
    reader, closed = os.pipe()
    os.close(reader)
    usual = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    with open("/dev/full", "wb") as full:
        kinds = {"pipe": subprocess.PIPE, "closed": closed, "full": full, "missing": None}
        streams = {"stdout": kinds[stdout], "stderr": kinds[stderr]}
        closing = f"exec {'>&-' if stdout == 'missing' else ''} {'2>&-' if stderr == 'missing' else ''}"
        command = ["bash", "-c", f'{closing} "$@"', "bash", sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=usual, text=True, **streams)
    os.close(closed)
    return done.returncode, (done.stdout if stdout == "pipe" else done.stderr) or ""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        ({"stdout": "closed"}, 0, ""),
        ({"stdout": "full"}, 1, "Error: Standard output could not be written (No space left on device)"),
        ({"stdout": "missing"}, 0, ""),
        ({"stderr": "full"}, 0, ""),
        ({"stderr": "closed"}, 0, ""),
        ({"stderr": "missing"}, 0, ""),
    ],
)
def test_training_completes_with_lost_streams(tmp_path, cache, streams, code, said):
    out = tmp_path / "run"
    train = [TESTS / "narrow_train.py", *TINY, "--epochs", "2", "--cache-dir", cache, "--out", out]
    ended_with, other = ended(train, **streams)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["status"], summary["epochs"]) == ("complete", 2) and (out / "confusion.png").exists()
    assert ended_with == code, other
    if "stderr" in streams:
        assert other.startswith("data ") and "IMAGE..." in other.splitlines()[-1] and "Warning" not in other
    else:
        lines = [line for line in other.splitlines() if not line.startswith("The features come from the cache")]
        warning, *lines = lines
        assert warning.startswith("Warning: --weights random-w16") and len(lines) == bool(said), other
        assert "".join(lines).startswith(said)


@pytest.mark.parametrize("what", ["info", "predict", "train --help"])
@pytest.mark.parametrize(("kind", "code", "lines"), [("closed", 141, 0), ("full", 1, 1)])
def test_other_commands_stop_when_stdout_is_lost(tmp_path, tmp_path_factory, what, kind, code, lines):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "picture.png")
    more = [tiny_run(tmp_path_factory).path, tmp_path / "picture.png"] if what == "predict" else []
    start = "import pytest, helpers; from cifar_jax.cli.main import run; "
    start += "helpers.narrow_networks(pytest.MonkeyPatch()); run()"
    start = f"import sys; sys.path.append({str(TESTS)!r}); {start}"
    ended_with, errors = ended(["-c", start, *what.split(), *more], stdout=kind)
    assert ended_with == code and len(errors.splitlines()) == lines, errors
    assert errors.startswith("Error: Standard output could not be written" if lines else "")


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
