"""A ResNet with a dense head in PyTorch: `load()` gives the module, `python model.py PHOTO...` prints its top classes.

Written by cifar_jax, which it does not need; it needs torch, torchvision and safetensors.
"""

import argparse
import json
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import nn
from torchvision.models.resnet import Bottleneck
from torchvision.transforms import functional as transforms


class Classifier(nn.Module):
    """Class probabilities of RGB pixels in 0..255, uint8 or float [N, 3, side, side]."""

    def __init__(self, config):
        super().__init__()
        self.config, network = config, config["network"]
        self.factor = config["image_size"] // config["side"]
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))
        width, norm = network["width"], partial(nn.BatchNorm2d, eps=network["bn_epsilon"])
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), norm(width)
        self.maxpool, inputs = nn.MaxPool2d(3, stride=2, padding=network["pool_padding"]), width
        for stage, num_blocks in enumerate(network["stage_sizes"]):
            stride, outputs = 2 if stage else 1, 4 * width * 2**stage
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
            blocks = [Bottleneck(inputs, outputs // 4, stride, shortcut, norm_layer=norm)]
            if network["stride_in_1x1"]:  # as in Keras
                blocks[0].conv1.stride, blocks[0].conv2.stride = blocks[0].conv2.stride, blocks[0].conv1.stride
            blocks += [Bottleneck(outputs, outputs // 4, norm_layer=norm) for _ in range(num_blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            inputs = outputs
        dense = [layer for sizes in pairwise(config["head"]) for layer in (nn.Linear(*sizes), nn.ReLU())]
        self.fc = nn.Sequential(*dense[:-1])

    def features(self, images):
        """Pooled features, [N, features]."""
        side = self.config["side"]
        if images.shape[1:] != (3, side, side):  # the convolutions would take other sizes, and mislead
            raise ValueError(f"images must be [N, 3, {side}, {side}], got {list(images.shape)}")
        x = (images.to(self.mean) - self.mean) / self.std  # of the module's dtype, on its device
        x = nn.functional.interpolate(x, scale_factor=self.factor, mode="nearest") if self.factor > 1 else x
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for stage in range(len(self.config["network"]["stage_sizes"])):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x.mean((2, 3))

    def logits(self, images):
        """Logits, [N, classes]."""
        return self.fc(self.features(images))

    def forward(self, images):
        """Probabilities, [N, classes]."""
        return self.logits(images).softmax(-1)


def load(directory=Path(__file__).parent):
    """Loads the module in evaluation mode, on the CPU."""
    model = Classifier(json.loads((Path(directory) / "config.json").read_text(encoding="utf-8")))
    model.load_state_dict(load_file(Path(directory) / "model.safetensors"))
    return model.eval()


def read_photo(path, resize):
    """Reads a photo as uint8 [3, side, side], white behind transparent parts, by the rule `resize` of config.json."""
    with Image.open(path) as file:
        image, side = ImageOps.exif_transpose(file), resize["side"]
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit greys, which Pillow would clip at 255
        grey = np.asarray(image, np.float64)
        grey = grey / 257 if image.mode != "F" or grey.max() > 255 else grey
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if resize["method"] == "eval-transform":
        image = transforms.resize(image, resize["shorter"], transforms.InterpolationMode(resize["interpolation"]))
        return transforms.pil_to_tensor(transforms.center_crop(image, side))
    square = min(image.size)  # reduced to the small images of the training
    left, top = ((length - square) // 2 for length in image.size)
    image = image.crop((left, top, left + square, top + square))
    return transforms.pil_to_tensor(image.resize((side, side), Image.Resampling.BICUBIC))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prints the top classes of photos.")
    parser.add_argument("photos", nargs="+", metavar="PHOTO")
    photos, model, status = parser.parse_args().photos, load(), 0
    for path in photos:
        try:
            photo = read_photo(path, model.config["resize"])
        except Exception as error:  # Pillow raises all kinds of them on corrupt files
            status = 1
            print(f"{path} cannot be read as a photo: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
            continue
        with torch.inference_mode():
            best = model(photo[None])[0].topk(min(3, model.config["head"][-1]))
        names = [model.config["class_names"][label] for label in best.indices]
        print(path, *(f"{name} {value:.1%}" for name, value in zip(names, best.values, strict=True)), sep="  ")
    if status:
        sys.exit(status)
