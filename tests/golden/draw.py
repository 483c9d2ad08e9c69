"""A random ResNet50, bit-identical in the script that runs the reference libraries and in the test that runs ours.

Neither its 25 million weights nor BatchNorm statistics calibrated on images can be committed. So they are all drawn
from raw bits of PCG64, whose stream NumPy keeps stable across versions, with operations that IEEE 754 defines exactly:
no logarithms, and no sums of floats, whose order depends on the machine.

The network reveals mistakes: a quarter of the channels is faint, so that variances range from 1e-6 to 1 and a wrong
epsilon shows. It is alive although its statistics are not those of any images: kernels with zero mean pass nothing that
is common to all channels, so one variance fits all layers. tests/make_golden.py checks that activations are of order
one, that each relu cuts off about a seventh of them, and that features differ between images.
"""

import zlib
from collections.abc import Iterator, Mapping

import numpy as np

STAGE_SIZES = (3, 4, 6, 3)
CLASSES = 1000

Path = tuple[str, ...]  # path of a variable in our network, such as ("params", "stage1_block1", "conv1", "kernel")


def draw_network(loud_pixels: bool = False) -> dict[Path, np.ndarray]:
    """Draws all float32 tensors that a ResNet50 may have: kernels [height, width, in, out], the classifier under `top`.

    Args:
      loud_pixels: whether the input is pixels in 0..255 minus their mean, not divided by their standard deviation.
    """
    tensors: dict[Path, np.ndarray] = {}
    for conv, shape in convolutions():
        tensors |= _convolution_and_norm(conv, shape)
    if loud_pixels:
        tensors["params", "stem_conv", "kernel"] /= 64
    features = 64 * 4 * 2 ** (len(STAGE_SIZES) - 1)
    tensors["top", "kernel"] = _uniform("top/kernel", features, CLASSES) / 32
    tensors["top", "bias"] = _uniform("top/bias", CLASSES) / 32
    return tensors


def fingerprint(tensors: Mapping[Path, np.ndarray]) -> str:
    """Returns a checksum that shows whether two machines have drawn the same tensors."""
    crc = 0
    for path in sorted(tensors):
        crc = zlib.crc32(np.ascontiguousarray(tensors[path]), crc)
    return f"{crc:08x}"


def draw_images(count: int) -> np.ndarray:
    """Draws images of 8x8 squares in bright colours: uint8 [count, 32, 32, 3]."""
    squares = (_integers("images", count, 8, 8, 3) // 256 + 128).astype(np.uint8)
    return squares.repeat(4, axis=1).repeat(4, axis=2)


def draw_positions(name: str, count: int, size: int) -> np.ndarray:
    """Draws the positions at which a flat array of a size of at most 2**16 is compared."""
    assert size <= 2**16
    return (_integers(name, count) + 2**15) % size


def convolutions() -> Iterator[tuple[Path, tuple[int, int, int, int]]]:
    """Yields the module path and kernel shape of each convolution."""
    yield ("stem_conv",), (7, 7, 3, 64)
    channels = 64
    for stage, blocks in enumerate(STAGE_SIZES):
        width = 64 * 2**stage
        for block in range(blocks):
            here = f"stage{stage + 1}_block{block + 1}"
            yield (here, "conv1"), (1, 1, channels, width)
            yield (here, "conv2"), (3, 3, width, width)
            yield (here, "conv3"), (1, 1, width, 4 * width)
            if block == 0:
                yield (here, "conv_proj"), (1, 1, channels, 4 * width)
            channels = 4 * width


def _convolution_and_norm(conv: Path, shape: tuple[int, int, int, int]) -> dict[Path, np.ndarray]:
    """Draws a convolution and the BatchNorm after it."""
    *_, channels = shape
    fan_in = int(np.prod(shape[:-1]))
    name, norm = "/".join(conv), (*conv[:-1], conv[-1].replace("conv", "bn"))
    kernel = _integers(f"{name}/kernel", *shape)
    kernel -= kernel.sum((0, 1, 2), dtype=np.int64).astype(np.int32) // fan_in
    picked = _integers(f"{name}/faint", channels)
    faint = np.ldexp(np.float32(1), np.where(picked % 4 == 0, -4 - picked // 4 % 7, 0)).astype(np.float32)
    # As in trained networks, branches are smaller than the shortcuts, and most of their units are active.
    gain, shift = {"bn1": (1.0, 0.5), "bn2": (1.0, 0.5), "bn3": (0.4, 0.1)}.get(norm[-1], (1.0, 0.1))
    return {
        ("params", *conv, "kernel"): kernel * (faint * np.float32((3 / fan_in) ** 0.5 / 2**15)),
        ("params", *conv, "bias"): faint * _uniform(f"{name}/bias", channels) / 4,
        ("params", *norm, "scale"): np.float32(gain) * (1 + _uniform(f"{name}/scale", channels) / 2),
        ("params", *norm, "bias"): np.float32(shift) + _uniform(f"{name}/shift", channels) / 3,
        ("batch_stats", *norm, "mean"): faint * _uniform(f"{name}/mean", channels) / 3,
        ("batch_stats", *norm, "var"): faint**2 * (2 + _uniform(f"{name}/var", channels)) / 4,
    }


def _uniform(name: str, *shape: int) -> np.ndarray:
    """Draws float32 numbers from -1 to 1."""
    return _integers(name, *shape).astype(np.float32) / 2**15


def _integers(name: str, *shape: int) -> np.ndarray:
    """Draws int32 numbers from -2**15 to 2**15 - 1, seeded by a name."""
    size = int(np.prod(shape))
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(-(-size // 4))
    return bits.astype("<u8").view("<u2")[:size].astype(np.int32).reshape(shape) - 2**15
