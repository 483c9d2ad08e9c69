"""Synthetic stand-in for CIFAR-10: ten classes of 32x32 RGB images, drawn from a seed.

It lets the whole pipeline run, and be tested, without a download. Each image shows one large shape on a textured
background. Only the outline determines the class: position, size, rotation and colours are independent of it, and the
shape is lighter than its background as often as darker. So neither the mean colour nor a linear function of the pixels
predicts the class well, while features that detect edges, corners and holes do.

Shapes are upright up to a random rotation of at most 10 degrees either way, like objects in photographs: features
learned on photographs help little in recognising shapes at arbitrary angles. The outlines would be distinct at any
angle, though: there is no diamond besides the square and no ellipse besides the disc.
"""

import numpy as np
from jaxtyping import Float32, Int32, UInt8

CLASS_NAMES = ("disc", "ring", "square", "triangle", "cross", "star", "crescent", "heart", "arrow", "hourglass")
IMAGE_SIZE = 32
# A block has one image of each class and a random stream of its own; see `draw_shapes`.
BLOCK_SIZE = len(CLASS_NAMES)

# Outlines are given in units of this radius (in pixels), on a scale at which they look equally large.
RADIUS_RANGE = (9.0, 12.0)
OUTLINE_REACH = 1.2  # upper bound of all outlines, so that no shape is cut off at the image's border
MAX_TURN = np.pi / 18  # rotation of a shape, either way
MAX_SHIFT = 3.0  # pixels between the centres of shape and image, where the border leaves that much room
# Difference in luma (0 to 1) between shape and background; texture and shading take up to TEXTURE_LUMA on either side.
CONTRAST_RANGE = (0.42, 0.62)
TEXTURE_LUMA = 0.06
NOISE_STD = 0.02

LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # weights of red, green and blue (Rec. 601)
PIXEL_CENTRES = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5 - IMAGE_SIZE / 2  # relative to the image's centre

Plane = Float32[np.ndarray, "32 32"]
Planes = Float32[np.ndarray, "10 32 32"]  # one for each image of a block
Corners = list[tuple[float, float]]  # in order around the outline

SQUARE: Corners = [(-0.76, -0.76), (0.76, -0.76), (0.76, 0.76), (-0.76, 0.76)]
TRIANGLE: Corners = [(1.15, 0.0), (-0.575, 0.996), (-0.575, -0.996)]
CROSS: Corners = [
    (1.05, -0.3), (1.05, 0.3), (0.3, 0.3), (0.3, 1.05), (-0.3, 1.05), (-0.3, 0.3),
    (-1.05, 0.3), (-1.05, -0.3), (-0.3, -0.3), (-0.3, -1.05), (0.3, -1.05), (0.3, -0.3),
]  # fmt: skip
STAR: Corners = [
    (radius * float(np.cos(k * np.pi / 5)), radius * float(np.sin(k * np.pi / 5)))
    for k, radius in enumerate(5 * (1.18, 0.5))
]
ARROW: Corners = [(1.15, 0.0), (0.1, 0.9), (0.1, 0.3), (-1.1, 0.3), (-1.1, -0.3), (0.1, -0.3), (0.1, -0.9)]
HOURGLASS: Corners = [(-0.74, -0.92), (0.74, -0.92), (0.14, 0.0), (0.74, 0.92), (-0.74, 0.92), (-0.14, 0.0)]
# A heart is two discs, the lobes, and the point below them, whose sides are tangent to the discs.
HEART_LOBE = (0.48, 0.38, 0.5)
HEART_POINT: Corners = [(0.0, -1.05), (0.874, 0.073), (0.48, 0.38), (-0.48, 0.38), (-0.874, 0.073)]


def _disc_distance(x: Plane, y: Plane, centre_x: float, centre_y: float, radius: float) -> Plane:
    return np.sqrt((x - centre_x) ** 2 + (y - centre_y) ** 2) - radius


def _polygon_distance(x: Plane, y: Plane, corners: Corners) -> Plane:
    """Exact signed distance to a simple polygon, convex or not; negative inside."""
    start = np.array(corners, dtype=np.float32)[:, :, None, None]
    edge = np.roll(start, -1, axis=0) - start
    edge_x, edge_y = edge[:, 0], edge[:, 1]
    from_x, from_y = x - start[:, 0], y - start[:, 1]
    along = np.clip((from_x * edge_x + from_y * edge_y) / (edge_x**2 + edge_y**2), 0, 1)
    distance = np.sqrt(np.min((from_x - along * edge_x) ** 2 + (from_y - along * edge_y) ** 2, axis=0))
    # Even-odd rule: a pixel is inside if a ray from it crosses an odd number of edges.
    above_start, below_end = from_y >= 0, from_y < edge_y
    crossed = (above_start == below_end) & (below_end == (edge_x * from_y > edge_y * from_x))
    return np.where(np.logical_xor.reduce(crossed, axis=0), -distance, distance)


def _outline_distances(x: Planes, y: Planes) -> Planes:
    """Signed distance to the outline of class k on plane k, in the outlines' own units; negative inside."""
    heart_lobes = _disc_distance(np.abs(x[7]), y[7], *HEART_LOBE)
    return np.stack(
        [
            _disc_distance(x[0], y[0], 0.0, 0.0, 0.9),
            np.abs(_disc_distance(x[1], y[1], 0.0, 0.0, 0.82)) - 0.18,
            _polygon_distance(x[2], y[2], SQUARE),
            _polygon_distance(x[3], y[3], TRIANGLE),
            _polygon_distance(x[4], y[4], CROSS),
            _polygon_distance(x[5], y[5], STAR),
            np.maximum(_disc_distance(x[6], y[6], 0.2, 0.0, 1.0), -_disc_distance(x[6], y[6], 0.7, 0.0, 0.82)),
            np.minimum(heart_lobes, _polygon_distance(x[7], y[7], HEART_POINT)),
            _polygon_distance(x[8], y[8], ARROW),
            _polygon_distance(x[9], y[9], HOURGLASS),
        ]
    )


def _float32(*arrays: np.ndarray) -> list[Float32[np.ndarray, "..."]]:
    # Sines differ in their last bit between processors, but agree if computed in double precision and then rounded. So
    # do the sums, products and square roots that make pixels of them.
    return [array.astype(np.float32) for array in arrays]


def _angles(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.uniform(0, 2 * np.pi, shape)


def _coverage(rng: np.random.Generator) -> Planes:
    """Places each class's outline at random and returns the fraction of each pixel that it covers."""
    radius = rng.uniform(*RADIUS_RANGE, (BLOCK_SIZE, 1, 1))
    room = np.minimum(IMAGE_SIZE / 2 - 0.5 - OUTLINE_REACH * radius, MAX_SHIFT)
    shift_x, shift_y = room * rng.uniform(-1, 1, (2, BLOCK_SIZE, 1, 1))
    angle = rng.uniform(-MAX_TURN, MAX_TURN, (BLOCK_SIZE, 1, 1))
    x, y = _float32(PIXEL_CENTRES - shift_x, shift_y - PIXEL_CENTRES[:, None])  # y points up, as rows go down
    cos, sin, radius = _float32(np.cos(angle) / radius, np.sin(angle) / radius, radius)
    distance = _outline_distances(cos * x + sin * y, cos * y - sin * x) * radius
    # Antialiasing: an edge through a pixel's centre covers half of it, an edge half a pixel away all of it or none.
    return np.clip(0.5 - distance, 0, 1)


def _waves(rng: np.random.Generator, direction: np.ndarray, max_cycles: float) -> Float32[np.ndarray, "..."]:
    """Plane waves in [-1, 1] of random phase, with 0.4 to 1 times `max_cycles` across the image."""
    direction = direction[..., None, None]
    per_pixel = 2 * np.pi / IMAGE_SIZE * max_cycles * rng.uniform(0.4, 1, direction.shape)
    x = per_pixel * np.cos(direction) * PIXEL_CENTRES
    y = per_pixel * np.sin(direction) * PIXEL_CENTRES[:, None] + _angles(rng, *direction.shape)
    # sin(x + y) by the angle sum identity, so that only rows and columns need sines.
    sin_x, cos_x, sin_y, cos_y = _float32(np.sin(x), np.cos(x), np.sin(y), np.cos(y))
    return sin_x * cos_y + cos_x * sin_y


def _gradient(rng: np.random.Generator) -> Planes:
    """Draws at most half a wave in [-1, 1], which looks like light from one side."""
    return _waves(rng, _angles(rng, BLOCK_SIZE), 0.5)


def _texture(rng: np.random.Generator) -> Planes:
    """Picks a background texture in [-1, 1] for each image: plain, gradient, stripes, checks or clouds."""
    direction = _angles(rng, BLOCK_SIZE)
    # Clipped waves are bands with soft edges; the product of two sets of bands at a right angle is a check pattern.
    stripes, crossing = (np.clip(3 * _waves(rng, direction + turn, 5.0), -1, 1) for turn in (0.0, np.pi / 2))
    clouds = np.mean(_waves(rng, _angles(rng, 3, BLOCK_SIZE), 3.0), axis=0)
    kinds = np.stack([np.zeros_like(stripes), _gradient(rng), stripes, stripes * crossing, clouds])
    return kinds[rng.integers(len(kinds), size=BLOCK_SIZE), np.arange(BLOCK_SIZE)]


def _colours(luma: np.ndarray, hue: np.ndarray, saturation: np.ndarray) -> Float32[np.ndarray, "10 1 1 3"]:
    """Returns RGB colours in [0, 1] with exactly the given luma."""
    direction = np.cos(hue[:, None] - np.array([0, 2, 4]) * np.pi / 3)
    direction -= np.sum(LUMA_WEIGHTS * direction, axis=-1, keepdims=True)
    luma = luma[:, None]
    # Distance from grey to the face of the RGB cube; `saturation` is a fraction of it, so nothing is clipped.
    reach = np.min(np.where(direction > 0, 1 - luma, luma) / np.maximum(np.abs(direction), 1e-6), axis=-1)
    return (luma + (saturation * reach)[:, None] * direction).astype(np.float32)[:, None, None, :]


def _paint(rng: np.random.Generator, luma: np.ndarray, pattern: Planes) -> Float32[np.ndarray, "10 32 32 3"]:
    """Colours surfaces of the given luma: `pattern` (in [-1, 1]) blends two neighbouring random hues."""
    hue = _angles(rng, BLOCK_SIZE)
    hue_step = rng.uniform(-0.4, 0.4, BLOCK_SIZE)
    luma_step = TEXTURE_LUMA * rng.uniform(0.3, 1, BLOCK_SIZE)
    saturation = rng.uniform(0.3, 0.85, BLOCK_SIZE)
    low = _colours(luma - luma_step, hue - hue_step, saturation)
    high = _colours(luma + luma_step, hue + hue_step, saturation)
    return low + (high - low) * (0.5 + 0.5 * pattern[..., None])


def _draw_block(seed: int, block: int) -> tuple[UInt8[np.ndarray, "10 32 32 3"], Int32[np.ndarray, "10"]]:
    rng = np.random.default_rng((seed, block))
    labels = rng.permutation(BLOCK_SIZE).astype(np.int32)
    coverage = _coverage(rng)[..., None]
    half = rng.uniform(*CONTRAST_RANGE, BLOCK_SIZE) / 2
    middle = rng.uniform(half + 0.1, 0.9 - half)
    half *= rng.choice([-1.0, 1.0], BLOCK_SIZE)
    ground = _paint(rng, middle - half, _texture(rng))
    shape = _paint(rng, middle + half, _gradient(rng))
    images = ground + (shape - ground) * coverage
    images += NOISE_STD * rng.standard_normal(images.shape, dtype=np.float32)
    return np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8)[labels], labels


def draw_shapes(num_images: int, seed: int) -> tuple[UInt8[np.ndarray, "n 32 32 3"], Int32[np.ndarray, "n"]]:
    """Draws labelled images of the ten shapes in `CLASS_NAMES`.

    Every ten consecutive images are a block with one image of each class, in random order, and a random stream of its
    own. So image i depends only on `seed` and i, a smaller set is a prefix of a larger one, and the classes are
    balanced for any number of images. Draw training and test images from different seeds.

    The images are bit-identical across processes and processors, whatever vector instructions they have; a future NumPy
    with other random streams would draw other images.

    Args:
      num_images: number of images, at least 1.
      seed: random seed, at least 0.

    Returns:
      RGB images, uint8 [num_images, 32, 32, 3], and labels, int32 [num_images], indices into `CLASS_NAMES`.

    Raises:
      ValueError: if `num_images` is below 1 or `seed` below 0.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}.")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}.")
    num_blocks = -(-num_images // BLOCK_SIZE)
    images, labels = zip(*(_draw_block(seed, block) for block in range(num_blocks)), strict=True)
    return np.concatenate(images)[:num_images], np.concatenate(labels)[:num_images]
