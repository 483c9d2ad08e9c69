"""Photos of all kinds: modes, transparency, depths of greys, orientation, animation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def photo(size: tuple[int, int] = (98, 151)) -> Image.Image:
    """A smooth coloured picture in which no two regions look alike."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def transparent(mode: str) -> Image.Image:
    """The same, transparent from top to bottom."""
    picture = photo().convert(mode)
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    return picture


def few() -> Image.Image:
    """The same in a palette of eight colours."""
    return photo().quantize(8)


def grey(top: float, dtype: type) -> Image.Image:
    """The same in grey, from zero to `top`."""
    return Image.fromarray((np.asarray(photo().convert("L"), np.float64) / 255 * top).astype(dtype))


def turned() -> Image.Exif:
    """The note that a picture lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PHOTOS: dict[str, Callable[[Path], object]] = {  # by what follows "photo."
    "png": lambda path: photo().save(path),
    "jpg": lambda path: photo((301, 200)).save(path, exif=turned()),
    "turned.png": lambda path: transparent("RGBA").save(path, exif=turned()),
    "rgba.png": lambda path: transparent("RGBA").save(path),
    "la.png": lambda path: transparent("LA").save(path),
    "colour.png": lambda path: few().convert("RGB").save(path, transparency=few().convert("RGB").getpixel((0, 0))),
    "palette.png": lambda path: few().save(path, transparency=3),
    "palette-alphas.png": lambda path: few().save(path, transparency=bytes(range(0, 256, 32))),
    "grey16.png": lambda path: grey(65535, np.uint16).save(path),
    "grey16.tiff": lambda path: grey(65535, np.uint16).save(path),
    "grey32.tiff": lambda path: grey(65535, np.int32).save(path),
    "float.tiff": lambda path: grey(65535, np.float32).save(path),
    "float255.tiff": lambda path: grey(255, np.float32).save(path),
    "bits.png": lambda path: photo().convert("1").save(path),
    "cmyk.jpg": lambda path: photo().convert("CMYK").save(path),
    "animated.gif": lambda path: photo().save(path, save_all=True, append_images=[photo().rotate(180)]),
    "transparent.gif": lambda path: few().save(path, save_all=True, append_images=[few().rotate(180)], transparency=3),
}
