"""The code that a model card shows, typed as it is: it gives the prediction of the run, on PyTorch alone."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import TESTS, tiny_run
from PIL import Image

from cifar_jax import load_run
from cifar_jax.export.write import export_run

pytestmark = pytest.mark.parity

# torchvision may be built for another PyTorch; see `declare_operators`.
BEFORE = f"""
import sys
import torch
sys.path.append({str(TESTS)!r})
from parity.torch_networks import declare_operators
library = declare_operators(torch)
"""


def test_the_code_of_a_card_gives_the_prediction_of_the_run(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    for name in ("torch", "torchvision"):
        if not any((Path(entry) / name).is_dir() for entry in sys.path):
            pytest.skip(f"{name} is not installed; `make parity` installs it")
    run, hub = load_run(tiny_run(tmp_path_factory).path), tmp_path / "hub"
    export_run(run, "hub", hub)
    noise = np.random.default_rng(3).integers(0, 256, (41, 50, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.jpg")
    # In place of the download.
    (tmp_path / "huggingface_hub.py").write_text(f"def snapshot_download(name):\n    return {str(hub)!r}\n")
    (code,) = re.findall(r"```python\n(.*?)```", (hub / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "use.py").write_text(f"{BEFORE}\n{code}\nassert 'cifar_jax' not in sys.modules\n")
    found = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    name, probability = found.stdout.rsplit(maxsplit=1)
    expected = run.predict([tmp_path / "photo.jpg"])
    assert name == expected.class_names[0]
    assert float(probability) == pytest.approx(expected.probabilities[0].max(), abs=1e-5)
