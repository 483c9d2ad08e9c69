"""Refusals of the export to Keras, which need no Keras; tests/parity/test_export.py loads what it writes."""

import sys

import pytest
from helpers import files_below
from untrained_runs import TORCH_LIKE, drawn_run

from cifar_jax.errors import UserError
from cifar_jax.export.write import export_run


@pytest.fixture(scope="module")
def run():
    """A run of a narrow network."""
    return drawn_run(TORCH_LIKE, side=32)


def test_without_keras_the_extra_is_named_and_nothing_is_left(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(UserError, match=r"^--format keras needs the package keras; install it with .*\[keras\]'`\.$"):
        export_run(run, "keras", tmp_path / "model.keras")
    assert files_below(tmp_path) == []


def test_keras_without_its_backend_is_one_sentence(run, tmp_path, monkeypatch):
    (tmp_path / "path" / "keras").mkdir(parents=True)
    (tmp_path / "path" / "keras" / "__init__.py").write_text("import a_missing_backend")
    monkeypatch.syspath_prepend(tmp_path / "path")
    for name in [name for name in sys.modules if name.partition(".")[0] == "keras"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    with pytest.raises(UserError, match=r"KERAS_BACKEND=tensorflow \(No module named .*\); .* set KERAS_BACKEND=jax"):
        export_run(run, "keras", tmp_path / "model.keras")
    assert files_below(tmp_path) == ["path", "path/keras", "path/keras/__init__.py"]


@pytest.mark.parametrize("name", ["model", "model.h5", "model.onnx"])
def test_other_endings_are_refused(run, name, tmp_path):
    with pytest.raises(UserError, match=r"must be a file name that ends in \.keras for --format keras"):
        export_run(run, "keras", tmp_path / name)


def test_ending_of_keras_is_refused_for_a_directory(run, tmp_path):
    with pytest.raises(UserError, match=r"leave out the ending \.keras"):
        export_run(run, "pytorch", tmp_path / "model.keras")
