"""Comparison of two networks' outputs, batch by batch because the activations of 256 images at 224 take gigabytes."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from cifar_jax import Backbone, ResNet, preprocess

TOLERANCE = 1e-5
OUTPUTS = ("stage1", "stage2", "stage3", "stage4", "pooled", "logits")

Outputs = Callable[[np.ndarray], Sequence[np.ndarray]]  # uint8 images -> the OUTPUTS, logits only if there is a top


def our_outputs(backbone: Backbone, image_size: int, compiled: bool = True) -> Outputs:
    """Returns our network's outputs as a function, including preprocessing and the file's own classifier, if any.

    Uncompiled, op by op, it is slower on many images and much faster on few, because networks that differ in a few ops
    share the compiled others.
    """

    # A new closure for each caller: otherwise jit would reuse a cached program after the network's code is patched.
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
    """Returns max|a - b| / max|b| of each output over all images, infinity if the shapes differ."""
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
    """Asserts that a reference network can reveal mistakes.

    Dead networks agree on everything, and ordinary statistics hide a wrong epsilon.

    Args:
      outputs: outputs of the network for several images.
      means: running means of all its BatchNorms.
      variances: running variances of all its BatchNorms.
    """
    *stages, pooled = outputs[:5]
    for stage in stages:
        assert 0.3 < stage.std() < 3
        assert 0.05 < (stage == 0).mean() < 0.5, "the relu must cut off some activations, not all"
    assert pooled.std(axis=0).mean() > 0.3 * pooled.std(), (
        "features must differ between images, not only between channels"
    )
    assert np.abs(means).mean() > 0.1
    assert ((variances > 5e-6) & (variances < 2e-5)).mean() > 0.02
    assert (variances > 0.1).mean() > 0.4


def differing(found: dict[str, float]) -> dict[str, float]:
    """Returns the differences above the tolerance."""
    # Not `value > TOLERANCE`, which is false for NaN.
    return {name: value for name, value in found.items() if not value <= TOLERANCE}
