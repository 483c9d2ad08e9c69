"""Three small runs, one a mode, give the bits that are recorded in tests/bits.json: a change of structure moves none.

Bits depend on the machine and on jaxlib. Where the recorded ones are of another machine, figures are compared to
1e-4 instead. `python -m tests.test_bits` records them anew, which only a change of the arithmetic is a reason for.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cifar_jax import load_run

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
RECORDED = HERE / "bits.json"

COMMON = ("--preset", "demo", "--train-examples", "150", "--test-examples", "60", "--epochs", "2", "--no-progress")
RUNS = {
    "cached": ("--hidden", "64,32", "--val-fraction", "0.2"),
    "live": ("--mode", "live", "--augment", "flip", "crop", "--hidden", "64", "--image-size", "32"),
    "finetune": (
        *("--mode", "finetune", "--augment", "flip", "crop", "cutout", "--image-size", "32", "--weight-decay", "5e-4"),
        *("--micro-batch", "48", "--clip-norm", "1", "--freeze-stages", "1", "--learning-rate", "0.01"),
    ),
}


def machine() -> dict[str, Any]:
    """What else decides bits than the program."""
    flags = ""
    if Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text()
        flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    wide = sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & set(flags.split()))
    return {
        "machine": platform.machine(),
        "instructions": wide,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jaxlib": jax.lib.__version__,
    }


def outcome(mode: str, out: Path) -> dict[str, Any]:
    """Figures of a run, and the digest of its head."""
    arguments = [sys.executable, HERE.parent / "train.py", *COMMON, *RUNS[mode], "--out", out]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CIFAR_JAX_CACHE": str(out.with_suffix(".cache"))}
    found = subprocess.run(list(map(str, arguments)), env=environment, capture_output=True, text=True, cwd=HERE.parent)
    assert found.returncode == 0, found.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(load_run(out).head_params):
        digest.update(np.asarray(leaf).tobytes())
    return {"rows": [{k: v for k, v in row.items() if k != "seconds"} for row in rows], "head": digest.hexdigest()}


@pytest.mark.parametrize("mode", RUNS)
def test_a_run_gives_the_recorded_bits(tmp_path, mode):
    recorded = json.loads(RECORDED.read_text())
    found, expected = outcome(mode, tmp_path / "run"), recorded["runs"][mode]
    if machine() == recorded["machine"]:
        assert found == expected
    else:
        for row, kept in zip(found["rows"], expected["rows"], strict=True):
            assert row == pytest.approx(kept, rel=1e-4)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        runs = {mode: outcome(mode, Path(name) / mode) for mode in RUNS}
    RECORDED.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=2) + "\n")
