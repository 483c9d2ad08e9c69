"""Nothing in a file is executed, links are not followed, and dependencies are bounded."""

import ast
import importlib.metadata
import json
import re

import pytest
from helpers import ROOT, TINY, Killed, command, kill_at

from cifar_jax.cli.options import parse_train
from cifar_jax.experiment import train
from cifar_jax.runs.directory import CHECKPOINTS

SOURCES = [*sorted((ROOT / "cifar_jax").rglob("*.py")), ROOT / "train.py"]

# Calls that run the content of a file, or a shell.
FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "np.fromfile"}


def calls_in(path):
    """Yields each call in a source file with the dotted name of the function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell():
    seen = set()
    for path in SOURCES:
        for name, call in calls_in(path):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            where = f"{path.relative_to(ROOT)}:{call.lineno}"
            assert name not in FORBIDDEN, where
            assert not re.match(r"(pickle|dill|joblib|marshal|shelve)\.|torch\.load", name), where
            assert keywords.get("allow_pickle", "False") == "False", where
            assert keywords.get("shell", "False") == "False", where
            seen.add(name)
    assert {"np.load", "subprocess.run", "json.loads"} <= seen  # so that names are found at all


def test_pickle_reader_cannot_import_or_look_up_functions():
    path = ROOT / "cifar_jax" / "pretrained" / "formats" / "torch_pickle.py"
    imported = {node.names[0].name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)}
    assert "pickle" not in imported and "importlib" not in imported
    assert not {"getattr", "globals"} & {name for name, _ in calls_in(path)}


def test_run_replaces_links_and_not_their_targets(tmp_path, capsys, narrow):
    out, outside = tmp_path / "run", tmp_path / "outside"
    (outside / CHECKPOINTS / "0001").mkdir(parents=True)
    (outside / CHECKPOINTS / "0001" / "checkpoint.json").write_text("{}")
    names = [CHECKPOINTS, "curves.png", "config.json", "metrics.jsonl"]
    for name in names[1:]:
        (outside / name).write_text(json.dumps({"preset": "demo", "dataset": "shapes", "weights": "demo"}))
    out.mkdir()
    for name in names:
        (out / name).symlink_to(outside / name)
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    assert command(capsys, "train", *TINY, "--epochs", 1, "--out", out, "--overwrite").code == 0
    assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == before
    assert not any((out / name).is_symlink() for name in names)


def test_leftovers_that_are_links_are_removed_and_not_their_targets(tmp_path, capsys, narrow):
    out, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    arguments = [*TINY, "--epochs", "2", "--out", str(out)]
    with pytest.raises(Killed):
        train(parse_train(arguments), kill_at(1))
    (out / CHECKPOINTS / ".0002.abc").symlink_to(outside)
    (out / ".metrics.jsonl.abc").symlink_to(outside / "precious")
    assert command(capsys, "train", *arguments, "--resume").code == 0
    assert (outside / "precious").read_text() == "mine"
    assert not [path for path in out.rglob(".*") if path.is_symlink()]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_are_bounded_and_installed_versions_satisfy_them(name):
    packaging = pytest.importorskip("packaging.requirements")
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    requirements = [packaging.Requirement(line) for line in lines if line and not line.startswith("-")]
    assert requirements
    for requirement in requirements:
        operators = {one.operator for one in requirement.specifier}
        assert ">=" in operators, f"{requirement} names no release to begin with"
        if requirement.name not in ("importlib_resources",):
            assert "<" in operators, f"{requirement} takes any release to come"
        if requirement.marker is None or requirement.marker.evaluate():
            assert importlib.metadata.version(requirement.name) in requirement.specifier
