"""An installed copy does outside of the checkout what the documents say; test_start.py has the first steps."""

import re
from pathlib import Path

import pytest

from readme.catalogue import check_promises
from readme.machine import STEPS, Machine, name_of, supplied_machine, supply_files

pytestmark = pytest.mark.readme
ELSEWHERE = [step for step in STEPS if re.match(r"cifar-jax (features|verify-weights|convert|info)", step[0].text)]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """All is in place, and the first step, which installs, has been typed."""
    machine = supplied_machine(tmp_path_factory)
    machine.upto(STEPS[0])
    return machine


@pytest.fixture(scope="module")
def elsewhere(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that is no checkout, with the user's own files."""
    directory = tmp_path_factory.mktemp("elsewhere")
    supply_files(directory, machine.clone / "model.h5")
    return directory


@pytest.mark.parametrize("step", ELSEWHERE, ids=name_of)
def test_does_what_the_document_says(machine, elsewhere, step, record_property):
    (typed,) = machine.typed(step, elsewhere)
    record_property("seconds", typed.seconds)
    check_promises(step[0].bare, typed, elsewhere, set())


def test_module_is_the_command(machine, elsewhere):
    by_name, by_module = machine.who.type(["cifar-jax info weights", "python -m cifar_jax info weights"], elsewhere)
    assert by_name.code == by_module.code == 0 and by_name.out == by_module.out
