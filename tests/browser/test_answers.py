"""A page says what the run says, from the pixels that the run makes."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cifar_jax.data.resize import Resize
from cifar_jax.data.sources.images import read_image
from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.export.trained_model import TrainedModel, trained_model
from cifar_jax.models.preprocess import INTERPOLATIONS
from cifar_jax.runs.reader import Run

pytestmark = pytest.mark.browser

STRIPS = (1801, 1303)  # more pixels than the page reads at a time
CLOSE = 0.01  # of probabilities; browsers and Pillow may decode a JPEG a grey level apart


def says_as_the_run(run: Run, page: Any, files: list[Path]) -> float:
    """Asserts that answers are those of the run; returns the largest difference of probabilities."""
    expected, answers = run.predict(files), page.give(*files)
    assert not any(expected.errors) and len(answers) == len(files)
    differences = []
    for row, answer in enumerate(answers):
        assert not answer.error, answer
        assert answer.name == expected.class_names[row], (files[row], answer)
        by_name = dict(zip(run.class_names, expected.probabilities[row].tolist(), strict=True))
        best = sorted(by_name, key=lambda name: -by_name[name])[:5]
        assert list(answer.probabilities) == best, (files[row], answer, by_name)
        differences += [abs(by_name[name] - value) for name, value in answer.probabilities.items()]
    assert max(differences) <= CLOSE
    return max(differences)


def test_photos(photo_run: Run, photos: Path, make_page: Callable[..., Any]) -> None:
    files = [path for folder in sorted((photos / "test").iterdir()) for path in sorted(folder.iterdir())[:10]]
    page = make_page(trained_model(photo_run))
    difference = says_as_the_run(photo_run, page, files)
    print(f"largest difference of probabilities on {len(files)} pictures: {difference:.1e}")
    assert page.console() == []


def test_upsampled_squares(
    shapes_run: Run, shapes_model: TrainedModel, make_page: Callable[..., Any], tmp_path: Path
) -> None:
    images, _ = draw_shapes(8, seed=3)
    sizes = [(32, 32), (32, 32), (50, 37), (37, 50), (401, 300), (20, 20), (33, 32), (640, 200)]
    files = [tmp_path / f"{number}.png" for number in range(len(images))]
    for image, size, file in zip(images, sizes, files, strict=True):
        Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).save(file)
    assert says_as_the_run(shapes_run, make_page(shapes_model), files) <= 1e-4


def a_photo(size: tuple[int, int] = (150, 90)) -> Image.Image:
    """A smooth coloured picture in which no two regions look alike."""
    small = np.random.default_rng(5).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def save_turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    a_photo().save(path, exif=exif, quality=95)


def save_transparent(path: Path) -> None:
    picture = a_photo().convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(path)


def save_grey16(path: Path) -> None:
    values = np.asarray(a_photo().convert("L"), np.uint16) * 257
    Image.fromarray(values).save(path)


def save_linear(path: Path) -> None:
    """Saves with the note that the values are linear in light, which browsers heed and the run does not."""
    about = PngInfo()
    about.add(b"gAMA", struct.pack(">I", 100_000))
    a_photo().save(path, pnginfo=about)


KINDS: dict[str, Callable[[Path], object]] = {
    "turned.jpg": save_turned,
    "transparent.png": save_transparent,
    "linear.png": save_linear,
    "grey.png": lambda path: a_photo().convert("L").save(path),
    "grey16.png": save_grey16,
    "palette.gif": lambda path: a_photo().quantize(64).save(path),
    "bits.bmp": lambda path: a_photo().save(path),
    "lossless.webp": lambda path: a_photo().save(path, lossless=True),
    "photo.jpg": lambda path: a_photo((700, 501)).save(path, quality=90),
}


def test_kinds_of_picture(
    shapes_run: Run, shapes_model: TrainedModel, make_page: Callable[..., Any], tmp_path: Path
) -> None:
    files = []
    for name, save in KINDS.items():
        files.append(tmp_path / name)
        save(files[-1])
    page = make_page(shapes_model)
    expected = shapes_run.predict(files)
    for row, (file, answer) in enumerate(zip(files, page.give(*files), strict=True)):
        seen = read_image(file, shapes_run.resize).astype(int)
        assert answer.pixels is not None, answer
        assert np.abs(answer.pixels - seen).max() <= 2, file.name
        assert answer.name == expected.class_names[row], file.name
        assert abs(next(iter(answer.probabilities.values())) - expected.probabilities[row].max()) <= CLOSE, file.name
    assert page.console() == []


@pytest.mark.parametrize("resize", [*INTERPOLATIONS, "upsample"])
def test_pixels_are_pillows(
    resize: str, shapes_model: TrainedModel, make_page: Callable[..., Any], tmp_path: Path
) -> None:
    """What a lossless picture becomes is what Pillow makes of it, to the bit."""
    wanted = Resize("upsample", 32) if resize == "upsample" else Resize("eval-transform", 32, 37, resize)
    page = make_page(replace(shapes_model, resize=wanted))
    rng, files = np.random.default_rng(0), []
    for size in ((32, 32), (37, 37), (61, 45), (45, 62), (300, 64), (37, 38), (1, 40), (9, 4), (30, 2500), STRIPS):
        files.append(tmp_path / f"{size}.png")
        noise = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).save(files[-1])
    for file, answer in zip(files, page.give(*files), strict=True):
        assert answer.pixels is not None, answer
        np.testing.assert_array_equal(answer.pixels, read_image(file, wanted), err_msg=file.name)
