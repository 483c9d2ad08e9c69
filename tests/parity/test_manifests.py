"""The committed manifests are those that real Keras gives."""

from types import ModuleType

import pytest
from make_manifests import DIRECTORY, manifests, to_json

pytestmark = pytest.mark.parity


def test_manifests_are_what_keras_writes(libs: dict[str, ModuleType]) -> None:
    made = manifests(libs["tf_keras"])
    assert {path.stem for path in DIRECTORY.glob("*.json")} == made.keys()
    for name, layers in made.items():
        assert (DIRECTORY / f"{name}.json").read_text(encoding="utf-8") == to_json(layers), name
