"""Pictures that do not lie in memory: encoded as files or records, decoded and resized when they are read."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int, Int32, UInt8
from PIL import Image

from cifar_jax.data.resize import Resize

DIGEST_BYTES = 16


def content_digest(content: bytes) -> bytes:
    """Returns a digest of the content of a picture's file."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def pixels_digest(pixels: UInt8[np.ndarray, "..."]) -> bytes:
    """Returns a digest of the pixels of a picture and of their shape: other bytes in a row are another picture."""
    digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=DIGEST_BYTES)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures of any size, in an order of their own.

    Attributes:
      read: `row -> RGB picture`; raises ImageError. Called from several threads at a time.
      names: a name of each, for messages: a path, or a place in a data set. A list, or something that arrays index.
      digests: `content_digest` of each, without decoding.
      sizes: width and height of each in pixels, upright.
      rows: the argument of `read` for each.
    """

    read: Callable[[int], Image.Image]
    names: Sequence[str]
    digests: UInt8[np.ndarray, "n 16"]
    sizes: Int32[np.ndarray, "n 2"]
    rows: Int[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Int[np.ndarray, "m"] | slice) -> "Pictures":
        """Returns some of the pictures, without reading them."""
        names: Any = self.names
        if isinstance(names, list) and not isinstance(indices, slice):
            names = [names[i] for i in indices]
        else:
            names = names[indices]
        return replace(
            self, names=names, digests=self.digests[indices], sizes=self.sizes[indices], rows=self.rows[indices]
        )


@dataclass(frozen=True)
class Resized:
    """Pictures, or pixels in memory, as images of one size that are made when they are read.

    Behaves as an array uint8 [n, side, side, 3] as far as reading by rows goes.

    Attributes:
      source: where they come from.
      resize: what makes images of one size of them.
    """

    source: "Pictures | UInt8[np.ndarray, 'n h w 3']"
    resize: Resize

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __len__(self) -> int:
        return len(self.source)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Number, height, width and channels of the images."""
        return len(self), self.resize.side, self.resize.side, 3

    def image(self, row: int) -> UInt8[np.ndarray, "side side 3"]:
        """Reads one image.

        Raises:
          ImageError: if it cannot be read, or is not what it was when the data set was loaded.
        """
        return self.resize(self.picture(row))

    def picture(self, row: int) -> Image.Image:
        """Reads one picture as it is; raises ImageError as `image` does."""
        if isinstance(self.source, Pictures):
            return self.source.read(int(self.source.rows[row]))
        return Image.fromarray(self.source[row])

    def of_epoch(self, epoch: int) -> "Resized":
        """Returns the images as they are in an epoch of training, counted from zero: here the same in all."""
        return self

    def __getitem__(self, rows: Any) -> UInt8[np.ndarray, "..."]:
        """Reads an image, or the images of a slice or an array of rows."""
        if isinstance(rows, int | np.integer):
            return self.image(int(rows))
        wanted = np.arange(len(self))[rows]
        return np.stack([self.image(row) for row in wanted]) if len(wanted) else np.zeros((0, *self.shape[1:]), "u1")

    def take(self, indices: Int[np.ndarray, "m"] | slice) -> "Resized":
        """Returns some of the images, without reading them."""
        return Resized(subset(self.source, indices), self.resize)


# What `Dataset.images` may be: as it was loaded, or ready to be read by rows.
AnyImages: TypeAlias = "UInt8[np.ndarray, 'n h w 3'] | Pictures | Resized"
Images: TypeAlias = "UInt8[np.ndarray, 'n h w 3'] | Resized"


def subset(images: Any, indices: Int[np.ndarray, "m"] | slice) -> Any:
    """Returns the images at some rows, of the same kind as before; only pixels in memory are copied."""
    return images[indices] if isinstance(images, np.ndarray) else images.take(indices)


def sizes_of(images: AnyImages) -> Int32[np.ndarray, "n 2"]:
    """Width and height of all images in pixels."""
    if isinstance(images, Pictures):
        return images.sizes
    height, width = images.shape[1:3]
    return np.full((len(images), 2), (width, height), np.int32)


def content_digests(images: AnyImages) -> UInt8[np.ndarray, "n 16"]:
    """A digest of the content of each image: equal for bit-identical images of the same kind."""
    if isinstance(images, Resized):
        return content_digests(images.source)
    if isinstance(images, Pictures):
        return images.digests
    found = b"".join(map(pixels_digest, images))
    return np.frombuffer(found, np.uint8).reshape(-1, DIGEST_BYTES)


def resized(images: AnyImages, resize: Resize) -> Images:
    """Applies a resize to images; pixels in memory that need none stay what they are."""
    if isinstance(images, np.ndarray) and resize.method == "upsample":
        return images
    return Resized(images, resize)  # type: ignore[arg-type]
