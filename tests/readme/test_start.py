"""README's first steps and its Python, typed in an empty home without a network: what a newcomer has at once."""

import pytest

from readme import supplies
from readme.catalogue import check_promises, runs_in
from readme.documents import blocks, commands
from readme.newcomer import Newcomer, make_environment

pytestmark = pytest.mark.readme

README = (supplies.ROOT / "README.md").read_text(encoding="utf-8")
USAGE = (supplies.ROOT / "docs" / "usage.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Newcomer:
    """Someone with an environment and an empty home."""
    return Newcomer(tmp_path_factory.mktemp("home"), make_environment(tmp_path_factory.mktemp("environment")))


def test_first_steps_work_outside_of_the_checkout(newcomer, tmp_path_factory):
    """The first block: installs from a clone, and needs the clone no more."""
    clone, elsewhere = supplies.clone(tmp_path_factory.mktemp("clone")), tmp_path_factory.mktemp("elsewhere")
    supplies.write_photo(elsewhere / "photo.jpg")
    first = next(block for block in blocks(README) if block.language == "sh")
    install, *rest = commands("README.md", f"```sh\n{first.text}```\n")
    assert install.bare == "pip install ." and len(rest) == 3
    check_promises(install.text, newcomer.type(install.text, clone)[0], clone, set())
    for command in rest:
        before = runs_in(elsewhere)
        check_promises(command.text, newcomer.type(command.text, elsewhere)[0], elsewhere, before)


def test_python_blocks_run_one_after_the_other(newcomer, tmp_path_factory):
    """In one namespace, in a checkout, and the last one shows what it says. One needs what was exported before."""
    clone = supplies.clone(tmp_path_factory.mktemp("clone"))
    supplies.write_photo(clone / "photo.jpg")
    python = [block.text for block in blocks(README) if block.language == "python"]
    program = "\n".join(text for text in python if "pets.onnx" not in text)
    (clone / "blocks.py").write_text(program, encoding="utf-8")
    (typed,) = newcomer.type("python blocks.py", clone)
    assert typed.code == 0, typed
    assert float(typed.out.split()[0]) > 0.8 and (clone / "runs" / "notebook" / "summary.json").exists()


def test_python_blocks_of_usage_run(newcomer, tmp_path_factory):
    clone = supplies.clone(tmp_path_factory.mktemp("clone"))
    program = "\n".join(block.text for block in blocks(USAGE) if block.language == "python")
    (clone / "blocks.py").write_text(program + "\nprint(rows[-1].train_loss < rows[0].train_loss)\n", encoding="utf-8")
    (typed,) = newcomer.type("python blocks.py", clone)
    assert (typed.code, typed.out) == (0, "True\n"), typed
