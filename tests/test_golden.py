"""Outputs of other libraries, stored in tests/golden, agree with ours from their files, and no mistake goes unnoticed.

Neither Keras nor PyTorch is needed: tests/make_golden.py ran them. `make parity` runs them again, on real images.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import make_golden_features
import numpy as np
import pytest
from conftest import relative_difference
from golden import draw, outputs
from golden.outputs import IMAGE_SIZE, NUM_IMAGES, PEERS, Peer
from golden.published import in_layout, place, read_manifest, write_keras, write_pth, write_safetensors
from parity.compare import TOLERANCE, differing, our_outputs
from parity.mistakes import MISTAKES
from parity.torch_networks import IMAGENET, OTHER

from cifar_jax import Backbone, load_backbone, make_extractor
from cifar_jax.features.cache import EXTRACTION_VERSION

# Mistakes that are tried on each network; `make parity` tries all of them on all.
FEW = ("the other stride", "epsilon 1.001e-5", "pixels of another file", "shortcut and last convolution swapped")
MISTAKEN = {"keras": tuple(MISTAKES), "keras-2016": FEW, "torchvision": FEW}


class Golden(NamedTuple):
    """A network of another library, loaded from a file, and the outputs of that library."""

    name: str
    backbone: Backbone
    kept: dict[str, np.ndarray]
    about: dict[str, str]

    def differences(self, backbone: Backbone) -> dict[str, float]:
        """Relative differences between a network's outputs and the library's."""
        run = our_outputs(backbone, IMAGE_SIZE, compiled=False)
        ours = outputs.kept(run(draw.draw_images(NUM_IMAGES)))
        return {name: relative_difference(ours[name], kept) for name, kept in self.kept.items()}


@pytest.fixture(scope="module", params=PEERS)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Golden]:
    directory = tmp_path_factory.mktemp("golden")
    path = write(directory, PEERS[request.param])
    yield Golden(request.param, load_backbone(path), *outputs.read(request.param))
    for file in directory.iterdir():
        file.unlink()


def write(directory: Path, peer: Peer) -> Path:
    """Writes the drawn network in the format of the peer's library."""
    network = peer.network()

    def value(layer: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        at = place(layer, name)
        return np.array(7) if at[-1] == "count" else in_layout(network[at], shape)

    manifest = read_manifest(peer.manifest)
    if "keras" in peer.library:
        return write_keras(directory / "weights.h5", manifest, value)
    if peer.library == "torchvision":
        return write_pth(directory / "weights.pth", manifest, value)
    write_safetensors(directory / "model.safetensors", manifest, value)
    for name, content in descriptions(peer).items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    return directory


def descriptions(peer: Peer) -> dict[str, dict[str, object]]:
    """Configs next to the weights of timm and transformers."""
    mean, std = IMAGENET if peer.usual_pixels else OTHER
    if peer.library == "timm":
        about = {"mean": mean, "std": std, "input_size": (3, IMAGE_SIZE, IMAGE_SIZE)}
        return {"config.json": {"architecture": "resnet50", "pretrained_cfg": about}}
    return {
        "config.json": {"model_type": "resnet", "downsample_in_bottleneck": peer.in_1x1},
        "preprocessor_config.json": {"image_mean": mean, "image_std": std, "size": {"shortest_edge": IMAGE_SIZE}},
    }


def test_outputs_agree(golden: Golden) -> None:
    drawn = draw.fingerprint(PEERS[golden.name].network())
    assert golden.about["drawn"] == drawn, "this machine draws another network than the one that was asked"
    found = golden.differences(golden.backbone)
    assert differing(found) == {} and len(found) == 6


@pytest.mark.parametrize("golden", MISTAKEN, indirect=True)
def test_mistakes_are_noticed(golden: Golden) -> None:
    """The pooled features have one shape whatever the mistake, so they alone must tell."""
    made = 0
    for name in MISTAKEN[golden.name]:
        with pytest.MonkeyPatch.context() as patch:
            mistaken = MISTAKES[name](golden.backbone, patch)
            if mistaken is None:
                continue  # no mistake in this network
            found, made = golden.differences(mistaken)["pooled"], made + 1
        assert found > 10 * TOLERANCE, (name, found)
    assert made >= len(FEW)


@pytest.mark.parametrize("golden", ["torchvision"], indirect=True)
def test_extractor_agrees(golden: Golden) -> None:
    """Covers the folded network."""
    features = make_extractor(golden.backbone, IMAGE_SIZE)(draw.draw_images(NUM_IMAGES))
    assert relative_difference(features, golden.kept["pooled"]) <= TOLERANCE


def test_features_are_those_of_the_extraction_version() -> None:
    """Feature caches are keyed by the version, so features that change without it would be read from old caches."""
    again = "make the golden file anew: PYTHONPATH=. python tests/make_golden_features.py"
    _, version = make_golden_features.read()
    assert version == EXTRACTION_VERSION, f"EXTRACTION_VERSION is another: {again}"
    assert make_golden_features.moved() <= TOLERANCE, (
        "Features have moved beyond rounding, and caches hold those of before: raise EXTRACTION_VERSION in "
        f"cifar_jax/features/cache.py, and {again}"
    )
