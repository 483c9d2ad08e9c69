"""Makes tests/golden/outputs again: what other libraries' ResNet50s give for the drawn network and the drawn images.

    PYTHONPATH=. python tests/make_golden.py

The metadata of each file says by which versions it was made. What holds ours against them, tests/test_golden.py, needs
none of the libraries.
"""

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
from golden import outputs
from golden.draw import draw_images
from golden.outputs import IMAGE_SIZE, NUM_IMAGES, PEERS, Peer
from golden.published import in_layout, place
from parity import networks, torch_networks
from parity.compare import assert_alive

NUM_MORE = 16  # images that tell whether a network is alive

Filled = tuple[Callable[[np.ndarray], Sequence[np.ndarray]], tuple[np.ndarray, np.ndarray]]


def filled_keras(peer: Peer) -> Filled:
    """The drawn network in Keras: as a function, and its statistics."""
    lib = import_module(peer.library)
    build, top = (networks.of_2016, "fc1000") if "2016" in peer.manifest else (networks.modern, "predictions")
    model, left = build(lib, IMAGE_SIZE, top), peer.network()
    for layer in model.layers:
        for variable in layer.weights:
            at = place(layer.name, f"{layer.name}/{variable.name.split('/')[-1]}")
            variable.assign(in_layout(left.pop(at), tuple(variable.shape)))
    assert not left, left.keys()
    return networks.watched(lib, model, IMAGE_SIZE, top), networks.statistics(model)


def filled_torch(libs: SimpleNamespace, peer: Peer) -> Filled:
    """The drawn network in one of PyTorch's libraries."""
    case = torch_networks.TorchCase(peer.library, "hub", 0, IMAGE_SIZE, usual=peer.usual_pixels, in_1x1=peer.in_1x1)
    model, left = torch_networks.build(libs, case), peer.network()
    state = {}
    for name, tensor in model.state_dict().items():
        at = place(name.rpartition(".")[0], name)
        value = np.array(0) if at[-1] == "count" else left.pop(at)
        state[name] = libs.torch.tensor(in_layout(value, tuple(tensor.shape)))
    assert not left, left.keys()
    model.load_state_dict(state, strict=True)
    return torch_networks.TorchReference(libs, model, case), torch_networks.statistics(model)


def made_by(peer: Peer) -> dict[str, str]:
    """Versions, by the names of packages."""
    below = ["tensorflow_cpu"] if "keras" in peer.library else ["torch"]
    return {package: version(package) for package in [peer.library, *below]}


def make(name: str, filled: Filled) -> None:
    """Asks a network, makes sure that it is alive, and keeps what it gives."""
    run, statistics = filled
    assert_alive(run(draw_images(NUM_MORE)), *statistics)
    outputs.write(name, run(draw_images(NUM_IMAGES)), made_by(PEERS[name]))


if __name__ == "__main__":
    os.environ["KERAS_BACKEND"] = "tensorflow"
    with torch_networks.imported() as libs:
        for name, peer in PEERS.items():
            make(name, filled_keras(peer) if "keras" in peer.library else filled_torch(libs, peer))
