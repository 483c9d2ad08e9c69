"""Golden outputs of reference libraries for the drawn network."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from parity.compare import OUTPUTS

from golden import draw

DIRECTORY = Path(__file__).resolve().parent / "outputs"
IMAGE_SIZE, NUM_IMAGES = 64, 2
PLACES = 256  # number of positions at which stages and logits are stored


@dataclass(frozen=True)
class Peer:
    """A network built by a reference library.

    Attributes:
      library: keras, tf_keras, torchvision, timm or transformers.
      manifest: name of the manifest of its file.
      usual_pixels: see `usual` of `torch_networks.TorchCase`.
      in_1x1: see `torch_networks.TorchCase`.
    """

    library: str
    manifest: str
    usual_pixels: bool = True
    in_1x1: bool = False

    def network(self) -> dict[draw.Path, np.ndarray]:
        """Returns the drawn tensors that this network has; only Keras's convolutions have biases."""
        is_keras = "keras" in self.library
        drawn = _drawn(is_keras)
        return {path: value for path, value in drawn.items() if is_keras or not _is_conv_bias(path)}


PEERS = {
    "keras": Peer("keras", "keras-resnet50-top"),
    "tf_keras": Peer("tf_keras", "keras-resnet50-top"),
    "keras-2016": Peer("tf_keras", "keras-resnet50-2016-top"),
    "torchvision": Peer("torchvision", "torchvision-resnet50-v1"),
    "timm": Peer("timm", "timm-resnet50", usual_pixels=False),
    "transformers": Peer("transformers", "huggingface-resnet50"),
    "transformers-in-1x1": Peer("transformers", "huggingface-resnet50", in_1x1=True),
}


@functools.cache
def _drawn(loud_pixels: bool) -> dict[draw.Path, np.ndarray]:
    return draw.draw_network(loud_pixels)


def _is_conv_bias(path: draw.Path) -> bool:
    return path[-1] == "bias" and "conv" in path[-2]


def kept(outputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Selects the values to store: all pooled features, and each image's stages and logits at drawn positions."""
    named = dict(zip(OUTPUTS, outputs, strict=True))
    return {name: output if name == "pooled" else _at_places(name, output) for name, output in named.items()}


def _at_places(name: str, output: np.ndarray) -> np.ndarray:
    flat = output.reshape(len(output), -1)
    return np.ascontiguousarray(flat[:, draw.draw_positions(name, PLACES, flat.shape[1])])


def write(name: str, outputs: Sequence[np.ndarray], about: Mapping[str, str]) -> None:
    """Stores a reference network's outputs."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    about = {"drawn": draw.fingerprint(PEERS[name].network()), **about}
    safetensors.numpy.save_file(kept(outputs), DIRECTORY / f"{name}.safetensors", metadata=about)


def read(name: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a reference network's outputs and their metadata."""
    with safetensors.safe_open(DIRECTORY / f"{name}.safetensors", framework="np") as file:
        return {name: file.get_tensor(name) for name in OUTPUTS}, file.metadata()
