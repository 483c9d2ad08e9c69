"""`verify-weights --against keras`: Keras's own outputs agree with ours, and a mistake of ours is reported."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from cifar_jax.pretrained import variants
from cifar_jax.pretrained.verify import verify
from parity.networks import Case, Written

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_keras_agrees_by_stage_and_wrong_epsilon_is_reported(
    written: Written, record_property: Callable[[str, float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with written(Case("keras", "tf_keras", "save_weights", 20, 64, "predictions")) as (_, path):
        found = verify(path, against="keras")
        for name, value in found.differences.items():
            record_property(name, value)
        usual = variants.VARIANTS["keras"]
        wrong = replace(usual, config=replace(usual.config, bn_epsilon=1e-3))
        monkeypatch.setitem(variants.VARIANTS, "keras", wrong)
        told = verify(path, against="keras").problems
    assert found.problems == [] and list(found.differences) == [*(f"stage{n}" for n in range(1, 5)), "pooled", "logits"]
    assert 0 < max(found.differences.values()) <= 1e-5
    assert "pooled differs from that of keras" in " ".join(told)
