"""Chromium, a copy of onnxruntime-web, and exported pages."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY, narrow_networks, without_pictures
from PIL import Image

from cifar_jax import load_run
from cifar_jax.cli.main import main
from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.export.trained_model import TrainedModel, trained_model
from cifar_jax.export.web import write_web
from cifar_jax.runs.reader import Run

PHOTOS = os.environ.get("CIFAR_JAX_PHOTOS")


@pytest.fixture(scope="session")
def ort_web() -> str:
    """The directory `dist` of onnxruntime-web."""
    directory = os.environ.get("CIFAR_JAX_ORT_WEB")
    if not directory:
        pytest.skip("CIFAR_JAX_ORT_WEB does not name the directory dist of onnxruntime-web; use `make test-browser`")
    return directory


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium, started once."""
    pytest.importorskip("selenium", reason="selenium is not installed; `make test-browser` installs it")
    found = [shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")]
    if not all(found):
        pytest.skip("there is no Chromium with chromedriver; `apt-get install chromium chromium-driver` installs them")
    from browser.chromium import start

    driver = start(*found, tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder train/CLASS and test/CLASS of two classes: that of $CIFAR_JAX_PHOTOS, else drawn JPEG files."""
    if PHOTOS:
        return Path(PHOTOS)
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, per_class in (("train", 40), ("test", 10)):
        images, labels = draw_shapes(10 * per_class, seed=per_class)
        for label, name in enumerate(("discs", "rings")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number, image in enumerate(images[labels == label]):
                width, height = (int(length) for length in rng.integers(120, 500, 2))
                Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    return root


def trained(root: Path, *options: str) -> Run:
    """Trains a run in `root`. Fixtures that do it ask for Chromium first, without which it would be in vain."""
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        patch.setenv("CIFAR_JAX_CACHE", str(root / "cache"))
        assert main(["train", *options, "--out", str(root / "run")]) == 0
    return load_run(root / "run")


@pytest.fixture(scope="session")
def photo_run(driver: Any, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on photos of 64 pixels with the weights of the demo, whose pictures are resized and cropped."""
    size = ("--weights", "demo", "--image-size", "64", "--resize", "eval-transform")
    epochs = ("--epochs", "10", "--hidden", "16", "--no-progress")
    return trained(tmp_path_factory.mktemp("photo-run"), "--dataset", str(photos), *size, *epochs)


@pytest.fixture(scope="session")
def shapes_run(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on drawn squares of 32 pixels, which are upsampled to 64 inside the network, ten classes."""
    with pytest.MonkeyPatch.context() as patch:
        narrow_networks(patch)
        size = ("--image-size", "64", "--epochs", "4", "--no-progress")
        return trained(tmp_path_factory.mktemp("shapes-run"), *TINY, *size)


@pytest.fixture(scope="session")
def shapes_model(shapes_run: Run) -> TrainedModel:
    """The small run as a model to export."""
    return trained_model(shapes_run)


@pytest.fixture
def make_page(ort_web: str, driver: Any, tmp_path: Path) -> Callable[..., Any]:
    """Writes a model as a page with the runtime built in, and opens it."""
    from browser.chromium import Page

    def make(model: TrainedModel, width: int = 1100, **options: Any) -> Page:
        path = tmp_path / "page.html"
        write_web(model, path, **({"ort_web": ort_web} | options))
        return Page(driver, path, width)

    return make
