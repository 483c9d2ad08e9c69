"""Files of unknown origin are first read in a separate process, because the HDF5 library may hang or crash."""

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import keras_tensors, write_keras_h5

from cifar_jax.files import sha256_of_file
from cifar_jax.pretrained import WeightsError, load_backbone, registry
from cifar_jax.pretrained.formats import hdf5

PROBE = Path(hdf5.__file__).with_name("hdf5_probe.py")
HANGS, CRASHES = "while True: pass", "__import__('os').abort()"


pytestmark = pytest.mark.usefixtures("narrow_resnet")


@pytest.fixture(params=["weights.h5", "weights.keras"])
def path(request, tmp_path):
    whole = write_keras_h5(tmp_path / "weights.h5", keras_tensors())
    if request.param == "weights.h5":
        return whole
    with zipfile.ZipFile(tmp_path / request.param, "w") as file:
        file.writestr("config.json", "{}")
        file.write(whole, "model.weights.h5")
    return tmp_path / request.param


@pytest.mark.parametrize("fate", [HANGS, CRASHES])
def test_hang_or_crash_of_hdf5_becomes_an_error(path, monkeypatch, fate):
    """No file is known to trigger either reliably, so a patched probe does instead of reading."""
    script = PROBE.read_text().replace("        visit(file, int(memory))", f"        {fate}")
    assert fate in script
    (path.parent / PROBE.name).write_text(script)
    monkeypatch.setattr(hdf5, "__file__", str(path.parent / "hdf5.py"))
    start = time.monotonic()
    with pytest.raises(WeightsError, match=f"{path} is corrupt: the HDF5 library hangs or crashes on it"):
        load_backbone(path)
    assert time.monotonic() - start < 30, "the probe is limited to one second of CPU time"


def test_probe_has_a_wall_clock_timeout(tmp_path, monkeypatch):
    def slow(*_, timeout, **__):
        raise subprocess.TimeoutExpired("probe", timeout)

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(WeightsError, match="hangs or crashes"):
        load_backbone(write_keras_h5(tmp_path / "weights.h5", keras_tensors()))


def test_known_file_is_not_probed(tmp_path, monkeypatch):
    path = write_keras_h5(tmp_path / "weights.h5", keras_tensors())
    digest = f"sha256:{sha256_of_file(path)}"
    entry = registry.Entry("known", path.name, None, digest, path.stat().st_size, "keras", "MIT", None, "", "A test.")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("probed"))
    assert load_backbone(path, known={"known": entry}).variant == "keras (by its hash)"


def probe(path, memory=10**9):
    return subprocess.run([sys.executable, "-I", PROBE, path, "1", str(memory)], capture_output=True, check=False)


def test_probe_handles_link_cycles(tmp_path):
    with h5py.File(tmp_path / "circle.h5", "w") as file:
        file["here/there"] = file["/"]
        file["here/again"] = file["here"]
    assert probe(tmp_path / "circle.h5").returncode == 0


def test_probe_does_not_allocate_claimed_sizes(tmp_path):
    with h5py.File(tmp_path / "claims.h5", "w") as file:
        file.create_dataset("claim", (10**6, 10**6), "f4", chunks=(1000, 1000))
        file["one"] = np.zeros(1000)
    assert probe(tmp_path / "claims.h5", memory=10**7).returncode == 0
