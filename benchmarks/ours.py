"""This project's side: features, an epoch of the head, and what is measured of the products that it is made of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH_SIZE = 64  # the notebook's
HIDDEN = (1024, 512)


def load_images(dataset: str, num_train: int, num_test: int) -> tuple[np.ndarray, ...]:
    """Training images of a data set, uint8 [n, 32, 32, 3], and their labels, and test images and theirs."""
    from cifar_jax.data import load_splits

    splits = load_splits(dataset, train_examples=num_train, test_examples=num_test)
    return *map(np.ascontiguousarray, splits.train), *map(np.ascontiguousarray, splits.test)


def make_ours(
    weights: Path, image_size: int, precision: str = "float32"
) -> Callable[[np.ndarray, int | None], np.ndarray]:
    """Pixels to features by `make_extractor`, which chooses how many images go at a time.

    The CPU and its memory are used as the commands use them, which must be said before JAX begins.
    """
    from cifar_jax import load_backbone, make_extractor
    from cifar_jax.runtime.devices import keep_freed_memory, use_all_cores

    use_all_cores()
    keep_freed_memory()

    extractor = make_extractor(load_backbone(weights), image_size, precision)

    def ours(images_u8: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        return extractor(images_u8)

    return ours


def make_epoch(num_examples: int, in_features: int) -> Callable[[], None]:
    """An epoch of the head on drawn features, as the job runs it."""
    import jax
    import optax

    from cifar_jax import EpochOrder, init_head, init_state

    tx, (order, step, init) = optax.sgd(0.01), jax.random.split(jax.random.key(0), 3)
    order = EpochOrder(order, step, BATCH_SIZE)
    advance = steps_of_head(drawn_features(num_examples, in_features), tx, order)
    state = init_state({"head": init_head(init, in_features, HIDDEN)}, tx)

    def epoch() -> None:
        nonlocal state
        state = jax.block_until_ready(advance(state, {}, 0, range(advance.steps_per_epoch))[0])

    return epoch


def make_products(num_examples: int, in_features: int) -> Callable[[], None]:
    """The matrix products of such an epoch, forwards and backwards, and nothing else."""
    import jax
    import jax.numpy as jnp

    from cifar_jax import init_head

    features, _ = drawn_features(-(-num_examples // BATCH_SIZE) * BATCH_SIZE, in_features)
    batches = jax.device_put(features.reshape(-1, BATCH_SIZE, in_features))
    kernels = [layer["kernel"] for layer in init_head(jax.random.key(0), in_features, HIDDEN)]

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)

    @jax.jit
    def products(kernels: list[jax.Array], batches: jax.Array) -> list[jax.Array]:
        def step(_: list[jax.Array], x: jax.Array) -> tuple[list[jax.Array], None]:
            inputs = [x]
            for kernel in kernels:
                inputs.append(dot(inputs[-1], kernel))
            gradient, gradients = inputs.pop(), list[jax.Array]()
            for kernel, x in zip(reversed(kernels), reversed(inputs), strict=True):
                gradients.insert(0, dot(x.T, gradient))
                gradient = dot(gradient, kernel.T)  # the features' own is not used, so XLA leaves it out
            return gradients, None

        # Only the last step's gradients are handed out, but XLA skips no step of a scan.
        return jax.lax.scan(step, [jnp.zeros_like(kernel) for kernel in kernels], batches)[0]

    def run() -> None:
        jax.block_until_ready(products(kernels, batches))

    return run


def make_heads(num_heads: int, num_examples: int, in_features: int, in_one_call: bool) -> Callable[[], np.ndarray]:
    """An epoch of many heads, in one compiled call or one after the other; gives their last kernels, to be compared."""
    import jax
    import optax

    from cifar_jax import EpochOrder, init_head, init_state, train_heads

    features, labels = jax.device_put(drawn_features(num_examples, in_features))
    rate, (order_key, step_key, init) = 0.01, jax.random.split(jax.random.key(0), 3)
    order, keys = EpochOrder(order_key, step_key, BATCH_SIZE), jax.random.split(init, num_heads)
    tx = optax.sgd(rate)
    advance = steps_of_head((features, labels), tx, order)
    steps = range(advance.steps_per_epoch)

    def one_call() -> np.ndarray:
        params, _ = train_heads(keys, rate, features, labels, order, 1, hidden=HIDDEN)
        return np.asarray(params[-1]["kernel"])

    def in_turn() -> np.ndarray:
        starts = (init_state({"head": init_head(key, in_features, HIDDEN)}, tx) for key in keys)
        return np.stack([advance(state, {}, 0, steps)[0].params["head"][-1]["kernel"] for state in starts])

    return one_call if in_one_call else in_turn


def steps_of_head(data: tuple[Any, Any], tx: Any, order: Any) -> Any:
    """The compiled steps of the dense head on features and labels."""
    from cifar_jax import Split, cached_task, cross_entropy, dense_logits, make_advance, make_train_step
    from cifar_jax.runtime.sharding import make_mesh

    task = cached_task((), dense_logits, {"train": Split(*data)})
    return make_advance(task, make_train_step(task.forward, cross_entropy, tx), order, make_mesh())


def drawn_features(num_examples: int, in_features: int) -> tuple[np.ndarray, np.ndarray]:
    """Features that a relu has been over, and labels."""
    rng = np.random.default_rng(0)
    features = 0.1 * np.abs(rng.standard_normal((num_examples, in_features), np.float32))
    return features, rng.integers(0, 10, num_examples, np.int32)
