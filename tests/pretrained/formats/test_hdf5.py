"""The HDF5 library reads a file of unknown origin in another process first, which may hang or crash instead of us."""

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import keras_tensors, narrow_networks, write_keras_h5

from cifar_jax.pretrained import WeightsError, load_backbone
from cifar_jax.pretrained.formats import hdf5

PROBE = Path(hdf5.__file__).with_name("hdf5_probe.py")
HANGS, CRASHES = "while True: pass", "__import__('os').abort()"


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    narrow_networks(monkeypatch)


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
def test_a_hang_and_a_crash_of_the_library_become_a_sentence(path, monkeypatch, fate):
    """No file is known that does either for certain, so the probe does it when it would begin to read."""
    script = PROBE.read_text().replace("        visit(file, int(memory))", f"        {fate}")
    assert fate in script
    (path.parent / PROBE.name).write_text(script)
    monkeypatch.setattr(hdf5, "__file__", str(path.parent / "hdf5.py"))
    start = time.monotonic()
    with pytest.raises(WeightsError, match=f"{path} is corrupt: the HDF5 library hangs or crashes on it"):
        load_backbone(path)
    assert time.monotonic() - start < 30, "it is bounded by the time of a processor, of which it had one second"


def test_a_machine_that_is_busy_gets_a_minute_and_no_more(tmp_path, monkeypatch):
    def slow(*_, timeout, **__):
        raise subprocess.TimeoutExpired("probe", timeout)

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(WeightsError, match="hangs or crashes"):
        load_backbone(write_keras_h5(tmp_path / "weights.h5", keras_tensors()))


def test_a_known_file_is_not_probed(tmp_path, monkeypatch):
    path = write_keras_h5(tmp_path / "weights.h5", keras_tensors())
    monkeypatch.setattr(hdf5.subprocess, "run", lambda *_, **__: pytest.fail("probed"))
    monkeypatch.setattr("cifar_jax.pretrained.load._known_variant", lambda path, notes: "keras")
    assert load_backbone(path).variant == "keras (by its hash)"


def probe(path, memory=10**9):
    return subprocess.run([sys.executable, "-I", PROBE, path, "1", str(memory)], capture_output=True, check=False)


def test_links_in_circles_come_to_an_end(tmp_path):
    with h5py.File(tmp_path / "circle.h5", "w") as file:
        file["here/there"] = file["/"]
        file["here/again"] = file["here"]
    assert probe(tmp_path / "circle.h5").returncode == 0


def test_claims_cost_the_probe_no_memory(tmp_path):
    with h5py.File(tmp_path / "claims.h5", "w") as file:
        file.create_dataset("claim", (10**6, 10**6), "f4", chunks=(1000, 1000))
        file["one"] = np.zeros(1000)
    assert probe(tmp_path / "claims.h5", memory=10**7).returncode == 0
