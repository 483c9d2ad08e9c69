"""What `import cifar_jax` offers, and what it costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cifar_jax


def test_import_imports_nothing_heavy():
    heavy = "{'jax', 'flax', 'optax', 'numpy', 'tensorflow', 'matplotlib'}"
    program = f"import cifar_jax, sys; sys.exit(' '.join({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr == "\n"


@pytest.mark.parametrize("name", cifar_jax.__all__)
def test_each_name_is_there(name):
    value = getattr(cifar_jax, name)
    assert value is getattr(cifar_jax, name) and name in dir(cifar_jax)
    assert isinstance(value, str) or value.__name__ == name


def test_type_checkers_are_told_the_same_names():
    tree = ast.parse(Path(cifar_jax.__file__).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    assert sorted(alias.asname for node in typed.body for alias in node.names) == cifar_jax.__all__


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'cifar_jax' has no attribute 'head_loss'"):
        cifar_jax.head_loss  # noqa: B018


@pytest.mark.parametrize("typed", ["--help", "--version", "train --help", "help verify-weights"])
def test_help_imports_neither_jax_nor_a_reader_of_weights(typed):
    program = (
        "import sys; from cifar_jax.cli.main import main; main(sys.argv[1:]); "
        "sys.exit(' '.join({'jax', 'flax', 'h5py', 'cifar_jax.pretrained'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program, *typed.split()], capture_output=True, text=True)
    assert found.stderr == "\n" and found.stdout
