"""Folders of small pictures for tests, one folder a class, and runs trained on them."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from helpers import narrow_networks, without_pictures
from PIL import Image

from cifar_jax.cli.main import main
from cifar_jax.data.sources.shapes import draw_shapes

# Names of classes that need quoting in CSV and escaping in patterns, by the shape that is drawn.
CLASSES = {"disc": "disc, filled", "square": "[square]", "cross": "Käfer"}
SHAPES = ("disc", "ring", "square", "triangle", "cross")
SIZE = (48, 40)  # of the pictures, width and height
# Options of a run that takes seconds.
QUICK = (
    *("--weights", "random-w16", "--image-size", "32", "--hidden", "8"),
    *("--batch-size", "8", "--epochs", "8", "--lr", "0.1", "--momentum", "0.9"),
)
TINTS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255))


def draw_folder(
    root: Path, per_class: int, seed: int, names: Mapping[str, str] = CLASSES, size: tuple[int, int] = SIZE
) -> Path:
    """Draws `root/CLASS/NUMBER.png` for each class; `names` has the folder of each shape.

    Each class has a colour, so that a network learns them in seconds, but every fourth picture has that of another.
    """
    images, labels = draw_shapes(10 * per_class, seed=seed)
    for label, shape in enumerate(SHAPES):
        if shape in names:
            folder = root / names[shape]
            folder.mkdir(parents=True)
            for number, image in enumerate(images[labels == label]):
                tint = Image.new("RGB", (32, 32), TINTS[(label + 2 * (number % 4 == 3)) % len(TINTS)])
                picture = Image.blend(Image.fromarray(image), tint, 0.6)
                picture.resize(size, Image.Resampling.NEAREST).save(folder / f"{number}.png")
    return root


def photo_run(root: Path, mode: str, size: tuple[int, int] = SIZE, *options: str) -> Path:
    """Trains on `root/data/{train,test}/CLASS/NUMBER.png`, drawn here, and returns the run directory."""
    draw_folder(root / "data" / "train", 20, 0, size=size)
    draw_folder(root / "data" / "test", 7, 1, size=size)
    return quick_run(root, root / "data", "--mode", mode, *options)


def quick_run(root: Path, dataset: Path, *options: str) -> Path:
    """Trains a narrow network on a data set, with `root/cache`, and returns the run directory `root/run`."""
    arguments = ["train", "--dataset", str(dataset), *QUICK, *options, "--out", str(root / "run")]
    with pytest.MonkeyPatch.context() as monkeypatch:
        narrow_networks(monkeypatch)
        without_pictures(monkeypatch)
        monkeypatch.setenv("CIFAR_JAX_CACHE", str(root / "cache"))
        assert main(arguments) == 0
    return root / "run"
