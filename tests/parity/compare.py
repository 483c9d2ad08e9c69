"""What two networks compute, held against each other batch by batch: 256 images' activations at 224 take gigabytes."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from cifar_jax import Backbone, ResNet, preprocess

TOLERANCE = 1e-5
OUTPUTS = ("stage1", "stage2", "stage3", "stage4", "pooled", "logits")

Outputs = Callable[[np.ndarray], Sequence[np.ndarray]]  # uint8 images -> what OUTPUTS names, logits if there is a top


def our_outputs(backbone: Backbone, image_size: int, compiled: bool = True) -> Outputs:
    """Our network, preprocessing included, and its file's own classifier where it has one.

    Not compiled, operation by operation, it is slower on many images and much faster on few: networks that differ in
    some operations only share the others.
    """

    # A closure made anew for each caller: jit would remember another one's network even after it has been patched.
    def run(backbone: Backbone, images_u8: jax.Array) -> tuple[jax.Array, ...]:
        x = preprocess(images_u8, backbone.preprocessing, image_size)
        output = ResNet(backbone.config).apply(backbone.variables, x)
        return (*output.stages, output.pooled)

    run, on_device, top = jax.jit(run) if compiled else run, jax.device_put(backbone), backbone.top

    def outputs(images_u8: np.ndarray) -> Sequence[np.ndarray]:
        *stages, pooled = jax.device_get(run(on_device, images_u8))
        return [*stages, pooled] if top is None else [*stages, pooled, pooled @ top["kernel"] + top["bias"]]

    return outputs


def differences(ours: Outputs, theirs: Outputs, images_u8: np.ndarray, batch_size: int) -> dict[str, float]:
    """max|a - b| / max|b| of each output over all images. Outputs of different shapes are infinitely far apart."""
    furthest, largest = np.zeros(len(OUTPUTS)), np.zeros(len(OUTPUTS))
    for start in range(0, len(images_u8), batch_size):
        batch = images_u8[start : start + batch_size]
        pairs = list(zip(ours(batch), theirs(batch), strict=True))
        for at, (a, b) in enumerate(pairs):
            furthest[at] = max(furthest[at], np.abs(a - b).max() if a.shape == b.shape else np.inf)
            largest[at] = max(largest[at], np.abs(b).max())
    count = len(pairs)
    return dict(zip(OUTPUTS[:count], (furthest[:count] / largest[:count]).tolist(), strict=True))


def assert_alive(outputs: Sequence[np.ndarray], means: np.ndarray, variances: np.ndarray) -> None:
    """Dead networks agree about everything, and ordinary statistics hide a wrong epsilon: this one is neither.

    Args:
      outputs: of a network, for several images.
      means: all that its BatchNorms hold.
      variances: likewise.
    """
    *stages, pooled = outputs[:5]
    for stage in stages:
        assert 0.3 < stage.std() < 3
        assert 0.05 < (stage == 0).mean() < 0.5, "its relu cuts some off, not all"
    assert pooled.std(axis=0).mean() > 0.3 * pooled.std(), "images differ from each other, not only channels"
    assert np.abs(means).mean() > 0.1
    assert ((variances > 5e-6) & (variances < 2e-5)).mean() > 0.02
    assert (variances > 0.1).mean() > 0.4


def differing(found: dict[str, float]) -> dict[str, float]:
    """The differences that parity does not allow."""
    # Not `value > TOLERANCE`: NaN is no parity either.
    return {name: value for name, value in found.items() if not value <= TOLERANCE}
