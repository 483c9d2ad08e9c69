"""A drawn stand-in for CIFAR-10: ten classes of 32x32 RGB images, made on the spot from a seed.

It lets the whole pipeline run, and be tested, without a download. A picture shows one large shape on a
textured ground. The class is the outline and nothing else: place, size, turn and colours are drawn
without regard to it, and the shape is as often lighter than its ground as darker. So neither the mean colour
nor a linear function of the pixels tells much, while features that see edges, corners and holes do.

A shape stands upright but for a random turn of at most 10 degrees either way, as things in photographs do: telling them
apart at every angle is a matter of geometry that features of photographs are little help with. The outlines would stay
apart however they were turned: no diamond beside the square, no ellipse beside the disc.
"""

import numpy as np
from jaxtyping import Float32, Int32, UInt8

CLASS_NAMES = ("disc", "ring", "square", "triangle", "cross", "star", "crescent", "heart", "arrow", "hourglass")
IMAGE_SIZE = 32
# A block holds each class once, and is what a random stream belongs to: see `draw_shapes`.
BLOCK_SIZE = len(CLASS_NAMES)

# Outlines are given in units of this radius (in pixels), on a scale at which they look equally large.
RADIUS_RANGE = (9.0, 12.0)
OUTLINE_REACH = 1.2  # what none exceeds; with it the frame never cuts a shape
MAX_TURN = np.pi / 18  # of the shape, either way: as things in photographs, it stands more or less upright
MAX_SHIFT = 3.0  # of the shape's centre from the image's, in pixels, where the frame leaves that much room
# Luma (0 to 1) between shape and ground, of which texture and shading take up to TEXTURE_LUMA on either side.
CONTRAST_RANGE = (0.42, 0.62)
TEXTURE_LUMA = 0.06
NOISE_STD = 0.02

LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # of red, green and blue (Rec. 601)
PIXEL_CENTRES = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5 - IMAGE_SIZE / 2  # from the image's middle

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
# A heart is two discs, the lobes, and the point below them, whose sides are tangents to the discs.
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
    # Sines differ in their last bit between processors. In double precision, then rounded, they agree, and
    # the sums, products and square roots that make pixels of them do too.
    return [array.astype(np.float32) for array in arrays]


def _angles(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.uniform(0, 2 * np.pi, shape)


def _coverage(rng: np.random.Generator) -> Planes:
    """Place each class's outline at random; returns the share of each pixel that it covers."""
    radius = rng.uniform(*RADIUS_RANGE, (BLOCK_SIZE, 1, 1))
    room = np.minimum(IMAGE_SIZE / 2 - 0.5 - OUTLINE_REACH * radius, MAX_SHIFT)
    shift_x, shift_y = room * rng.uniform(-1, 1, (2, BLOCK_SIZE, 1, 1))
    angle = rng.uniform(-MAX_TURN, MAX_TURN, (BLOCK_SIZE, 1, 1))
    x, y = _float32(PIXEL_CENTRES - shift_x, shift_y - PIXEL_CENTRES[:, None])  # y points up, as rows go down
    cos, sin, radius = _float32(np.cos(angle) / radius, np.sin(angle) / radius, radius)
    distance = _outline_distances(cos * x + sin * y, cos * y - sin * x) * radius
    # Anti-aliasing: an edge through a pixel's centre covers half of it, one half a pixel away all or nothing.
    return np.clip(0.5 - distance, 0, 1)


def _waves(rng: np.random.Generator, direction: np.ndarray, max_cycles: float) -> Float32[np.ndarray, "..."]:
    """Plane waves in [-1, 1] of random phase, with 0.4 to 1 times `max_cycles` across the image."""
    direction = direction[..., None, None]
    per_pixel = 2 * np.pi / IMAGE_SIZE * max_cycles * rng.uniform(0.4, 1, direction.shape)
    x = per_pixel * np.cos(direction) * PIXEL_CENTRES
    y = per_pixel * np.sin(direction) * PIXEL_CENTRES[:, None] + _angles(rng, *direction.shape)
    # sin(x + y), of which only the rows and columns need sines.
    sin_x, cos_x, sin_y, cos_y = _float32(np.sin(x), np.cos(x), np.sin(y), np.cos(y))
    return sin_x * cos_y + cos_x * sin_y


def _gradient(rng: np.random.Generator) -> Planes:
    """At most half a wave in [-1, 1], which looks like light from one side."""
    return _waves(rng, _angles(rng, BLOCK_SIZE), 0.5)


def _texture(rng: np.random.Generator) -> Planes:
    """Pick a ground texture in [-1, 1] for each image: plain, gradient, stripes, checks or clouds."""
    direction = _angles(rng, BLOCK_SIZE)
    # Clipped waves are bands with soft edges; two sets of bands at a right angle multiply to checks.
    stripes, crossing = (np.clip(3 * _waves(rng, direction + turn, 5.0), -1, 1) for turn in (0.0, np.pi / 2))
    clouds = np.mean(_waves(rng, _angles(rng, 3, BLOCK_SIZE), 3.0), axis=0)
    kinds = np.stack([np.zeros_like(stripes), _gradient(rng), stripes, stripes * crossing, clouds])
    return kinds[rng.integers(len(kinds), size=BLOCK_SIZE), np.arange(BLOCK_SIZE)]


def _colours(luma: np.ndarray, hue: np.ndarray, saturation: np.ndarray) -> Float32[np.ndarray, "10 1 1 3"]:
    """RGB colours in [0, 1] that have exactly the luma asked for."""
    direction = np.cos(hue[:, None] - np.array([0, 2, 4]) * np.pi / 3)
    direction -= np.sum(LUMA_WEIGHTS * direction, axis=-1, keepdims=True)
    luma = luma[:, None]
    # The way from grey to the face of the RGB cube. `saturation` is the share of it gone: nothing is clipped.
    way = np.min(np.where(direction > 0, 1 - luma, luma) / np.maximum(np.abs(direction), 1e-6), axis=-1)
    return (luma + (saturation * way)[:, None] * direction).astype(np.float32)[:, None, None, :]


def _paint(rng: np.random.Generator, luma: np.ndarray, pattern: Planes) -> Float32[np.ndarray, "10 32 32 3"]:
    """Colour surfaces of that luma: `pattern` (in [-1, 1]) runs between two neighbouring random hues."""
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
    """Draws labelled pictures of the ten shapes in `CLASS_NAMES`.

    Every ten consecutive images are a block that holds each class once, in random order, and has a random
    stream of its own. So image i depends on `seed` and i alone, fewer images are the first of more, and the
    classes are balanced however many are drawn. Draw training and test images from different seeds.

    The bits depend neither on the process nor on the vector instructions that its processor has; a future
    NumPy with other random streams would draw other images.

    Args:
      num_images: at least 1.
      seed: any integer from 0 on.

    Returns:
      RGB images, uint8 [num_images, 32, 32, 3], and labels, int32 [num_images], which index `CLASS_NAMES`.

    Raises:
      ValueError: when `num_images` is below 1 or `seed` below 0.
    """
    if num_images < 1:
        raise ValueError(f"{num_images} images cannot be drawn; choose 1 or more.")
    if seed < 0:
        raise ValueError(f"seed {seed} cannot be used; choose 0 or more.")
    num_blocks = -(-num_images // BLOCK_SIZE)
    images, labels = zip(*(_draw_block(seed, block) for block in range(num_blocks)), strict=True)
    return np.concatenate(images)[:num_images], np.concatenate(labels)[:num_images]
