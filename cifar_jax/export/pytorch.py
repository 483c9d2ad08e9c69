"""Export to PyTorch: weights under torchvision's names, the facts about them, and the few lines that run them."""

import re
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from cifar_jax.export.rgb import in_rgb, pixel_statistics
from cifar_jax.export.trained_model import TrainedModel
from cifar_jax.files import write_json
from cifar_jax.models.backbone import Backbone
from cifar_jax.pretrained.convert import Tensors, torch_tensors

WEIGHTS, CONFIG, CODE = "model.safetensors", "config.json", "model.py"


def write_pytorch(model: TrainedModel, directory: Path) -> dict[str, str]:
    """Writes a classifier into an empty directory, without PyTorch. Returns what is worth saying about it.

    `model.py` defines the module and loads it; it needs torch, torchvision and safetensors. `config.json` has the
    fields of `about_of`, `side` and `head`, the widths from features to classes; its input, preprocessing and network
    are those of the stored tensors, which take RGB and have no biases of convolutions.

    Raises:
      UserError: if the backbone or the head is a function.
    """
    backbone, head = in_rgb(model.resnet("pytorch")), model.dense_layers("pytorch")
    tensors = _backbone_tensors(backbone)
    for number, layer in enumerate(head):
        name = f"fc.{2 * number}"  # every other one is a relu
        tensors |= {f"{name}.weight": np.ascontiguousarray(layer["kernel"].T), f"{name}.bias": layer["bias"]}
    # Not save_file, which makes a file that nobody else may read.
    (directory / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
    image = f"images, uint8 or float [N, 3, {model.side}, {model.side}], RGB, 0..255"
    about = {
        "input": image,
        "side": model.side,
        "preprocessing": asdict(backbone.preprocessing),
        "network": asdict(replace(backbone.config, conv_bias=False)),
        "head": [backbone.num_features, *(layer["bias"].size for layer in head)],
    }
    write_json(directory / CONFIG, model.about | about)
    code = resources.files("cifar_jax.export").joinpath("templates", CODE)
    (directory / CODE).write_bytes(code.read_bytes())
    return {
        "input": image,
        "weights": f"{WEIGHTS}, {len(tensors)} tensors under torchvision's names",
        "use": f"python {CODE} photo.jpg, or load() of {CODE}; they need torch, torchvision and safetensors",
    }


def _backbone_tensors(backbone: Backbone) -> Tensors:
    """Tensors under torchvision's names, without biases of convolutions, and `mean` and `std` [3, 1, 1] of pixels."""
    tensors = torch_tensors(backbone, "torchvision")
    for name in [name for name in tensors if re.search(r"(conv\d|downsample\.0)\.bias$", name)]:
        # BatchNorm subtracts its mean from the sum.
        norm = name.removesuffix(".bias").replace("downsample.0", "downsample.1").replace("conv", "bn")
        tensors[f"{norm}.running_mean"] = tensors[f"{norm}.running_mean"] - tensors.pop(name)
    mean, std = pixel_statistics(backbone.preprocessing)
    return tensors | {"mean": mean.reshape(3, 1, 1), "std": std.reshape(3, 1, 1)}
