"""Tests of reading image files of all kinds: upright RGB pixels, or an error message."""

import contextlib
import io
import os
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, PngImagePlugin

from cifar_jax.data.resize import Resize
from cifar_jax.data.sources import images
from cifar_jax.data.sources.images import MAX_PIXELS, read_image
from cifar_jax.errors import UserError

WHITE, RED = (255, 255, 255), (255, 0, 0)


def gradient(width=32, height=32):
    """Draws an image whose corners all differ, so that rotations and reflections are recognised."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def read(tmp_path, image, size=32, format="PNG", **how):
    path = tmp_path / f"picture.{format.lower()}"
    image.save(path, format, **how)
    pixels = read_image(path, Resize("upsample", size))
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    return pixels


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_image(path, Resize("upsample", 32))
    message = str(caught.value)
    assert "\n" not in message and str(path) in message, message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Images


def test_image_of_the_target_size_is_read_exactly(tmp_path):
    np.testing.assert_array_equal(read(tmp_path, gradient()), np.asarray(gradient()))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_common_formats(tmp_path, format):
    difference = read(tmp_path, gradient(), format=format).astype(int) - np.asarray(gradient())
    assert np.abs(difference).mean() < 8  # for lossy formats and the palette of a GIF


def test_single_pixel_fills_the_square(tmp_path):
    assert (read(tmp_path, Image.new("RGB", (1, 1), RED)) == RED).all()


def test_centred_square_is_cropped(tmp_path):
    wide = Image.new("RGB", (96, 32), RED)
    wide.paste(gradient(), (32, 0))
    np.testing.assert_array_equal(read(tmp_path, wide), np.asarray(gradient()))


@pytest.mark.parametrize("mode", ["L", "1", "I;16", "LA"])
def test_grey_images_become_rgb(tmp_path, mode):
    grey = gradient().convert("L")
    # White is 65535 in 16-bit images.
    picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    pixels = read(tmp_path, picture)
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    expected = np.asarray(picture.convert("L") if mode == "1" else grey)
    np.testing.assert_array_equal(pixels[..., 0], expected)


@pytest.mark.parametrize(("dtype", "white"), [(np.float32, 255), (np.int32, 65535), (np.float32, 65535)])
def test_32_bit_grey_tiffs_are_not_clipped_to_white(tmp_path, dtype, white):
    grey = np.tile(np.linspace(0, white, 32), (32, 1)).astype(dtype)
    pixels = read(tmp_path, Image.fromarray(grey), format="TIFF")
    assert pixels[0, 0, 0] == 0 and pixels[0, -1, 0] == 255 and 100 < pixels[0, 15, 0] < 150


def transparent(mode):
    """Draws a red image with a transparent left half, in one of PNG's encodings."""
    rgba = Image.new("RGBA", (32, 32), (*RED, 255))
    rgba.paste((0, 0, 255, 0), (0, 0, 16, 32))  # invisible blue
    if mode == "RGBA":
        return rgba, {}
    if mode == "half":
        rgba.paste((*RED, 128), (0, 0, 16, 32))
        return rgba, {}
    rgb = rgba.convert("RGB")
    if mode == "tRNS":
        return rgb, {"transparency": (0, 0, 255)}
    palette = rgb.quantize(2)
    index = palette.getpixel((0, 0))
    as_bytes = bytes(0 if entry == index else 255 for entry in range(2))
    return palette, {"transparency": as_bytes if mode == "P bytes" else index}


@pytest.mark.parametrize("mode", ["RGBA", "half", "tRNS", "P", "P bytes"])
def test_transparent_parts_become_white(tmp_path, mode):
    picture, how = transparent(mode)
    pixels = read(tmp_path, picture, **how)
    left = [255, 127, 127] if mode == "half" else WHITE
    np.testing.assert_allclose(pixels[:, :16], np.broadcast_to(left, (32, 16, 3)), atol=1)
    np.testing.assert_array_equal(pixels[:, 16:], np.broadcast_to(RED, (32, 16, 3)))


def test_cmyk_jpegs_keep_their_colours(tmp_path):
    pixels = read(tmp_path, Image.new("RGB", (32, 32), RED).convert("CMYK"), format="JPEG", quality=95)
    assert np.abs(pixels.astype(int) - RED).max() < 30


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    """The stored pixels are transformed inversely, so that every file shows the same image."""
    turns = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = gradient(48, 32)
    for turn in turns.get(orientation, []):
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(read(tmp_path, stored, exif=exif), read(tmp_path, gradient(48, 32)))


def test_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for format in ("GIF", "PNG", "WEBP"):
        how = {"lossless": True} if format == "WEBP" else {}
        pixels = read(tmp_path, frames[0], format=format, save_all=True, append_images=frames[1:], **how)
        assert (pixels == RED).all(), format


# ---------------------------------------------------------------------------------------------------------------------
# Files that are not images


def png_claiming(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def saved(format="PNG"):
    buffer = io.BytesIO()
    gradient().save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is not a readable image"),
        (b"a letter", "is not a readable image"),
        (b"<!DOCTYPE html><html></html>", "is not a readable image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a readable image"),
        (saved()[: len(saved()) // 2], "cannot be read as an image (image file is truncated"),
        (saved("JPEG")[:-100], "cannot be read as an image (image file is truncated"),
        (saved("JPEG")[:100], "cannot be read as an image ("),
        (saved()[:20], "cannot be read as an image ("),
        (png_claiming(32, 32), "cannot be read as an image ("),
        (png_claiming(10_001, 10_000), "10001x10000 pixels, more than the limit of 100 million"),
        (png_claiming(100_000, 100_000), "has many more pixels than the limit of 100 million; make it smaller."),
        (png_claiming(2**31 - 1, 2**31 - 1), "has many more pixels than the limit"),
        # Pillow would pass it to Ghostscript, which executes it.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not a readable image"),
    ],
)
def test_non_images_are_refused(tmp_path, content, part):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    message = refusal(path)
    assert part in message and message.endswith(("give a PNG or JPEG file.", "make it smaller."))


def test_missing_files_and_directories_are_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "missing.png")
    assert "cannot be read as an image (" in refusal(tmp_path)
    assert "File name too long" in refusal(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image("a\0b", Resize("upsample", 32))


def test_pixel_limit():
    assert MAX_PIXELS == 10_000 * 10_000


@settings(max_examples=150, deadline=None)
@given(
    format=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM"]),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    length=st.floats(0.1, 1),
)
def test_corrupt_images_give_pixels_or_a_user_error(tmp_path_factory, format, changes, length):
    content = bytearray(saved(format))
    for position, value in changes:
        content[position % min(len(content), 200)] = value  # mostly in the headers
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[: int(length * len(content))])
    with contextlib.suppress(UserError):
        assert read_image(path, Resize("upsample", 32)).shape == (32, 32, 3)


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"heix"])
def test_heic_pictures_need_a_package_that_the_message_names(tmp_path, monkeypatch, brand):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    images._can_read_heif.cache_clear()
    path = tmp_path / "photo.heic"
    path.write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + bytes(100))
    message = refusal(path)
    assert "is a HEIC picture, which needs the package pillow-heif" in message and "pip install pillow-heif" in message
    images._can_read_heif.cache_clear()


def test_pipes_and_devices_are_no_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "endless.png"):
        assert "not a regular file" in refusal(tmp_path / name)


def test_decoding_in_threads_leaves_warning_filters_alone(tmp_path):
    content = io.BytesIO()
    gradient().save(content, "PNG")
    images.decode(content.getvalue(), "first")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: images.decode(content.getvalue(), "picture").load(), range(400)))
    assert warnings.filters == before


@pytest.mark.parametrize("place", ["TIFF", "PNG", "PNG with XMP", "JPEG", "WEBP"])
def test_the_size_that_a_header_says_is_that_of_the_upright_picture(place):
    exif, content, more = Image.Exif(), io.BytesIO(), {}
    exif[0x0112] = 6
    if place == "PNG with XMP":
        more["pnginfo"] = PngImagePlugin.PngInfo()
        orientation = '<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
        more["pnginfo"].add_itxt("XML:com.adobe.xmp", orientation)
    else:
        more["exif"] = exif
    gradient(60, 40).save(content, place.split()[0], **more)
    size = images.upright_size(content.getvalue(), place)
    assert size == images.decode(content.getvalue(), place).size == (40, 60)
