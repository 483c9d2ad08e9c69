"""Makes tests/golden/manifests again: names and shapes, no values, of what Keras's published ResNet50 files hold.

    python tests/make_manifests.py

They are derived, not copied: the names and shapes of the newer files are those that tf_keras writes, with the top
called `probs` as it is published; those of 2016 follow Keras 1's rule, `res2a_branch2a_W:0` right in the layer's group.
The order of the layers is today's and decides nothing. Layers without weights are left out.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import h5py
from parity.networks import WRITERS, modern, of_2016

DIRECTORY = Path(__file__).resolve().parent / "golden" / "manifests"
IMAGE_SIZE = 224

Manifest = dict[str, list[tuple[str, tuple[int, ...]]]]  # layer -> (name of a weight, shape)


def manifests(tf_keras: ModuleType) -> dict[str, Manifest]:
    """The manifests by the names that weights/registry.json gives the files."""
    return {
        "keras-resnet50": manifest(modern(tf_keras, IMAGE_SIZE, None), "save_weights"),
        "keras-resnet50-top": manifest(modern(tf_keras, IMAGE_SIZE, "probs"), "save_weights"),
        "keras-resnet50-2016": manifest(of_2016(tf_keras, IMAGE_SIZE, None), "keras-1"),
        "keras-resnet50-2016-top": manifest(of_2016(tf_keras, IMAGE_SIZE, "fc1000"), "keras-1"),
    }


def manifest(model: Any, writer: str) -> Manifest:
    """What a file of the model's weights holds, as the file itself says."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "weights.h5"
        WRITERS[writer](model, path)
        with h5py.File(path) as file:
            layers = {layer: list(file[layer].attrs["weight_names"]) for layer in texts(file.attrs["layer_names"])}
            return {
                layer: [(weight, file[layer][weight].shape) for weight in texts(weights)]
                for layer, weights in layers.items()
                if weights
            }


def texts(names: Any) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def to_json(layers: Manifest) -> str:
    """A layer a line."""
    lines = (f"  {json.dumps(layer)}: {json.dumps(weights)}" for layer, weights in layers.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    import tf_keras

    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name, layers in manifests(tf_keras).items():
        (DIRECTORY / f"{name}.json").write_text(to_json(layers), encoding="utf-8")
