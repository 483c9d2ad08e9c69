"""The documents' commands as steps, and a machine on which they are typed."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from readme import supplies
from readme.catalogue import DOCUMENTS, NOT_TYPED, check_promises, runs_in
from readme.documents import Command, commands, steps
from readme.newcomer import Newcomer, Typed, closed_port, make_environment

ALL = [command for path in DOCUMENTS for command in commands(str(path.relative_to(supplies.ROOT)), path.read_text())]
STEPS = steps([command for command in ALL if command.bare not in NOT_TYPED])


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


def supplied_machine(make: pytest.TempPathFactory) -> Machine:
    """A machine with all that the documents need: data, weights, a photograph."""
    home, clone = make.mktemp("home"), supplies.clone(make.mktemp("clone"))
    supplies.write_cifar10(home)
    weights = supplies.write_keras_weights(home / ".keras" / "models" / supplies.KERAS_FILE)
    supplies.register(clone, weights)
    supply_files(clone, weights)
    return Machine(Newcomer(home, make_environment(make.mktemp("environment"))), clone)


def supply_files(directory: Path, weights: Path) -> None:
    """Puts pictures and a weights file of the user's own into a directory."""
    supplies.write_photo(directory / "photo.jpg")
    supplies.write_pets(directory)
    shutil.copy(weights, directory / "model.h5")
