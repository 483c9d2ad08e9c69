"""The committed manifests match those derived from the libraries."""

from types import ModuleType, SimpleNamespace

import pytest
from golden.published import MANIFESTS, Manifest
from make_manifests import of_keras, of_torch, to_json

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


def test_manifests_match_keras(libs: dict[str, ModuleType]) -> None:
    assert_committed(of_keras(libs["tf_keras"]), "keras")


def test_manifests_match_torch(torch_libs: SimpleNamespace) -> None:
    assert_committed(of_torch(torch_libs), "torchvision", "timm", "huggingface")


def assert_committed(made: dict[str, Manifest], *families: str) -> None:
    committed = {path.stem for path in MANIFESTS.glob("*.json") if path.stem.startswith(families)}
    assert committed == made.keys()
    for name, layers in made.items():
        assert (MANIFESTS / f"{name}.json").read_text(encoding="utf-8") == to_json(layers), name
