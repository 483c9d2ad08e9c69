"""Tests of the command line: the output of each command, and the errors and exit codes for wrong arguments."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import NARROW, ROOT, TINY, command, files_below, is_one_error, is_refused, is_tyros_error, tiny_run
from PIL import Image

import cifar_jax
from cifar_jax.cli.main import COMMANDS, main
from cifar_jax.cli.options import parse_train
from cifar_jax.config import TrainConfig, preset
from cifar_jax.data.load import check_name
from cifar_jax.errors import UserError
from cifar_jax.models.head import init_head
from cifar_jax.pretrained import UNTRAINED, download, registry
from cifar_jax.runs.checkpoint import load_checkpoint
from cifar_jax.runtime.devices import missing_platform


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory).path


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Wrong arguments


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("--epochs 0", ["--epochs must be at least 1, got 0."]),
        ("--batch-size -3", ["--batch-size must be at least 1, got -3."]),
        ("--learning-rate 0", ["--learning-rate must be a positive number, got 0.0."]),
        ("--lr -0.1", ["--learning-rate must be a positive number, got -0.1."]),
        ("--learning-rate nan", ["--learning-rate must be a positive number, got nan."]),
        ("--learning-rate inf", ["--learning-rate must be a positive number, got inf."]),
        ("--momentum 1", ["--momentum must be at least 0 and below 1, got 1.0."]),
        ("--momentum nan", ["--momentum must be at least 0 and below 1, got nan."]),
        ("--seed -1", ["--seed must be between 0 and 2147483647, got -1."]),
        ("--seed 2147483648", ["--seed must be between 0 and 2147483647, got 2147483648."]),
        ("--val-fraction 1e-9", ["--val-fraction 1e-09 of 128 training images holds out 0"]),
        ("--val-fraction 0.999", ["--val-fraction 0.999 of 128 training images holds out 128"]),
        ("--hidden 16 -4", ["--hidden must be widths between 1 and 1048576, got 16 -4."]),
        ("--hidden 99999999", ["--hidden must be widths between 1 and 1048576, got 99999999."]),
        ("--image-size 31", ["--image-size must be between 32 and 4096, got 31."]),
        ("--image-size -32", ["--image-size must be", "got -32."]),
        ("--image-size 1024000000", ["--image-size must be", "and 4096, got 1024000000."]),
        ("--train-examples 1000001", ["--train-examples must be at most 1000000 for synthetic images, got 1000001."]),
        ("--test-examples -1", ["--test-examples must be at least 1, got -1."]),
        ("--preset finetuning", ["'finetuning'. Did you mean finetune?", "one of cifar10, demo, finetune, pretrain."]),
        ("--preset=", ["There is no --preset ''. Choose one of cifar10"]),
        ("--variant timm", ["There is no --variant 'timm'. Did you mean torchvision? Choose one of keras, "]),
        ("--weights ResNet50", ["'ResNet50'. Did you mean keras-resnet50?", "one of demo, keras-resnet50, "]),
        ("--no-progress=maybe", ["--no-progress takes no value, got maybe; leave out =maybe."]),
        ("--config there --preset demo", ["--config there includes a preset; leave out --preset demo."]),
    ],
)
def test_invalid_option_values_are_refused(tmp_path, capsys, typed, parts):
    out = tmp_path / "out"
    tiny = TINY[2:] if "--preset" in typed else TINY
    tiny = tiny if "--variant" not in typed else ("--preset", "demo")
    result = command(capsys, "train", *tiny, "--out", out, "--cache-dir", tmp_path / "cache", *typed.split())
    is_one_error(result, 2, *parts)
    assert result.out == "" and written_below(tmp_path) == []


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("--epochs 2.5", ["Error parsing --epochs: expected a whole number, got 2.5."]),
        ("--epochs=", ["Error parsing --epochs: expected a whole number, got nothing."]),
        ("--lr small", ["--learning-rate: expected a number, got small."]),
        ("--clip-norm x", ["Error parsing --clip-norm: expected a number, got x."]),
        ("--hidden 512;256", ["Error parsing --hidden: expected a whole number, got 512;256."]),
        ("--hidden=", ["Error parsing --hidden: expected a whole number, got nothing."]),
        (
            "--augment flip,turn",
            ["Error parsing --augment: expected one of flip, crop, cutout, random-resized-crop, color-jitter, got"],
        ),
        ("--epochs", ["Missing value for argument '--epochs'"]),
        ("--learning_rate", ["Missing value for argument", "--learning-rate"]),
        ("--mode eager", ["invalid choice 'eager' for argument '--mode'", "'cached', 'live', 'finetune'"]),
        ("--epoch 3", ["Unrecognized options: --epoch, 3", "Perhaps you meant: --epochs INT"]),
        ("stray words", ["Unrecognized options: stray, words"]),
    ],
)
def test_unparsable_options_give_tyros_error(tmp_path, capsys, monkeypatch, typed, parts):
    monkeypatch.setenv("COLUMNS", "80")
    result = command(capsys, "train", *TINY, "--out", tmp_path / "out", *typed.split())
    is_tyros_error(result, *parts)
    assert max(map(len, result.err.splitlines())) <= 80 and files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        ("--lr 0.5", "learning_rate", 0.5),
        ("--lr=0.5", "learning_rate", 0.5),
        ("--hidden 512,256", "hidden", (512, 256)),
        ("--hidden 512, 256", "hidden", (512, 256)),
        ("--hidden 512 256", "hidden", (512, 256)),
        ("--hidden", "hidden", ()),
        ("--mode live --augment flip,crop", "augment", ("flip", "crop")),
        ("--preset demo --train-examples None", "train_examples", None),
        ("--train-examples 20", "train_examples", 20),
        ("--momentum 0", "momentum", 0.0),
        ("", "preset", "cifar10"),
    ],
)
def test_option_values_are_parsed(typed, name, value):
    config = parse_train(typed.split())
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value)


def test_last_of_several_presets_wins():
    assert parse_train(["--preset", "demo", "--preset=finetune"]) == preset("finetune")


@pytest.mark.parametrize("option", ["--out", "--cache-dir", "--data-dir", "--profile"])
def test_empty_path_is_refused(capsys, option):
    """The shell passes an empty path for an unset variable."""
    is_one_error(command(capsys, "train", "--preset", "demo", f"{option}="), 2, f"{option} must be a path, got ''.")


def test_double_comma_is_refused(capsys):
    is_refused(command(capsys, "train", "--preset", "demo", "--hidden", "512,,256"), "--hidden", "a whole number")


def test_image_named_like_a_flag_is_accepted(run, capsys, tmp_path, picture):
    strange = tmp_path / "debug=1.png"
    shutil.copy(picture, strange)
    assert command(capsys, "predict", run, strange).code == 0


def test_train_without_options_is_the_main_job(tmp_path, capsys, monkeypatch):
    """Without weights, data or a network it ends with an error message."""
    assert parse_train([]) == TrainConfig()

    def refuse(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert sum(download.WAITS) < 10
    monkeypatch.setattr(download, "WAITS", (0.0,))
    monkeypatch.chdir(tmp_path)
    is_one_error(command(capsys, "train"), 2, "The weights keras-resnet50 are not on this machine", "no connection")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("verb", "name", "part"),
    [
        ("train", "CIFAR10", "There is no folder or file 'CIFAR10', and no data set of this name in data or TFDS"),
        ("features", "Cifar_10", "Did you mean cifar10?"),
        ("train", "shape", "Did you mean shapes?"),
        ("train", "svhn", "Did you mean svhn_cropped?"),
        ("features", "Tiny", "Did you mean tiny?"),
        ("train", "cats", "cats has no folders of pictures. --dataset takes a folder for each class"),
    ],
)
def test_unknown_data_set_is_refused_before_any_download(tmp_path, capsys, monkeypatch, verb, name, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "tiny" / "1.0.0").mkdir(parents=True)
    (tmp_path / "data" / "tiny" / "1.0.0" / "dataset_info.json").touch()
    (tmp_path / "cats").mkdir()
    before = files_below(tmp_path)
    arguments = {"train": ["--dataset", name, "--out", "out"], "features": [name, "--out", "of.npz"]}[verb]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a download begins"))
    is_one_error(command(capsys, verb, *arguments, "--data-dir", "data"), 2, part)
    assert written_below(tmp_path) == before


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("photos", "class 'cats' has no pictures in photos; add some, or remove the folder."),
        ("photos/cats", "photos/cats has no folders of pictures"),
        ("nowhere/cats", "--dataset nowhere/cats does not exist. --dataset takes a folder of pictures, an .npz file,"),
        ("./notes.txt", "--dataset ./notes.txt is a file, but not an .npz file"),
    ],
)
def test_paths_without_a_data_set_are_refused_before_any_download(tmp_path, capsys, monkeypatch, path, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos/cats").mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a download begins"))
    is_one_error(command(capsys, "train", "--dataset", path), 2, part)


@pytest.mark.parametrize("name", ["cifar10", "shapes", "mnist", "cifar10_corrupted/fog_1", "cifar10:3.0.2", "tiny"])
def test_data_set_names_are_accepted(tmp_path, name):
    (tmp_path / "tiny" / "1.0.0").mkdir(parents=True)
    (tmp_path / "tiny" / "1.0.0" / "dataset_info.json").touch()
    check_name(name, str(tmp_path))


@pytest.mark.parametrize(
    ("variant", "part"),
    [
        ("timm", "There is no --variant 'timm'. Did you mean torchvision?"),
        ("keras-2016", "--variant keras-2016 does not fit keras-resnet50, whose tensors have keras names"),
    ],
)
def test_wrong_variant_is_refused_before_any_download(monkeypatch, capsys, variant, part):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a download begins"))
    is_one_error(command(capsys, "train", "--variant", variant), 2, part)


def written_below(directory):
    """Lists files and directories except compiled functions, which are cached even if a command fails."""
    return [name for name in files_below(directory) if not re.match(r"cache(/xla(/|$)|$)", name)]


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        (
            ["trian"],
            ["There is no command 'trian'. Did you mean train?", "train, evaluate, predict, export, features, info"],
        ),
        (["help", "Evaluate"], ["There is no command 'Evaluate'. Did you mean evaluate?"]),
        (["--epochs", "3"], ["There is no command '--epochs'"]),
        ([""], ["There is no command ''"]),
        (["predict", "run"], ["predict needs images"]),
    ],
)
def test_unknown_commands_are_refused(capsys, typed, parts):
    is_one_error(command(capsys, *typed), 2, *parts)


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        (["evaluate"], ["Missing", "the run directory"]),
        (["predict"], ["Missing", "the run directory"]),
        (["evaluate", "run", "another"], ["Unrecognized options: another"]),
        (["info", "--verbose"], ["Unrecognized options: --verbose"]),
    ],
)
def test_wrong_arguments_give_tyros_error(capsys, typed, parts):
    is_tyros_error(command(capsys, *typed), *parts)


def test_usage_is_shown_without_a_command(capsys, monkeypatch):
    result = command(capsys)
    assert result.code == 2 and result.out == "" and result.err.startswith("usage: python -m cifar_jax COMMAND")
    for name in (*COMMANDS, "help COMMAND", "--version"):
        assert f"\n  {name}" in result.err
    assert max(map(len, result.err.splitlines())) <= 80
    for typed in (["--help"], ["-h"], ["help"], ["help", "--help"]):
        assert command(capsys, *typed) == (0, result.err, "")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/cifar-jax"])
    assert command(capsys, "--help").out.startswith("usage: cifar-jax COMMAND")
    assert command(capsys, "train", "--help").out.startswith("usage: cifar-jax train [")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(capsys, name):
    result = command(capsys, name, "--help")
    assert result.code == 0 and result.err == "" and result.out.startswith(f"usage: python -m cifar_jax {name} [")
    assert command(capsys, "help", name) == result


def test_version(capsys):
    for typed in ([], ["train"]):  # train.py prepends its command
        assert command(capsys, *typed, "--version") == (0, f"cifar-jax {cifar_jax.__version__}\n", "")


def test_platform_without_a_device_is_explained(tmp_path):
    away = environment(tmp_path) | {"JAX_PLATFORMS": "cuda"}
    train = [sys.executable, "-m", "cifar_jax", "train", *TINY, "--out", tmp_path / "out"]
    done = subprocess.run(train, cwd=tmp_path, env=away, capture_output=True, text=True)
    message = "Error: JAX found no CUDA device. Run pip install '.[cuda]' in the checkout, or unset JAX_PLATFORMS.\n"
    assert (done.returncode, done.stderr) == (2, message) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("platforms", "reason", "message"),
    [
        ("tpu", "INTERNAL: Failed to open libtpu.so: x", "JAX found no TPU. Run"),
        (
            "tpu,cpu",
            "ABORTED: in use by 7 (set JAX_PLATFORMS='' to automatically choose)",
            "JAX found no TPU (ABORTED: in use by 7). Run pip install '.[tpu]' in the checkout, or unset",
        ),
        (
            "cpu,kuda",
            "Backend 'kuda' is not in the list of known backends: ['cpu', 'tpu'].",
            "JAX has no platform 'kuda'. Did you mean cuda? Set JAX_PLATFORMS to cpu, cuda or tpu, or ",
        ),
        ("", "ABORTED: in use", "JAX cannot use the devices of this machine (A"),
    ],
)
def test_missing_platform_messages(monkeypatch, platforms, reason, message):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    name = "kuda" if "kuda" in platforms else "tpu"
    assert missing_platform(RuntimeError(f"Unable to initialize backend '{name}': {reason}")).startswith(message)
    assert missing_platform(RuntimeError("another")) is None and missing_platform(AssertionError()) is None


def test_config_takes_a_run_directory(run, tmp_path, capsys):
    config = parse_train(["--config", str(run), "--epochs", "7"])
    assert config == parse_train(["--config", str(run / "config.json"), "--epochs", "7"])
    assert (config.epochs, config.hidden, config.out) == (7, (8,), None)
    (tmp_path / "empty").mkdir()
    result = command(capsys, "train", "--config", tmp_path / "empty")
    is_one_error(result, 2, f"{tmp_path}/empty/config.json cannot be read", "name a run directory or its config.json")


def test_error_about_a_path_with_newlines_is_one_line(tmp_path, capsys):
    name = tmp_path / "two\nlines\r.txt"
    name.write_text("a file")
    is_one_error(command(capsys, "train", *TINY, "--out", name), 2, "is a file; choose a directory")


def test_debug_raises_the_error(tmp_path):
    with pytest.raises(UserError, match="--epochs must be at least 1"):
        main(["train", *TINY, "--epochs", "0", "--debug"])
    main(["info"])  # without --debug, which turns NaN checks off again
    assert not jax.config.jax_debug_nans


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (KeyboardInterrupt(), 130, ["Interrupted."]),
        (MemoryError(), 1, ["Error: Out of memory. A smaller --image-size", "--extract-batch-size"]),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nmore"),
            1,
            ["Error: Out of memory. A smaller --image-size", "allocating 7 bytes"],
        ),
    ],
)
def test_errors_before_the_run_directory_exists(tmp_path, capsys, monkeypatch, error, code, parts):
    def fail(*_):
        raise error

    monkeypatch.setattr(jax, "local_devices", fail)
    result = command(capsys, "train", *TINY, "--out", tmp_path / "out")
    assert result.code == code and len(result.err.splitlines()) == 1, result
    assert all(part in result.err for part in parts) and not (tmp_path / "out").exists()


def test_unexpected_error_propagates(monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(jax, "local_devices", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        main(["train", *TINY])


# ---------------------------------------------------------------------------------------------------------------------
# Output of the commands


def test_train_prints_plain_lines_without_a_terminal(tmp_path_factory):
    run, (code, out, err) = tiny_run(tmp_path_factory)
    assert code == 0
    assert "\x1b" not in out + err and "\r" not in out + err and "━" not in out + err
    epochs = re.findall(r"^epoch (\d)/2  train_loss [\d.]+  train_accuracy [\d.]+  val_loss", out, re.MULTILINE)
    assert epochs == ["1", "2"]
    assert out.count(str(run)) == 4 and f"python -m cifar_jax predict {run} PICTURE..." in out
    assert err.startswith("Warning: --weights random-w16 is an UNTRAINED network") and err.count("\n") == 1


def test_evaluate_reproduces_the_summary(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    result = command(capsys, "evaluate", run, "--json")
    scores = json.loads(result.out)
    assert result.code == 0 and result.err == "" and scores["num_test"] == 20
    assert scores["test_accuracy"] == summary["val_accuracy"]
    assert scores["test_loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    plain = command(capsys, "evaluate", run)
    assert re.search(rf"^accuracy +{100 * scores['test_accuracy']:.1f} % on 20 images, 95 % ", plain.out, re.MULTILINE)


@pytest.mark.parametrize("direct", [[], ["--direct"]])
def test_predict_prints_the_top_classes(run, capsys, picture, direct):
    result = command(capsys, "predict", run, picture, run / "curves.png", "--json", *direct)
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 0 and [line["path"] for line in lines] == [str(picture), str(run / "curves.png")]
    names = json.loads((run / "summary.json").read_text())["dataset"]["class_names"]
    for line in lines:
        assert list(line["probabilities"]) == names and sum(line["probabilities"].values()) == pytest.approx(1)
        assert line["probabilities"][line["label"]] == line["probability"] == max(line["probabilities"].values())
    plain = command(capsys, "predict", run, picture, *direct).out
    probs = sorted(lines[0]["probabilities"].items(), key=lambda item: -item[1])[:3]
    assert plain == f"{picture}  {'  '.join(f'{name} {prob:.3f}' for name, prob in probs)}\n"


def test_predict_applies_exif_orientation(run, capsys, tmp_path, picture):
    """A rotated image with an EXIF orientation gives exactly the probabilities of the upright one."""
    turned = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(picture) as upright:
        upright.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    one, other = (json.loads(command(capsys, "predict", run, path, "--json").out) for path in (picture, turned))
    assert one["probabilities"] == other["probabilities"]


def test_predict_escapes_undecodable_file_names(run, capsys, tmp_path, picture):
    strange = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png")
    shutil.copy(picture, strange)
    result = command(capsys, "predict", run, strange)
    assert result.code == 0 and r"caf\udce9.png  " in result.out


def test_info_lists_weights_and_data_sets(run, capsys, tmp_path):
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


def test_info_devices_marks_those_used_for_training(capsys):
    (row,) = json.loads(command(capsys, "info", "devices", "--json").out)["devices"]
    assert (row["platform"], row["process"], row["training"]) == ("cpu", "0", "yes")
    assert command(capsys, "info", "devices").out.splitlines()[0].split("\t")[:3] == ["device", "platform", "kind"]


class InterruptedAfterAnEpoch(io.StringIO):
    """An output that gets Ctrl-C when the first epoch is printed."""

    def write(self, text):
        if text.startswith("epoch 1/"):
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_ends_a_run_cleanly(tmp_path, capsys, monkeypatch, narrow):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "stdout", InterruptedAfterAnEpoch())
    code, _, err = command(capsys, "train", *TINY, "--epochs", "1000", "--out", out)
    assert code == 130 and "Stopping" in err and "Traceback" not in err
    advice = f"Continue with the same command and --resume --out {out}."
    assert f"Interrupted after epoch 1 of 1000; progress is saved. {advice}" in err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["epochs"] == 1
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    like = {"params": {"head": jax.eval_shape(lambda: init_head(jax.random.key(0), NARROW.features, (8,), 10))}}
    assert np.isfinite(load_checkpoint(out / "checkpoints", like)["params"]["head"][0]["kernel"]).all()
    assert not [path for path in files_below(out) if Path(path).name.startswith(".")]


# ---------------------------------------------------------------------------------------------------------------------
# Separate processes


def environment(tmp_path):
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    return os.environ | {"PYTHONPATH": path, "CIFAR_JAX_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}


def test_script_runs_from_any_directory(tmp_path):
    ascii_only = environment(tmp_path) | {"PYTHONIOENCODING": "ascii"}
    script = [sys.executable, ROOT / "train.py", "--help"]
    done = subprocess.run(script, cwd=tmp_path, env=ascii_only, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and files_below(tmp_path) == []
    assert all(option in done.stdout for option in ("--preset", "--weights", "--no-shuffle", "--val-fraction"))
