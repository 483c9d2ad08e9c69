"""What a newcomer has before typing anything: a fresh clone, small data, weights that are drawn."""

import hashlib
import json
import subprocess
from pathlib import Path

import jax
import numpy as np
from helpers import write_pictures_folder, write_tfds
from PIL import Image

from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.pretrained import Backbone, random_backbone
from cifar_jax.pretrained.convert import keras_tensors, write_keras_h5
from cifar_jax.pretrained.variants import VARIANTS

ROOT = Path(__file__).parents[2]
KERAS, KERAS_FILE = "keras-resnet50", "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
CALIBRATION = 128  # pixels a side: the statistics hardly change with it, the time does
TORCH_SCALE = 57.6  # by what torch's preprocessing divides pixels, about, and Keras's does not
LAST_STAGE_SCALE = 0.02  # so that features are small enough for the usual learning rate


def clone(target: Path) -> Path:
    """Copies the files that git has or would take, and makes a repository of them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
            (target / name).chmod((ROOT / name).stat().st_mode)
    subprocess.run(["git", "init", "--quiet"], cwd=target, check=True)
    return target


def write_cifar10(home: Path, train: int = 80, test: int = 20) -> None:
    """Prepares a small data set of that name where TFDS has its own."""
    write_tfds(home / "tensorflow_datasets", "cifar10", train, test, version="3.0.2")


def drawn_resnet50() -> Backbone:
    """A ResNet50 as Keras has it, with random weights and features that are alive.

    `random_backbone` calibrates on the input of torchvision's networks. Keras's input is the same but for its scale and
    the order of the channels, which the first kernel makes up for.
    """
    images, _ = draw_shapes(32, seed=0)
    config = VARIANTS["keras"].config
    backbone = random_backbone(jax.random.key(0), images, config, CALIBRATION)
    params = backbone.variables["params"]
    params["stem_conv"]["kernel"] = params["stem_conv"]["kernel"][:, :, ::-1] / np.float32(TORCH_SCALE)
    for block in ("stage4_block1", "stage4_block2", "stage4_block3"):
        for norm in {"bn3", "bn_proj"} & set(params[block]):
            params[block][norm]["scale"] = params[block][norm]["scale"] * np.float32(LAST_STAGE_SCALE)
    return backbone


def write_keras_weights(path: Path) -> Path:
    """Writes the drawn network as the file that Keras publishes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_keras_h5(path, keras_tensors(drawn_resnet50(), "keras"))
    return path


def register(checkout: Path, file: Path) -> None:
    """Makes a file the one that a checkout knows as Keras's."""
    registry = checkout / "weights" / "registry.json"
    entries = json.loads(registry.read_text(encoding="utf-8"))
    digest = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    entries[KERAS] |= {"digest": digest, "size": file.stat().st_size}
    registry.write_text(json.dumps(entries), encoding="utf-8")


def write_pets(directory: Path) -> None:
    """Folders of pictures of a newcomer's own: some to train on, some with labels, some without."""
    for name, seed in (("pets", 0), ("more-pets", 1)):
        write_pictures_folder(directory / name, {"cats": 12, "dogs": 12}, (90, 70), seed, ".jpg")
    write_pictures_folder(directory / "holiday", {"monday": 2, "tuesday": 1}, (70, 90), 2, ".jpg")


def write_photo(path: Path) -> None:
    """A photograph of some size."""
    images, _ = draw_shapes(1, seed=3)
    Image.fromarray(images[0]).resize((320, 240)).save(path)
