"""The same command gives the same bits; a run's config.json gives the run; one seed has separate streams."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import TINY, command, is_one_error, tiny_run

from cifar_jax import load_run
from cifar_jax.cli.options import parse_train
from cifar_jax.rng import stream_key
from cifar_jax.runtime import devices

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def in_a_process(out, *options):
    arguments = [
        sys.executable,
        HERE / "narrow_train.py",
        *options,
        "--out",
        out,
        "--cache-dir",
        out.with_suffix(".cache"),
    ]
    usual = os.environ | {"PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    found = subprocess.run(list(map(str, arguments)), cwd=HERE.parent, env=usual, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return out


def bits_of(run):
    rows = [json.loads(line) | {"seconds": 0} for line in (run / "metrics.jsonl").read_text().splitlines()]
    read = load_run(run)
    scores = {
        name: value for name, value in read.summary.items() if name.startswith(("val_", "test_", "conf", "class"))
    }
    pictures = {path.name: path.read_bytes() for path in sorted(run.glob("*.png")) if path.name != "curves.png"}
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((read.head_params, read.backbone.variables))]
    return rows, scores, pictures, leaves


@pytest.mark.parametrize("options", [(), ("--mode", "finetune", "--augment", "flip", "crop", "cutout")])
def test_the_same_command_in_two_processes_gives_the_same_bits(tmp_path, options):
    """From two empty caches, so that nothing is handed from one to the other."""
    first, second = (in_a_process(tmp_path / name, *TINY, *options, "--epochs", "2") for name in ("one", "two"))
    assert bits_of(first) == bits_of(second)


def test_a_runs_config_gives_the_run_again(tmp_path_factory, tmp_path, capsys, monkeypatch):
    finished = tiny_run(tmp_path_factory).path
    again = in_a_process(tmp_path / "again", "--config", finished / "config.json")
    assert bits_of(again) == bits_of(finished)
    configs = [json.loads((run / "config.json").read_text()) for run in (finished, again)]
    for config in configs:
        del config["out"], config["cache_dir"]
    assert configs[0] == configs[1] and configs[0]["config"] is None


def test_what_is_typed_goes_before_the_config_and_what_was_of_the_command_is_not_taken_over(tmp_path_factory):
    finished = tiny_run(tmp_path_factory).path
    read = parse_train(["--config", str(finished / "config.json"), "--epochs", "7"])
    theirs = json.loads((finished / "config.json").read_text())
    assert (read.epochs, read.hidden, read.out) == (7, (8,), None)
    assert read.preset == theirs["preset"] == "demo" and not read.overwrite and not read.resume


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{}", "was not written by `train`"),
        ("[]", "was not written by `train`"),
        ('{"preset": "demo", "dataset": "shapes", "weights": "demo", "colour": 1}', "unknown fields: colour"),
        (
            '{"preset": "demo", "dataset": "shapes", "weights": "demo", "epochs": "4"}',
            "--epochs must be a whole number, got '4'",
        ),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path, capsys, content, part):
    (tmp_path / "config.json").write_text(content)
    result = command(capsys, "train", "--config", tmp_path / "config.json", "--out", tmp_path / "run")
    is_one_error(result, 2, f"--config {tmp_path / 'config.json'}", part)
    twice = command(capsys, "train", f"--config={tmp_path / 'config.json'}", "--preset", "demo")
    is_one_error(twice, 2, "includes a preset; leave out --preset demo")


def test_what_else_decides_the_bits_is_in_the_summary(tmp_path_factory):
    summary = json.loads((tiny_run(tmp_path_factory).path / "summary.json").read_text())
    assert set(summary["environment"]) == {"variables", "commit"}
    commit = summary["environment"]["commit"]
    assert commit is None or len(commit.removesuffix("-dirty")) == 40
    assert {"jax", "jaxlib", "flax", "optax", "python"} <= set(summary["packages"]) and "cpu" in summary["device"]


def test_the_switch_for_gpus_is_a_flag_that_xla_knows(monkeypatch):
    """A flag that it does not know ends the process."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    devices.use_deterministic_algorithms()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false --xla_gpu_deterministic_ops=true"
    code = "import jax; print(jax.devices()[0].platform)"
    found = subprocess.run([sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True)
    assert found.returncode == 0 and found.stdout.strip() == b"cpu"


def test_streams_of_one_seed_are_separate():
    names = ("init", "order", "step", "augment", "backbone", "pictures")
    keys = [jax.random.key_data(stream_key(seed, name)).tolist() for seed in (0, 1) for name in names]
    assert len({tuple(key) for key in keys}) == 12
