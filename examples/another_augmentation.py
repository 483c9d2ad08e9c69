"""A custom augmentation: mixup, which trains on blends of two images and of their labels.

An augmentation is a function `(key, batch) -> batch` that runs inside the compiled step, on the images before
upsampling, in training only. It may also change the labels: they are integers, or, as here, distributions over the
classes. A short last batch is padded with copies of the first training image, whose mask is 0. Augmentation needs the
pixels at every step, so it works in `live` and `finetune` mode only. From a checkout, after `pip install .`:

    python examples/another_augmentation.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from cifar_jax import Batch, TrainConfig, load_run
from cifar_jax.config import preset
from cifar_jax.experiment import train


def mixup(key: jax.Array, batch: Batch) -> Batch:
    """Blends each example with the previous one in the batch.

    Reference:
      Zhang et al. 2017, https://arxiv.org/abs/1710.09412
    """
    share = jax.random.uniform(key, batch.mask.shape, minval=0.7)
    images, labels = batch.inputs.astype(jnp.float32), jax.nn.one_hot(batch.labels, 10)
    s = share[:, None, None, None]
    images = s * images + (1 - s) * jnp.roll(images, 1, axis=0)
    labels = share[:, None] * labels + (1 - share[:, None]) * jnp.roll(labels, 1, axis=0)
    return batch._replace(inputs=images.round().astype(jnp.uint8), labels=labels)


def main(config: TrainConfig | None = None) -> Path:
    """Trains with mixup, by default on a part of the demo's images, and returns the run directory."""
    run_dir = train(config or preset("demo", mode="live", train_examples=1000), augment=mixup)
    print(load_run(run_dir))
    return run_dir


if __name__ == "__main__":
    main()
