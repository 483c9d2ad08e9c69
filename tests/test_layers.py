"""Imports run downwards: a module imports from its own folder and from what stands below that in this list."""

import ast
from pathlib import Path

import pytest

import cifar_jax

LAYERS = (
    "cli experiment export report runs train features pretrained data models runtime config files rng errors version"
)
LEVEL = {name: level for level, name in enumerate(reversed(LAYERS.split()))}
PACKAGE = Path(cifar_jax.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not path.name.startswith("__"))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_run_downwards(module):
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("cifar_jax"):
            above = f"{module}:{node.lineno} imports {node.module}, which does not stand below it"
            assert LEVEL[f"{node.module}.".split(".")[1]] <= LEVEL[module.parts[0].removesuffix(".py")], above
        assert not (isinstance(node, ast.Import) and "cifar_jax" in node.names[0].name), "use from ... import"
