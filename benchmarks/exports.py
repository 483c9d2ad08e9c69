"""Exports measured: `python -m benchmarks.exports RUN...` prints a table of each run in each format.

Each format is loaded by its own library in a process of its own, which does not have this project, and gets images of
the run's data set. Columns: size, seconds to export, seconds from the start of the process to the first answer, images
a second (the best of three passes), and the largest difference of a probability from the run's own. With `--all` all
test images are asked, and the labels that differ are counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax import load_run
from cifar_jax.export.write import FORMATS, export_run
from cifar_jax.runs.labelled import own_test_images
from cifar_jax.runs.reader import Run

# Of each library: the format it reads, and how it is asked. `answer` maps uint8 [n, side, side, 3] to probabilities.
LIBRARIES = {
    "ONNX Runtime": (
        "onnx",
        """
import onnxruntime as library
session = library.InferenceSession(path)
answer = lambda images: session.run(["probabilities"], {"image": images})[0]
""",
    ),
    "OpenVINO": (
        "onnx",
        """
import openvino as library
core = library.Core()
options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": 1}
model = core.compile_model(path, "CPU", options)
answer = lambda images: model(images)["probabilities"]
""",
    ),
    "JAX": (
        "stablehlo",
        """
import jax as library, safetensors.numpy
program = library.export.deserialize(bytearray(open(path + "/model.stablehlo", "rb").read()))
weights = library.device_put(safetensors.numpy.load_file(path + "/weights.safetensors"))
run = library.jit(program.call)
answer = lambda images: np.asarray(run(weights, images)["probabilities"])
""",
    ),
    "Keras on JAX": ("keras", "os.environ['KERAS_BACKEND'] = 'jax'\nKERAS"),
    "Keras on TensorFlow": ("keras", "os.environ['KERAS_BACKEND'] = 'tensorflow'\nKERAS"),
    "PyTorch": (
        "pytorch",
        """
import importlib.util, pathlib, re
import torch as library
try:
    import torchvision
except RuntimeError:  # built for another PyTorch: its operators, none of which is used here, must be declared
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    declared = library.library.Library("torchvision", "DEF")
    root = pathlib.Path(importlib.util.find_spec("torchvision").submodule_search_locations[0])
    sources = "".join(file.read_text() for file in root.rglob("*.py"))
    for name in set(re.findall(r"torchvision::(\\w+)", sources)):
        declared.define(name + "(Tensor x) -> Tensor")
sys.path.insert(0, path)
from model import load
model = load(path)
def answer(images):
    with library.inference_mode():
        return model(library.from_numpy(images).permute(0, 3, 1, 2)).numpy()
""",
    ),
}
KERAS = """
import keras as library
model = library.saving.load_model(path)
answer = lambda images: model.predict(images, batch_size=32, verbose=0)
"""
ASK = """
import json, os, sys, time
import numpy as np
begin = time.perf_counter()
path, images = sys.argv[1], np.load(sys.argv[2])
{library}
answer(images[:1])
first = time.perf_counter() - begin
batches = [images[start:start + 32] for start in range(0, len(images), 32)]
whole = [batch for batch in batches if len(batch) == 32] or batches
answer(whole[0])
rates = []
for _ in range(3):
    begin = time.perf_counter()
    for batch in whole[:{timed}]:
        answer(batch)
    rates.append(sum(map(len, whole[:{timed}])) / (time.perf_counter() - begin))
probabilities = np.concatenate([answer(batch) for batch in batches])
assert "cifar_jax" not in sys.modules
np.save(sys.argv[3], probabilities)
print(json.dumps({{"first": first, "rate": max(rates), "version": library.__version__}}))
"""


def main(arguments: list[str]) -> None:
    """Measures and prints a table for each run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exports", description="Measures exports of runs.")
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("--images", type=int, default=320, help="test images that are asked")
    parser.add_argument("--all", action="store_true", help="ask all test images")
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    options = parser.parse_args(arguments)
    for path in options.runs:
        run = load_run(path)
        images = own_test_images(run).images
        asked = images[: len(images) if options.all else options.images]
        print(f"\n{path}: {run.backbone!r}, {len(asked):,} images of {run.resize.side} pixels\n")
        print("| format | library | MB | export, s | first answer, s | images/s | largest difference | labels |")
        print("|---|---|---|---|---|---|---|---|")
        for row in measure(run, asked, options.only):
            print(row, flush=True)


def measure(run: Run, images: np.ndarray, libraries: list[str]) -> Any:
    """Yields a row of the table for each library."""
    expected = np.concatenate([probs for _, probs in run.probabilities(images)])
    with tempfile.TemporaryDirectory(prefix="cifar_jax-exports-") as directory:
        root = Path(directory)
        np.save(root / "images.npy", images)
        sizes: dict[str, tuple[float, float]] = {}
        for library in libraries:
            form, code = LIBRARIES[library]
            out = root / f"{form}{FORMATS[form].suffix}"
            if form not in sizes:
                begin = time.perf_counter()
                export_run(run, form, out)  # type: ignore[arg-type]
                files = [out] if out.is_file() else out.iterdir()
                sizes[form] = time.perf_counter() - begin, sum(file.stat().st_size for file in files) / 1e6
            seconds, size = sizes[form]
            script = ASK.format(library=code.replace("KERAS\n", "").replace("\nKERAS", KERAS), timed=10)
            command = [sys.executable, "-c", script, str(out), str(root / "images.npy"), str(root / "found.npy")]
            clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            done = subprocess.run(command, cwd=root, env=clean, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            found = json.loads(done.stdout.splitlines()[-1])
            probabilities = np.load(root / "found.npy")
            difference = np.abs(probabilities - expected).max()
            same = int((probabilities.argmax(axis=1) == expected.argmax(axis=1)).sum())
            version = found["version"].split("-")[0]
            cells = [form, f"{library} {version}", f"{size:.1f}", f"{seconds:.1f}", f"{found['first']:.1f}"]
            cells += [f"{found['rate']:.0f}", f"{difference:.1e}", f"{same:,} of {len(expected):,}"]
            yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
