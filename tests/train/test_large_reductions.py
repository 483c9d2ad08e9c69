"""Reductions over 32,769 and more rows, which jaxlib 0.10.2 computes wrongly on a CPU in some programs.

The fault (jax-ml/jax#39103) shows in none of the functions here; these are the largest of their kind.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax.models.backbone import Backbone
from cifar_jax.models.head import dense_head
from cifar_jax.models.resnet import ResNet, ResNetConfig
from cifar_jax.pretrained import random_backbone
from cifar_jax.train.finetune import trainable
from cifar_jax.train.losses import cross_entropy

ROWS = 40_001
# Compiles without the fusions in which the fault lies.
SOUND = {"xla_cpu_experimental_ynn_fusion_type": ""}


def test_the_gradient_of_a_softmax_regression_is_that_of_numpy():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(ROWS, 24)).astype(np.float32), rng.integers(0, 10, ROWS)
    params = dense_head(()).init(jax.random.key(0), 24, 10)
    logits_of = dense_head(())
    loss = jax.jit(jax.grad(lambda params: cross_entropy(logits_of(params, x), labels).mean()))
    found = loss(params)
    (kernel, bias) = (np.asarray(leaf, np.float64) for leaf in (params[-1]["kernel"], params[-1]["bias"]))
    logits = x.astype(np.float64) @ kernel + bias
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    error = (probs - np.eye(10)[labels]) / ROWS
    np.testing.assert_allclose(found[-1]["kernel"], x.T.astype(np.float64) @ error, atol=1e-6)
    np.testing.assert_allclose(found[-1]["bias"], error.sum(0), atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the fault is one of XLA:CPU")
@pytest.mark.slow
@pytest.mark.parametrize("num_images", [11, 12])
def test_a_step_at_224_pixels_is_that_of_a_sound_compiler(shapes, num_images):
    """Eleven images have 34,496 positions in stage 1; batches of 42 to 62 images have as many in stage 2."""
    network = ResNetConfig(stage_sizes=(1,), width=8)
    backbone: Backbone = random_backbone(jax.random.key(0), shapes.images[:32], network, 224)
    features = trainable(ResNet(network, dtype=jnp.float32, convs_as_dots=True), backbone, 224)

    def loss(params, images):
        pooled, _ = features(params, backbone.variables["batch_stats"], images, train=True, mask=jnp.ones(num_images))
        return (pooled**2).mean()

    arguments = backbone.variables["params"], shapes.images[:num_images]
    lowered = jax.jit(jax.value_and_grad(loss)).lower(*arguments)
    (loss_here, here), (loss_sound, sound) = (
        lowered.compile(compiler_options=options)(*arguments) for options in (None, SOUND)
    )
    np.testing.assert_allclose(loss_here, loss_sound, rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(sound))
    for ours, expected in zip(jax.tree.leaves(here), jax.tree.leaves(sound), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4 * largest)
