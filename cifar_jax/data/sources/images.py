"""Reading of image files as the RGB pixels that a network takes."""

import contextlib
import functools
import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from cifar_jax.data.pictures import DIGEST_BYTES, Pictures, Resized
from cifar_jax.data.resize import Resize
from cifar_jax.errors import UserError

# Formats that cameras, screenshots and scanners write. Pillow opens more, one of them (EPS) by running Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Extensions of such files.
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif"),
    *(".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".heic", ".heif"),  # with pillow-heif; without it the file is named
)
_HEIF = ("HEIF",)  # the name under which pillow-heif registers its reader
_HEIC_BRANDS = {b"ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"heim", b"heis")}
_OF_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # as an entry of `warnings.filters`
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap width and height
MAX_BYTES = 2**30  # of a file, far more than the pixels below have: what is larger is something else
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


@dataclass(frozen=True)
class OrErrors(Resized):
    """Pictures that may be unreadable: such a one is black, and `errors` has the reason.

    Attributes:
      errors: errors by row, of the rows read so far. Those who read may remove them.
    """

    errors: dict[int, ImageError] = field(default_factory=dict)

    def image(self, row: int) -> UInt8[np.ndarray, "side side 3"]:
        """Reads one image, black if it cannot be read."""
        try:
            return super().image(row)
        except ImageError as error:
            self.errors[row] = error
            return np.zeros(self.shape[1:], np.uint8)


def or_errors(read: Callable[[int], Image.Image], num: int, resize: Resize) -> OrErrors:
    """Makes `num` pictures that are not looked at before they are read, by `read`, which may raise ImageError."""
    digests, sizes = np.broadcast_to(np.uint8(0), (num, DIGEST_BYTES)), np.broadcast_to(np.int32(0), (num, 2))
    return OrErrors(Pictures(read, [""] * num, digests, sizes, np.arange(num)), resize)


def read_image(path: str | Path, resize: Resize) -> UInt8[np.ndarray, "side side 3"]:
    """Reads a PNG, JPEG or other image file as the pixels that a run's network takes; see `decode`.

    Raises:
      ImageError: if the file is missing, not an image, corrupt, or has more than 100 million pixels.
    """
    return resize(decode(read_bytes(path), path))


def read_bytes(path: str | Path) -> bytes:
    """Reads a file. Raises ImageError if that fails."""
    try:
        # Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise ImageError(path, "cannot be read as an image (it is not a regular file)")
            if about.st_size > MAX_BYTES:
                raise ImageError(path, f"has more than {MAX_BYTES:,} bytes, the limit of a picture")
            return file.read()
    except FileNotFoundError:
        raise ImageError(path, "does not exist", "give the path of an image") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(path, f"cannot be read as an image ({reason})") from error


def decode(content: bytes, name: str | Path) -> Image.Image:
    """Decodes the content of an image file as an upright RGB picture of its own size.

    The picture is turned upright by its EXIF orientation, transparent parts become white, grey and 16-bit pictures
    become 8-bit RGB; of an animation the first frame is taken.

    Args:
      content: bytes of the file.
      name: its path, for messages.

    Raises:
      ImageError: if it is not an image, corrupt, or has more than 100 million pixels.
    """
    with _opened(content, name) as image:
        return _to_rgb(ImageOps.exif_transpose(image))


def upright_size(content: bytes, name: str | Path) -> tuple[int, int]:
    """Reads width and height of a picture, turned upright, from its header; the pixels may still be corrupt.

    Raises:
      ImageError: see `decode`.
    """
    with _opened(content, name) as image:
        if image.format == "PNG" and b"eXIf" not in content and b"tiff:Orientation" not in content:
            return image.size  # to look for the orientation, Pillow would decode the pixels
        if image.format in ("PNG", "TIFF"):  # rare, and each with places of its own for the orientation
            return ImageOps.exif_transpose(image).size
        turned = image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
        return (image.height, image.width) if turned else image.size


@contextlib.contextmanager
def _opened(content: bytes, name: str | Path) -> Iterator[Image.Image]:
    formats = (*FORMATS, *_HEIF) if _can_read_heif() else FORMATS
    limit = f"the limit of {MAX_PIXELS // 10**6} million"
    # Pillow warns about large images below our limit. `catch_warnings` is not for threads: this filter stays.
    if _OF_PILLOW not in warnings.filters:
        warnings.filterwarnings("ignore", module=_OF_PILLOW[3].pattern)
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                pixels = f"{image.width}x{image.height} pixels"
                raise ImageError(name, f"has {pixels}, more than {limit}", "make it smaller")
            yield image
    except Image.DecompressionBombError:
        raise ImageError(name, f"has many more pixels than {limit}", "make it smaller") from None
    except UnidentifiedImageError:
        if content[4:12] in _HEIC_BRANDS and not _can_read_heif():
            reason = "is a HEIC picture, which needs the package pillow-heif"
            raise ImageError(name, reason, "install it with `pip install pillow-heif`, or save it as JPEG") from None
        raise ImageError(name, "is not a readable image") from None
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise all kinds of errors on corrupt files
        raise ImageError(name, f"cannot be read as an image ({error})") from error


@functools.cache
def _can_read_heif() -> bool:
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


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
