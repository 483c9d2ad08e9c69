"""The head matches NumPy and is initialised like Keras's `Dense`."""

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.models.head import Head, head_logits, init_head


def test_logits_match_numpy():
    params = init_head(jax.random.key(0), 8, (6, 5), 3)
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    y = np.asarray(x, np.float64)
    for n, layer in enumerate(params):
        y = y @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
        y = np.maximum(y, 0) if n < 2 else y
    np.testing.assert_allclose(head_logits(params, x), y, rtol=1e-5, atol=1e-6)


def test_init_matches_keras_dense():
    params = init_head(jax.random.key(0), 2048)
    assert [layer["kernel"].shape for layer in params] == [(2048, 1024), (1024, 512), (512, 10)]
    for layer in params:
        limit = np.sqrt(6 / sum(layer["kernel"].shape))
        kernel = np.asarray(layer["kernel"])
        assert 0.99 * limit < np.abs(kernel).max() <= limit
        assert abs(kernel.mean()) < 0.02 * limit or kernel.size < 10_000
        assert not np.asarray(layer["bias"]).any()


def test_no_hidden_layers_give_a_linear_probe():
    params = init_head(jax.random.key(0), 4, (), 3)
    assert len(params) == 1
    x = np.ones((1, 4), np.float32)
    np.testing.assert_allclose(head_logits(params, -x), -head_logits(params, x), rtol=1e-6)


def test_head_is_called_in_evaluation_mode_by_default():
    """`logits` need not have defaults for `train` and `key`."""
    seen = []

    def logits(params, features, *, train, key):
        seen.append((train, key))
        return features @ params

    head = Head(lambda key, width, classes: jnp.ones((width, classes)), logits, "a product")
    assert head(head.init(jax.random.key(0), 2, 3), jnp.ones((4, 2))).shape == (4, 3)
    head(jnp.ones((2, 3)), jnp.ones((4, 2)), train=True, key=1)
    assert seen == [(False, None), (True, 1)]
