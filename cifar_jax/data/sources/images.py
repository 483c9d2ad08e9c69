"""Reading of image files as the RGB pixels that a network takes."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from cifar_jax.errors import UserError

# Formats that cameras, screenshots and scanners write. Pillow opens more, one of them (EPS) by running Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Extensions of such files.
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif"),
    *(".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
MAX_PIXELS = 100_000_000  # a 10000x10000 photograph; more is a mistake or a decompression bomb


class ImageError(UserError):
    """An image file that cannot be read.

    Attributes:
      reason: what is wrong with the file, without its path.
    """

    def __init__(self, path: str | Path, reason: str, advice: str = "give a PNG or JPEG file") -> None:
        """Builds the message from the path, the reason and the advice."""
        self.reason = reason
        super().__init__(f"{path} {reason}; {advice}.")


def image_files(paths: Sequence[str | Path]) -> list[str]:
    """Expands directories among the paths to the image files directly in them, sorted by name.

    Image files are recognised by their extension; hidden files are skipped.

    Raises:
      UserError: if a directory has no image files or cannot be read.
    """
    return [file for path in paths for file in (_images_in(path) if os.path.isdir(path) else [str(path)])]


def _images_in(directory: str | Path) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(directory) if name.lower().endswith(SUFFIXES) and name[0] != ".")
    except OSError as error:
        raise UserError(f"{directory} cannot be read ({error.strerror}); name another directory.") from error
    if not names:
        raise UserError(
            f"{directory} is a directory without image files; give one with PNG or JPEG files directly in it."
        )
    return [os.path.join(directory, name) for name in names]


def read_image(path: str | Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Reads a PNG, JPEG or other image file as RGB pixels of one size.

    The picture is turned upright by its EXIF orientation, transparent parts become white, grey and 16-bit pictures
    become 8-bit RGB, and the largest centred square is cropped and resized with antialiasing, as for CIFAR-10 itself.

    Args:
      path: path of the file.
      size: side of the result in pixels.

    Raises:
      ImageError: if the file is missing, not an image, corrupt, or has more than 100 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about large images below our limit
            # Opened here, as Pillow leaks the file if its first bytes cannot be read.
            with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    pixels = f"{image.width}x{image.height} pixels"
                    limit = f"the limit of {MAX_PIXELS // 10**6} million"
                    raise ImageError(path, f"has {pixels}, more than {limit}", "make it smaller")
                square = _centred_square(_to_rgb(ImageOps.exif_transpose(image)))
                return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), np.uint8)
    except FileNotFoundError:
        raise ImageError(path, "does not exist", "give the path of an image") from None
    except UnidentifiedImageError:
        raise ImageError(path, "is not a readable image") from None
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise all kinds of errors on corrupt files
        raise ImageError(path, f"cannot be read as an image ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips 16-bit greys at 255, which makes nearly every picture white.
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
