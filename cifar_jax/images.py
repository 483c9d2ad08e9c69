"""Image files to the pixels that a network was trained on."""

import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from cifar_jax.errors import UserError

# What cameras, screens and scanners write. Pillow opens more, one of them (EPS) by running Ghostscript on it.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 100_000_000  # a 10000x10000 photograph; more is a mistake or an attack on memory


def read_image(path: str | Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Reads a PNG, JPEG or other image file as RGB pixels of one size.

    The picture is turned upright by its EXIF orientation, transparent parts become white, grey and 16-bit pictures
    become 8-bit RGB, the largest centred square is cut out, and that is resized with antialiasing, as the makers of
    CIFAR-10 did with theirs.

    Args:
      path: of the file.
      size: side of the result in pixels.

    Raises:
      UserError: when the file is missing, no image, damaged, or has more than 100 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warning about large images comes before our limit
            # Opened here, as Pillow leaves a file open whose first bytes cannot be read.
            with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(
                        f"{path} has {image.width}x{image.height} pixels, more than the {MAX_PIXELS // 10**6} million "
                        "that are read; make it smaller."
                    )
                square = _centred_square(_to_rgb(ImageOps.exif_transpose(image)))
                return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), np.uint8)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of an image.") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image that can be read; give a PNG or JPEG file.") from None
    except UserError:
        raise
    except Exception as error:  # Pillow raises what its many decoders happen to raise on damaged files
        raise UserError(f"{path} cannot be read as an image ({error}); give a PNG or JPEG file.") from error


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
