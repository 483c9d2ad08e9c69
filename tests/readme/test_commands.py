"""Every command of the documents, typed as it stands and in their order, with data and weights in place.

CIFAR-10 is small and its pixels are noise, and Keras's network is drawn; both lie where those of a newcomer would.
"""

import pytest

from readme.catalogue import OF_PARITY
from readme.documents import blocks
from readme.machine import STEPS, Machine, name_of, supplied_machine
from readme.supplies import ROOT

pytestmark = pytest.mark.readme


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """All is in place."""
    return supplied_machine(tmp_path_factory)


@pytest.mark.parametrize("step", STEPS, ids=name_of)
def test_does_what_the_document_says(machine, step, record_property):
    for typed in machine.upto(step):
        record_property("seconds", typed.seconds)


@pytest.mark.parametrize("name", ["README.md", "docs/export.md"])
def test_python_that_reads_exports_runs(machine, name):
    """In one namespace, where the commands above it were typed."""
    python = [block.text for block in blocks((ROOT / name).read_text()) if block.language == "python"]
    about = [text for text in python if name != "README.md" or "pets.onnx" in text]
    program = "\n".join(text for text in about if not any(word in text for word in OF_PARITY))
    exports = [step for step in STEPS if step[0].document in ("README.md", name) and " export " in step[0].text]
    for step in exports:
        machine.upto(step)
    (machine.clone / "reads.py").write_text(program + "\nprint(probabilities.shape)\n", encoding="utf-8")
    (typed,) = machine.who.type("python reads.py", machine.clone)
    assert typed.code == 0 and typed.out.splitlines()[-1] in ("(2,)", "(1, 2)"), typed
