"""A ResNet50 that is drawn, the same to the bit for the script that asks other libraries and for the test that asks us.

Neither its 25 million weights nor the statistics that images would give its BatchNorms can be committed. So all are
drawn from raw bits of PCG64, whose stream NumPy keeps from version to version, by operations that IEEE 754 defines to
the last bit: no logarithm, and no sum of floats, whose order is the machine's.

No mistake survives it. A quarter of the channels is faint, so that variances reach from 1e-6 to 1 and a wrong epsilon
shows. It is alive though its statistics belong to no images: kernels without a mean let nothing through that all
channels have in common, so one variance fits all layers; activations of order one, a seventh of them cut off by each
relu, and features that tell images apart are what tests/make_golden.py makes sure of.
"""

import zlib
from collections.abc import Iterator, Mapping

import numpy as np

STAGE_SIZES = (3, 4, 6, 3)
CLASSES = 1000

Path = tuple[str, ...]  # of a variable of the network here: ("params", "stage1_block1", "conv1", "kernel")


def draw_network(loud_pixels: bool = False) -> dict[Path, np.ndarray]:
    """All tensors that a ResNet50 may have, float32, kernels [height, width, in, out]; the classifier's below `top`.

    Args:
      loud_pixels: whether the input is pixels in 0..255 less their mean, and not divided by their deviation.
    """
    tensors: dict[Path, np.ndarray] = {}
    for conv, shape in convolutions():
        tensors |= _convolution_and_norm(conv, shape)
    if loud_pixels:
        tensors["params", "stem_conv", "kernel"] /= 64
    features = 64 * 4 * 2 ** (len(STAGE_SIZES) - 1)
    tensors["top", "kernel"] = _unit("top/kernel", features, CLASSES) / 32
    tensors["top", "bias"] = _unit("top/bias", CLASSES) / 32
    return tensors


def fingerprint(tensors: Mapping[Path, np.ndarray]) -> str:
    """Tells whether two machines have drawn the same."""
    crc = 0
    for path in sorted(tensors):
        crc = zlib.crc32(np.ascontiguousarray(tensors[path]), crc)
    return f"{crc:08x}"


def draw_images(count: int) -> np.ndarray:
    """Images of 8x8 squares in loud colours: uint8 [count, 32, 32, 3]."""
    squares = (_whole("images", count, 8, 8, 3) // 256 + 128).astype(np.uint8)
    return squares.repeat(4, axis=1).repeat(4, axis=2)


def draw_positions(name: str, count: int, size: int) -> np.ndarray:
    """Places in a flat array of that size, at most 2**16, at which it is compared."""
    assert size <= 2**16
    return (_whole(name, count) + 2**15) % size


def convolutions() -> Iterator[tuple[Path, tuple[int, int, int, int]]]:
    """Each convolution's module and the shape of its kernel."""
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
    """A convolution and the BatchNorm behind it."""
    *_, channels = shape
    fan_in = int(np.prod(shape[:-1]))
    name, norm = "/".join(conv), (*conv[:-1], conv[-1].replace("conv", "bn"))
    kernel = _whole(f"{name}/kernel", *shape)
    kernel -= kernel.sum((0, 1, 2), dtype=np.int64).astype(np.int32) // fan_in
    picked = _whole(f"{name}/faint", channels)
    faint = np.ldexp(np.float32(1), np.where(picked % 4 == 0, -4 - picked // 4 % 7, 0)).astype(np.float32)
    # As in a trained network, branches add less than what they add to, and within them most units are on.
    gain, shift = {"bn1": (1.0, 0.5), "bn2": (1.0, 0.5), "bn3": (0.4, 0.1)}.get(norm[-1], (1.0, 0.1))
    return {
        ("params", *conv, "kernel"): kernel * (faint * np.float32((3 / fan_in) ** 0.5 / 2**15)),
        ("params", *conv, "bias"): faint * _unit(f"{name}/bias", channels) / 4,
        ("params", *norm, "scale"): np.float32(gain) * (1 + _unit(f"{name}/scale", channels) / 2),
        ("params", *norm, "bias"): np.float32(shift) + _unit(f"{name}/shift", channels) / 3,
        ("batch_stats", *norm, "mean"): faint * _unit(f"{name}/mean", channels) / 3,
        ("batch_stats", *norm, "var"): faint**2 * (2 + _unit(f"{name}/var", channels)) / 4,
    }


def _unit(name: str, *shape: int) -> np.ndarray:
    """Numbers from -1 to 1, float32."""
    return _whole(name, *shape).astype(np.float32) / 2**15


def _whole(name: str, *shape: int) -> np.ndarray:
    """Whole numbers from -2**15 to 2**15 - 1, int32, that belong to a name."""
    size = int(np.prod(shape))
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(-(-size // 4))
    return bits.astype("<u8").view("<u2")[:size].astype(np.int32).reshape(shape) - 2**15
