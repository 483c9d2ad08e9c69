"""Generates tests/golden/manifests: names and shapes of the tensors in the published ResNet50 files, without values.

    PYTHONPATH=. python tests/make_manifests.py

They are derived from files that the libraries write, in the libraries' order; layers without weights are left out.

- Keras: the newer files as tf_keras writes them, with the top called `probs` as published; those of 2016 by Keras 1's
  rule, `res2a_branch2a_W:0` directly in the layer's group. The order of the layers is today's.
- torchvision V2, timm, transformers: as they write them today, 320 tensors with `num_batches_tracked`.
- torchvision V1: 267 tensors, without `num_batches_tracked`, which PyTorch has had since 0.4.1. The published size
  proves it: 267 tensors, the trained ones as parameters, in PyTorch's container with storage keys of 15 digits make
  102,530,333 bytes exactly; 320 cannot.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import h5py
import numpy as np
import safetensors
from golden.published import MANIFESTS, Manifest
from parity import networks, torch_networks
from parity.torch_networks import TorchCase, TorchReference

IMAGE_SIZE = 224
COUNT = "num_batches_tracked"


def of_keras(tf_keras: ModuleType) -> dict[str, Manifest]:
    """Returns Keras's manifests by their names in weights/registry.json."""
    modern, of_2016 = networks.modern, networks.of_2016
    return {
        "keras-resnet50": keras_manifest(modern(tf_keras, IMAGE_SIZE, None), "save_weights"),
        "keras-resnet50-top": keras_manifest(modern(tf_keras, IMAGE_SIZE, "probs"), "save_weights"),
        "keras-resnet50-2016": keras_manifest(of_2016(tf_keras, IMAGE_SIZE, None), "keras-1"),
        "keras-resnet50-2016-top": keras_manifest(of_2016(tf_keras, IMAGE_SIZE, "fc1000"), "keras-1"),
    }


def keras_manifest(model: Any, writer: str) -> Manifest:
    """Returns the manifest of a file of the model's weights."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "weights.h5"
        networks.WRITERS[writer](model, path)
        with h5py.File(path) as file:
            layers = {layer: list(file[layer].attrs["weight_names"]) for layer in texts(file.attrs["layer_names"])}
            return {
                layer: [(weight, file[layer][weight].shape) for weight in texts(weights)]
                for layer, weights in layers.items()
                if weights
            }


def texts(names: Any) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def of_torch(libs: SimpleNamespace) -> dict[str, Manifest]:
    """Returns the manifests of PyTorch's libraries."""
    torchvision = torch_manifest(libs, TorchCase("torchvision", "pth", 0, IMAGE_SIZE))
    without_counts = {
        module: [(name, shape) for name, shape in tensors if not name.endswith(COUNT)]
        for module, tensors in torchvision.items()
    }
    return {
        "torchvision-resnet50-v1": without_counts,
        "torchvision-resnet50-v2": torchvision,
        "timm-resnet50": torch_manifest(libs, TorchCase("timm", "hub", 0, IMAGE_SIZE)),
        "huggingface-resnet50": torch_manifest(libs, TorchCase("transformers", "hub", 0, IMAGE_SIZE)),
    }


def torch_manifest(libs: SimpleNamespace, case: TorchCase) -> Manifest:
    """Returns the manifest of a file of the case's network."""
    reference = TorchReference(libs, torch_networks.build(libs, case), case)
    manifest: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    with TemporaryDirectory() as directory:
        path = torch_networks.WRITERS[case.writer](reference, Path(directory))
        for name, shape in names_and_shapes(libs, path):
            manifest.setdefault(name.rpartition(".")[0], []).append((name, shape))
    return manifest


def names_and_shapes(libs: SimpleNamespace, path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the tensors of a file or a directory."""
    if path.is_file():
        yield from ((name, tuple(tensor.shape)) for name, tensor in libs.torch.load(path).items())
        return
    with safetensors.safe_open(path / "model.safetensors", framework="np") as file:
        yield from ((name, np.shape(file.get_tensor(name))) for name in file.keys())  # noqa: SIM118


def to_json(layers: Manifest) -> str:
    """A layer a line."""
    lines = (f"  {json.dumps(layer)}: {json.dumps(weights)}" for layer, weights in layers.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    import tf_keras

    MANIFESTS.mkdir(parents=True, exist_ok=True)
    with torch_networks.imported() as libs:
        made = of_keras(tf_keras) | of_torch(libs)
    for name, layers in made.items():
        (MANIFESTS / f"{name}.json").write_text(to_json(layers), encoding="utf-8")
