"""Image files to the pixels that a network was trained on."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from cifar_jax.errors import UserError

# What cameras, screens and scanners write. Pillow opens more, one of them (EPS) by running Ghostscript on it.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# What the names of such files end in.
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif"),
    *(".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
MAX_PIXELS = 100_000_000  # a 10000x10000 photograph; more is a mistake or an attack on memory


class ImageError(UserError):
    """An image file cannot be read. `reason` says why, without the path."""

    def __init__(self, path: str | Path, reason: str, advice: str = "give a PNG or JPEG file") -> None:
        """Takes the file, what is wrong with it, and what to do about it."""
        self.reason = reason
        super().__init__(f"{path} {reason}; {advice}.")


def image_files(paths: Sequence[str | Path]) -> list[str]:
    """Paths of files, with each directory among them replaced by the image files in it, sorted by name.

    An image file is told by the ending of its name; names that begin with a dot are left out.

    Raises:
      UserError: when a directory has none, or cannot be read.
    """
    return [file for path in paths for file in (_images_in(path) if os.path.isdir(path) else [str(path)])]


def _images_in(directory: str | Path) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(directory) if name.lower().endswith(SUFFIXES) and name[0] != ".")
    except OSError as error:
        raise UserError(f"{directory} cannot be read ({error.strerror}); name another directory.") from error
    if not names:
        raise UserError(
            f"{directory} is a directory without image files; name one that has PNG or JPEG files directly in it."
        )
    return [os.path.join(directory, name) for name in names]


def read_image(path: str | Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Reads a PNG, JPEG or other image file as RGB pixels of one size.

    The picture is turned upright by its EXIF orientation, transparent parts become white, grey and 16-bit pictures
    become 8-bit RGB, the largest centred square is cut out, and that is resized with antialiasing, as the makers of
    CIFAR-10 did with theirs.

    Args:
      path: of the file.
      size: side of the result in pixels.

    Raises:
      ImageError: when the file is missing, no image, damaged, or has more than 100 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warning about large images comes before our limit
            # Opened here, as Pillow leaves a file open whose first bytes cannot be read.
            with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    pixels, most = f"{image.width}x{image.height} pixels", f"the {MAX_PIXELS // 10**6} million"
                    raise ImageError(path, f"has {pixels}, more than {most} that are read", "make it smaller")
                square = _centred_square(_to_rgb(ImageOps.exif_transpose(image)))
                return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), np.uint8)
    except FileNotFoundError:
        raise ImageError(path, "does not exist", "give the path of an image") from None
    except UnidentifiedImageError:
        raise ImageError(path, "is not an image that can be read") from None
    except ImageError:
        raise
    except Exception as error:  # Pillow raises what its many decoders happen to raise on damaged files
        raise ImageError(path, f"cannot be read as an image ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion cuts 16-bit greys off at 255, which makes nearly every picture white.
        pixels = np.asarray(image, np.float64)
        grey = pixels / 257.0 if image.mode != "F" or pixels.max() > 255 else pixels
        image = Image.fromarray(np.clip(np.round(grey), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _centred_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
