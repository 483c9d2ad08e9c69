"""The command line: what each command shows, and one sentence and an exit code for whatever is typed wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import NARROW, TINY, command, files_below, is_one_error, tiny_run
from PIL import Image

import cifar_jax
from cifar_jax import job
from cifar_jax.checkpoint import load_checkpoint
from cifar_jax.cli import main
from cifar_jax.errors import UserError
from cifar_jax.head import init_head
from cifar_jax.pretrained import UNTRAINED, registry

ROOT = Path(cifar_jax.__file__).parent.parent


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory).path


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# What is typed wrong


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("--epochs 0", ["--epochs 0 cannot be", "at least 1"]),
        ("--epochs four", ["--epochs", "'four'"]),
        ("--epochs 1.5", ["--epochs", "'1.5'"]),
        ("--epochs", ["--epochs", "Missing value"]),
        ("--batch-size 0", ["--batch-size 0 cannot be"]),
        ("--batch-size -3", ["--batch-size -3 cannot be"]),
        ("--batch-size 129", ["--batch-size 129 is more than the 128 training images"]),
        ("--batch-size 128 --val-fraction 0.5", ["--batch-size 128 is more than the 64 training images"]),
        ("--learning-rate 0", ["--learning-rate 0.0 cannot be", "a positive number"]),
        ("--learning-rate -0.1", ["--learning-rate -0.1 cannot be"]),
        ("--learning-rate nan", ["--learning-rate nan cannot be"]),
        ("--learning-rate inf", ["--learning-rate inf cannot be"]),
        ("--learning-rate 1e999", ["--learning-rate inf cannot be"]),
        ("--momentum 1", ["--momentum 1.0 cannot be", "below 1"]),
        ("--momentum -0.5", ["--momentum -0.5 cannot be"]),
        ("--momentum nan", ["--momentum nan cannot be"]),
        ("--seed -1", ["--seed -1 cannot be"]),
        ("--seed 2147483648", ["--seed 2147483648 cannot be"]),
        ("--val-fraction 1", ["--val-fraction 1.0 cannot be"]),
        ("--val-fraction -0.1", ["--val-fraction -0.1 cannot be"]),
        ("--val-fraction 1e-9", ["--val-fraction 1e-09 of 128 training images holds out 0"]),
        ("--val-fraction 0.999", ["--val-fraction 0.999 of 128 training images holds out 128"]),
        ("--hidden 0", ["--hidden 0 cannot be"]),
        ("--hidden 16 -4", ["--hidden 16 -4 cannot be"]),
        ("--hidden wide", ["--hidden", "wide"]),
        ("--image-size 100", ["--image-size 100 cannot be", "a multiple of 32"]),
        ("--image-size 0", ["--image-size 0 cannot be"]),
        ("--image-size -32", ["--image-size -32 cannot be"]),
        ("--image-size 1024000000", ["--image-size 1024000000 cannot be", "at most 4096"]),
        ("--hidden 99999999", ["--hidden 99999999 cannot be"]),
        ("--train-examples 1000001", ["--train-examples 1000001 is more than the 1000000 images that are drawn"]),
        ("--train-examples 0", ["--train-examples 0 cannot be"]),
        ("--test-examples -1", ["--test-examples -1 cannot be"]),
        ("--extract-batch-size 0", ["--extract-batch-size 0 cannot be"]),
        ("--mode eager", ["--mode", "'eager'", "'cached', 'live'"]),
        ("--precision float16", ["--precision", "'float16'", "'float32', 'bfloat16'"]),
        ("--preset imagenet", ["--preset 'imagenet' is not known", "cifar10, demo"]),
        ("--preset=", ["--preset '' is not known"]),
        ("--preset", ["--preset", "Missing value"]),
        ("--learning_rate", ["Missing value"]),
        ("--lr 0.1", ["--lr"]),
        ("--epoch 3", ["--epoch"]),
        ("--no-progress=maybe", ["maybe"]),
        ("stray words", ["stray", "words"]),
    ],
)
def test_options_that_cannot_be(tmp_path, capsys, typed, parts):
    out = tmp_path / "out"
    result = command(capsys, "train", *TINY, "--out", out, "--cache-dir", tmp_path / "cache", *typed.split())
    is_one_error(result, 2, *parts)
    assert result.out == "" and written_below(tmp_path) == []


def written_below(directory):
    """Every file and directory but what was compiled on the way, which is kept whatever becomes of a command."""
    return [name for name in files_below(directory) if not re.match(r"cache(/xla(/|$)|$)", name)]


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        (["trian"], ["There is no command 'trian'", "train, evaluate, predict, features, info"]),
        (["--epochs", "3"], ["There is no command '--epochs'"]),
        ([""], ["There is no command ''"]),
        (["evaluate"], ["Missing", "the run directory"]),
        (["predict"], ["Missing", "the run directory"]),
        (["predict", "run"], ["predict needs images"]),
        (["evaluate", "run", "another"], ["another"]),
        (["info", "--verbose"], ["--verbose"]),
    ],
)
def test_commands_that_cannot_be(capsys, typed, parts):
    is_one_error(command(capsys, *typed), 2, *parts)


def test_no_command_shows_how_it_is_used(capsys):
    result = command(capsys)
    assert result.code == 2 and result.out == "" and result.err.startswith("usage: python -m cifar_jax COMMAND")
    assert command(capsys, "--help") == (0, result.err, "")


def test_a_strange_file_name_keeps_the_error_on_one_line(tmp_path, capsys):
    name = tmp_path / "two\nlines\r.txt"
    name.write_text("a file")
    is_one_error(command(capsys, "train", *TINY, "--out", name), 2, "is a file; choose a directory")


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(UserError, match="--epochs 0 cannot be"):
        main(["train", *TINY, "--epochs", "0", "--debug"])
    main(["info"])  # without it, NaNs are not looked for any more
    assert not jax.config.jax_debug_nans


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (KeyboardInterrupt(), 130, ["Interrupted; nothing was written."]),
        (MemoryError(), 1, ["Error: The memory is full", "--extract-batch-size"]),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nmore"),
            1,
            ["Error: The memory is full", "allocating 7 bytes"],
        ),
    ],
)
def test_what_may_happen_before_a_run_begins(tmp_path, capsys, monkeypatch, error, code, parts):
    def fail(*_):
        raise error

    monkeypatch.setattr(job, "load_problem", fail)
    result = command(capsys, "train", *TINY, "--out", tmp_path / "out")
    assert result.code == code and len(result.err.splitlines()) == 1, result
    assert all(part in result.err for part in parts) and not (tmp_path / "out").exists()


def test_an_error_of_the_program_is_not_hidden(monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(job, "load_problem", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        main(["train", *TINY])


# ---------------------------------------------------------------------------------------------------------------------
# What the commands show


def test_training_shows_plain_lines_where_there_is_no_terminal(tmp_path_factory):
    run, (code, out, err) = tiny_run(tmp_path_factory)
    assert code == 0
    assert "\x1b" not in out + err and "\r" not in out + err and "━" not in out + err
    epochs = re.findall(r"^epoch (\d)/2  train_loss [\d.]+  train_accuracy [\d.]+  val_loss", out, re.MULTILINE)
    assert epochs == ["1", "2"]
    assert out.count(str(run)) == 4 and f"python -m cifar_jax predict {run} IMAGE..." in out
    assert err.startswith("Warning: --weights random-w16 is an UNTRAINED network") and err.count("\n") == 1


def test_evaluate_gives_what_training_gave(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    result = command(capsys, "evaluate", run, "--json")
    scores = json.loads(result.out)
    assert result.code == 0 and result.err == "" and scores["num_test"] == 20
    assert scores["test_accuracy"] == summary["val_accuracy"]
    assert scores["test_loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    plain = command(capsys, "evaluate", run)
    assert re.search(rf"^test_accuracy +{scores['test_accuracy']}$", plain.out, re.MULTILINE)


@pytest.mark.parametrize("direct", [[], ["--direct"]])
def test_predict_names_the_likeliest_classes(run, capsys, picture, direct):
    result = command(capsys, "predict", run, picture, run / "curves.png", "--json", *direct)
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 0 and [line["path"] for line in lines] == [str(picture), str(run / "curves.png")]
    names = json.loads((run / "summary.json").read_text())["dataset"]["class_names"]
    for line in lines:
        probs = list(line["top"].values())
        assert len(probs) == 3 and set(line["top"]) <= set(names)
        assert probs == sorted(probs, reverse=True) and 0 < sum(probs) <= 1
    plain = command(capsys, "predict", run, picture, *direct).out
    likeliest = max(lines[0]["top"], key=lines[0]["top"].get)
    assert plain.startswith(f"{picture}  {likeliest} {lines[0]['top'][likeliest]:.3f}  ")


def test_predict_sees_the_upright_picture(run, capsys, tmp_path, picture):
    """A photograph that is stored turned gives the very probabilities of the upright one."""
    turned = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(picture) as upright:
        upright.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    one, other = (json.loads(command(capsys, "predict", run, path, "--json").out)["top"] for path in (picture, turned))
    assert one == other


def test_predict_prints_names_that_are_no_text(run, capsys, tmp_path, picture):
    strange = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png")
    shutil.copy(picture, strange)
    result = command(capsys, "predict", run, strange)
    assert result.code == 0 and r"caf\udce9.png  " in result.out


def test_info_names_all_that_is_known(run, capsys, tmp_path):
    about = json.loads(command(capsys, "info", "--json", "--data-dir", tmp_path, "--cache-dir", tmp_path).out)
    assert [row["name"] for row in about["weights"]] == [*registry.entries(), *UNTRAINED]
    shipped = str(registry.weights_dir() / "demo-resnet50-w16.safetensors")
    assert [row["local copy"] for row in about["weights"]] == [
        *(shipped if entry.url is None else "none" for entry in registry.entries().values()),
        *("made when needed" for _ in UNTRAINED),
    ]
    assert about["data"]["data sets"] == f"none in {tmp_path}"
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    (tmp_path / "cifar10" / "3.0.2" / "dataset_info.json").touch()
    result = command(capsys, "info", "--data-dir", tmp_path)
    assert result.code == 0 and f"cifar10 3.0.2 in {tmp_path}" in result.out and "\x1b" not in result.out
    for entry in registry.entries().values():
        assert re.search(rf"^{entry.name}\t.*{entry.digest}", result.out, re.MULTILINE)


def test_info_devices_names_each_and_which_train(capsys):
    (row,) = json.loads(command(capsys, "info", "devices", "--json").out)["devices"]
    assert (row["platform"], row["process"], row["training"]) == ("cpu", "0", "yes")
    assert command(capsys, "info", "devices").out.splitlines()[0].split("\t")[:3] == ["device", "platform", "kind"]


# ---------------------------------------------------------------------------------------------------------------------
# In a process of its own


def environment(tmp_path):
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    return os.environ | {"PYTHONPATH": path, "CIFAR_JAX_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}


def test_the_script_runs_from_anywhere_and_imports_no_more_than_it_must(tmp_path):
    check = "import sys, cifar_jax, cifar_jax.cli; print({'tensorflow', 'matplotlib', 'torch'} & set(sys.modules))"
    commands = [[sys.executable, ROOT / "train.py", "--help"], [sys.executable, "-c", check]]
    ascii_only = environment(tmp_path) | {"PYTHONIOENCODING": "ascii"}
    shown = [subprocess.run(c, cwd=tmp_path, env=ascii_only, capture_output=True, text=True) for c in commands]
    assert [one.returncode for one in shown] == [0, 0] and [one.stderr for one in shown] == ["", ""]
    assert all(option in shown[0].stdout for option in ("--preset", "--weights", "--no-shuffle", "--val-fraction"))
    assert shown[1].stdout == "set()\n"
    assert files_below(tmp_path) == []


def test_ctrl_c_ends_a_live_run_cleanly(tmp_path):
    out = tmp_path / "out"
    start = "import pytest, helpers, cifar_jax.cli; helpers.narrow_networks(pytest.MonkeyPatch()); cifar_jax.cli.run()"
    # An epoch of a second or so, in whose midst the signal comes.
    live = ["--mode", "live", "--train-examples", "2000", "--batch-size", "2", "--epochs", "1000", "--out", out]
    with subprocess.Popen(
        [sys.executable, "-c", start, "train", *TINY, *live],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch "):
                process.send_signal(signal.SIGINT)
        code, err = process.wait(), process.stderr.read()
    assert code == 130, err
    assert err.splitlines()[-1].startswith("Interrupted after ") and "Traceback" not in err
    summary = json.loads((out / "summary.json").read_text())
    epochs = len((out / "metrics.jsonl").read_text().splitlines())
    assert summary["status"] == "interrupted" and summary["epochs"] == epochs >= 1
    assert re.search(rf"^Interrupted after {epochs} epochs?( and \d+ steps?)? of 1000 epochs;", err, re.MULTILINE)
    assert f"Continue with the same command and --resume --out {out}." in err
    like = {"params": {"head": jax.eval_shape(lambda: init_head(jax.random.key(0), NARROW.features, (8,), 10))}}
    assert np.isfinite(load_checkpoint(out / "checkpoints", like)["params"]["head"][0]["kernel"]).all()
    assert not [path for path in files_below(out) if Path(path).name.startswith(".")]
