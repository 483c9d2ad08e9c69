"""What two networks compute, held against each other batch by batch: 256 images' activations at 224 take gigabytes."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from cifar_jax import Backbone, ResNet, preprocess

TOLERANCE = 1e-5
OUTPUTS = ("stage1", "stage2", "stage3", "stage4", "pooled")

Outputs = Callable[[np.ndarray], Sequence[np.ndarray]]  # uint8 images -> what OUTPUTS names


def our_outputs(backbone: Backbone, image_size: int) -> Outputs:
    """Our network, preprocessing included, as one compiled function."""

    # A closure made anew for each caller: jit would remember another one's network even after it has been patched.
    @jax.jit
    def run(backbone: Backbone, images_u8: jax.Array) -> tuple[jax.Array, ...]:
        x = preprocess(images_u8, backbone.preprocessing, image_size)
        output = ResNet(backbone.config).apply(backbone.variables, x)
        return (*output.stages, output.pooled)

    on_device = jax.device_put(backbone)
    return lambda images_u8: jax.device_get(run(on_device, images_u8))


def differences(ours: Outputs, theirs: Outputs, images_u8: np.ndarray, batch_size: int) -> dict[str, float]:
    """max|a - b| / max|b| of each output over all images. Outputs of different shapes are infinitely far apart."""
    furthest, largest = np.zeros(len(OUTPUTS)), np.zeros(len(OUTPUTS))
    for start in range(0, len(images_u8), batch_size):
        batch = images_u8[start : start + batch_size]
        for at, (a, b) in enumerate(zip(ours(batch), theirs(batch), strict=True)):
            furthest[at] = max(furthest[at], np.abs(a - b).max() if a.shape == b.shape else np.inf)
            largest[at] = max(largest[at], np.abs(b).max())
    return dict(zip(OUTPUTS, (furthest / largest).tolist(), strict=True))


def differing(found: dict[str, float]) -> dict[str, float]:
    """The differences that parity does not allow."""
    # Not `value > TOLERANCE`: NaN is no parity either.
    return {name: value for name, value in found.items() if not value <= TOLERANCE}
