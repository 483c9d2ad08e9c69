"""Every command of the documents, typed as it stands and in their order, with data and weights in place and without.

CIFAR-10 is small and its pixels are noise, and Keras's network is drawn; both lie where those of a newcomer would.
"""

import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from readme import supplies
from readme.catalogue import DOCUMENTS, NOT_TYPED, check_promises, needs_downloads, runs_in
from readme.documents import Command, commands, steps
from readme.newcomer import Newcomer, Typed, closed_port, make_environment

pytestmark = pytest.mark.readme
WITHOUT_NETWORK = 10  # seconds, after which the command must have said what is missing

ALL = [command for path in DOCUMENTS for command in commands(str(path.relative_to(supplies.ROOT)), path.read_text())]
STEPS = steps([command for command in ALL if command.bare not in NOT_TYPED])
NEEDY = [step for step in STEPS if needs_downloads(step[0].bare)]
# What an installed copy can do outside of the checkout; test_start.py has the rest.
INSTALLED = [step for step in STEPS if re.match(r"cifar-jax (features|verify-weights|convert|info)", step[0].text)]


def name_of(step: Sequence[Command]) -> str:
    """As a test's name shows it."""
    return f"{step[0].document}:{step[0].line} {step[0].bare}"


@dataclass
class Machine:
    """A clone and who types in it.

    Attributes:
      who: types.
      clone: of the project.
      done: the steps that were typed, by name.
    """

    who: Newcomer
    clone: Path
    done: dict[str, list[Typed]] = field(default_factory=dict)

    def typed(self, step: Sequence[Command], directory: Path | None = None) -> list[Typed]:
        """Types a step; the host's address is the one thing that is filled in."""
        host = f"127.0.0.1:{closed_port()}"
        return self.who.type([command.text.replace("host0:1234", host) for command in step], directory or self.clone)

    def upto(self, step: Sequence[Command]) -> list[Typed]:
        """Types all steps up to this one that were not typed yet, and checks what each leaves."""
        for one in STEPS[: STEPS.index(step) + 1]:
            if name_of(one) not in self.done:
                before = runs_in(self.clone)
                self.done[name_of(one)] = found = self.typed(one)
                for command, typed in zip(one, found, strict=True):
                    check_promises(command.bare, typed, self.clone, before)
        return self.done[name_of(step)]


@pytest.fixture(scope="module")
def supplied(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """All that the documents need is in place: data, weights, a photograph."""
    home, clone = tmp_path_factory.mktemp("home"), supplies.clone(tmp_path_factory.mktemp("clone"))
    supplies.write_cifar10(home)
    weights = supplies.write_keras_weights(home / ".keras" / "models" / supplies.KERAS_FILE)
    supplies.register(clone, weights)
    supply_files(clone, weights)
    return Machine(Newcomer(home, make_environment(tmp_path_factory.mktemp("environment"))), clone)


def supply_files(directory: Path, weights: Path) -> None:
    """Puts a photograph and a weights file of the user's own into a directory."""
    supplies.write_photo(directory / "photo.jpg")
    shutil.copy(weights, directory / "model.h5")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Nothing is in place but the clone, and an installed copy of it."""
    clone = supplies.clone(tmp_path_factory.mktemp("bare-clone"))
    binaries = make_environment(tmp_path_factory.mktemp("bare-environment"))
    who = Newcomer(tmp_path_factory.mktemp("bare-home"), binaries)
    assert who.type("pip install .", clone)[0].code == 0
    return Machine(who, clone)


@pytest.fixture(scope="module")
def refused(bare: Machine) -> dict[str, list[Typed]]:
    """What came of all commands that miss something, two at a time: they wait for a network more than they work."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(map(name_of, NEEDY), pool.map(bare.typed, NEEDY), strict=True))


@pytest.mark.parametrize("step", NEEDY, ids=name_of)
def test_without_data_and_weights_a_command_says_so_at_once(bare, refused, step, record_property):
    for typed in refused[name_of(step)]:
        record_property("seconds", typed.seconds)
        lines = [line for line in typed.err.splitlines() if line.startswith("Error: ")]
        assert typed.code == 2 and len(lines) == 1 and "Traceback" not in typed.err, typed
        assert typed.seconds < WITHOUT_NETWORK, typed
    assert not (bare.clone / "runs").exists()


@pytest.mark.parametrize("step", STEPS, ids=name_of)
def test_with_data_and_weights_it_does_what_the_document_says(supplied, step, record_property):
    for typed in supplied.upto(step):
        record_property("seconds", typed.seconds)


@pytest.mark.parametrize("step", INSTALLED, ids=name_of)
def test_installed_copy_does_the_same_outside_of_the_checkout(supplied, elsewhere, step, record_property):
    (typed,) = supplied.typed(step, elsewhere)
    record_property("seconds", typed.seconds)
    check_promises(step[0].bare, typed, elsewhere, set())


def test_module_is_the_command(supplied, elsewhere):
    by_name, by_module = supplied.who.type(["cifar-jax info weights", "python -m cifar_jax info weights"], elsewhere)
    assert by_name.code == by_module.code == 0 and by_name.out == by_module.out


@pytest.fixture(scope="module")
def elsewhere(supplied: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that is no checkout, with the user's own files; the first step, which installs, has been typed."""
    supplied.upto(STEPS[0])
    directory = tmp_path_factory.mktemp("elsewhere")
    supply_files(directory, supplied.clone / "model.h5")
    return directory
