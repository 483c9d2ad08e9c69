"""Every command of the documents, typed as it stands and in their order, with data and weights in place.

CIFAR-10 is small and its pixels are noise, and Keras's network is drawn; both lie where those of a newcomer would.
"""

import pytest

from readme.machine import STEPS, Machine, name_of, supplied_machine

pytestmark = pytest.mark.readme


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """All is in place."""
    return supplied_machine(tmp_path_factory)


@pytest.mark.parametrize("step", STEPS, ids=name_of)
def test_does_what_the_document_says(machine, step, record_property):
    for typed in machine.upto(step):
        record_property("seconds", typed.seconds)
