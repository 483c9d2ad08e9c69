"""Commands that need data or weights, typed where there are none and no network."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from readme import supplies
from readme.catalogue import needs_downloads
from readme.documents import Command
from readme.machine import STEPS, Machine, name_of
from readme.newcomer import Newcomer, Typed, make_environment

pytestmark = pytest.mark.readme
WITHOUT_NETWORK = 30  # seconds; a command must not sit through the time limits of a network that is not there
NEEDY = [step for step in STEPS if needs_downloads(step[0].bare)]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Nothing is in place but the clone, and an installed copy of it."""
    clone = supplies.clone(tmp_path_factory.mktemp("bare-clone"))
    binaries = make_environment(tmp_path_factory.mktemp("bare-environment"))
    who = Newcomer(tmp_path_factory.mktemp("bare-home"), binaries)
    assert who.type("pip install .", clone)[0].code == 0
    return Machine(who, clone)


@pytest.fixture(scope="module")
def refused(bare: Machine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Typed]]:
    """What came of all commands that miss something, each in a home of its own.

    Two at a time, as they wait for a network more than they work; in one home one would wait for the other too.
    """

    def typed(step: list[Command], home: Path) -> list[Typed]:
        return replace(bare, who=replace(bare.who, home=home)).typed(step)

    homes = [tmp_path_factory.mktemp("empty-home") for _ in NEEDY]
    with ThreadPoolExecutor(2) as pool:  # as many as the cores of a small machine, so that the seconds are right
        return dict(zip(map(name_of, NEEDY), pool.map(typed, NEEDY, homes), strict=True))


@pytest.mark.parametrize("step", NEEDY, ids=name_of)
def test_without_data_and_weights_a_command_says_so_at_once(bare, refused, step, record_property):
    for typed in refused[name_of(step)]:
        record_property("seconds", typed.seconds)
        lines = [line for line in typed.err.splitlines() if line.startswith("Error: ")]
        assert typed.code == 2 and len(lines) == 1 and "Traceback" not in typed.err, typed
        assert typed.seconds < WITHOUT_NETWORK * max(1, os.getloadavg()[0] / (os.cpu_count() or 1)), typed
    # Commands that were typed at the same time may leave each other's empty directories.
    assert not [path for path in (bare.clone / "runs").rglob("*") if path.is_file()]
