"""Published weights files: their tensors, the variable that each tensor fills, and writers for such files.

Everything is derived from the files' own names, independently of the name maps of the package, which are tested against
it.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np
import safetensors.numpy
from torch_files import write_torch

MANIFESTS = Path(__file__).resolve().parent / "manifests"
TOPS = ("predictions", "probs", "fc1000", "fc", "classifier.1")

# layer or module -> its tensors as (name, shape); written by tests/make_manifests.py
Manifest = Mapping[str, list[tuple[str, tuple[int, ...]]]]
Value = Callable[[str, str, tuple[int, ...]], np.ndarray]  # (layer, name, shape) -> the tensor


def read_manifest(name: str) -> Manifest:
    """Reads a manifest by the name of its file."""
    layers = json.loads((MANIFESTS / f"{name}.json").read_text(encoding="utf-8"))
    return {layer: [(weight, tuple(shape)) for weight, shape in weights] for layer, weights in layers.items()}


def tensors_of(manifest: Manifest) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yields all tensors as (layer, name, shape)."""
    return ((layer, name, shape) for layer, weights in manifest.items() for name, shape in weights)


def write_keras(path: Path, manifest: Manifest, value: Value) -> Path:
    """Writes a weights file as Keras 1 and 2 do, including layers without weights."""
    layers = {"input_1": [], **manifest, "activation_49": []}
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer, weights in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name, _ in weights]
            for name, shape in weights:
                group[name] = value(layer, name, shape)
    return path


def write_pth(path: Path, manifest: Manifest, value: Value) -> Path:
    """Writes a state dict as PyTorch does."""
    return write_torch(path, {name: value(layer, name, shape) for layer, name, shape in tensors_of(manifest)})


def write_safetensors(path: Path, manifest: Manifest, value: Value) -> Path:
    """Writes a safetensors file as timm and transformers do."""
    held = {name: np.ascontiguousarray(value(layer, name, shape)) for layer, name, shape in tensors_of(manifest)}
    safetensors.numpy.save_file(held, path, metadata={"format": "pt"})
    return path


_CONV = {"kernel": ("kernel", "W", "weight"), "bias": ("bias", "b")}
_NORM = {
    "scale": ("gamma", "weight"),
    "bias": ("beta", "bias"),
    "mean": ("moving_mean", "running_mean"),
    "var": ("moving_variance", "running_std", "running_var"),
    "count": ("num_batches_tracked",),
}


def place(layer: str, name: str) -> tuple[str, ...]:
    """Returns the path of the variable that a tensor fills; `top` starts classifier paths, `count` ends unneeded ones.

    Args:
      layer: name of the tensor's layer in its library.
      name: name of the tensor, which starts with the layer's.
    """
    tensor = re.sub(r":0$", "", name.removeprefix(layer)[1:])
    if layer in TOPS:
        return ("top", _leaf(_CONV, tensor))
    at = _module(layer)
    leaf = _leaf(_NORM if "bn" in at[-1] else _CONV, tensor)
    return ("batch_stats" if leaf in ("mean", "var") else "params", *at, leaf)


def _leaf(names: Mapping[str, tuple[str, ...]], tensor: str) -> str:
    (leaf,) = (leaf for leaf, known in names.items() if tensor in known)
    return leaf


_STEM = {
    "conv1": "stem_conv",
    "conv1_conv": "stem_conv",
    "embedder.embedder.convolution": "stem_conv",
    "bn1": "stem_bn",
    "bn_conv1": "stem_bn",
    "conv1_bn": "stem_bn",
    "embedder.embedder.normalization": "stem_bn",
}
# Name patterns of a block's layers: stage and block as counted by the library, kind, and role.
_KERAS = re.compile(r"conv(?P<stage>\d)_block(?P<block>\d)_(?P<role>\d)_(?P<kind>conv|bn)")
_KERAS_2016 = re.compile(r"(?P<kind>res|bn)(?P<stage>\d)(?P<block>[a-f])_branch(?P<role>1|2[abc])")
_TORCHVISION = re.compile(
    r"layer(?P<stage>\d)\.(?P<block>\d)\.(?:(?P<kind>conv|bn)(?P<role>\d)|downsample\.(?P<at>\d))"
)
_TRANSFORMERS = re.compile(
    r"encoder\.stages\.(?P<stage>\d)\.layers\.(?P<block>\d)\."
    r"(?:layer\.(?P<role>\d)|shortcut)\.(?P<kind>convolution|normalization)"
)


def _module(layer: str) -> tuple[str, ...]:
    layer = layer.removeprefix("resnet.")
    if layer in _STEM:
        return (_STEM[layer],)
    if found := _KERAS.fullmatch(layer):
        role = found["role"].replace("0", "_proj")
        return _in_block(int(found["stage"]) - 1, int(found["block"]), found["kind"], role)
    if found := _KERAS_2016.fullmatch(layer):
        role = {"1": "_proj", "2a": "1", "2b": "2", "2c": "3"}[found["role"]]
        return _in_block(int(found["stage"]) - 1, "abcdef".index(found["block"]) + 1, found["kind"], role)
    if found := _TORCHVISION.fullmatch(layer):
        kind = found["kind"] or {"0": "conv", "1": "bn"}[found["at"]]
        return _in_block(int(found["stage"]), int(found["block"]) + 1, kind, found["role"] or "_proj")
    found = _TRANSFORMERS.fullmatch(layer)
    assert found, layer
    role = str(int(found["role"]) + 1) if found["role"] else "_proj"
    return _in_block(int(found["stage"]) + 1, int(found["block"]) + 1, found["kind"], role)


def _in_block(stage: int, block: int, kind: str, role: str) -> tuple[str, ...]:
    """Returns the path of a block's module; stage and block count from one."""
    ours = {"res": "conv", "convolution": "conv", "normalization": "bn"}.get(kind, kind)
    return (f"stage{stage}_block{block}", ours + role)


def in_layout(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Transposes a kernel [height, width, in, out] or a classifier's [in, out] to the shape in the file, if needed."""
    if tensor.shape != shape:
        tensor = tensor.transpose(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
    assert tensor.shape == shape, (tensor.shape, shape)
    return np.ascontiguousarray(tensor)
