"""A custom loss: focal loss, which down-weights examples that are already classified well.

A loss is a function `(logits, labels) -> [batch]`, one loss per example; the training step masks padding and takes the
mean. It works in every mode, and validation reports it too. From a checkout, after `pip install .`:

    python examples/another_loss.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from cifar_jax import TrainConfig, cross_entropy, load_run
from cifar_jax.config import preset
from cifar_jax.experiment import train


def focal_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy times `(1 - p) ** 2`, where `p` is the probability of the label.

    Reference:
      Lin et al. 2017, https://arxiv.org/abs/1708.02002
    """
    loss = cross_entropy(logits, labels)
    return (1 - jnp.exp(-loss)) ** 2 * loss


def main(config: TrainConfig | None = None) -> Path:
    """Trains with focal loss, by default on the demo preset, and returns the run directory."""
    run_dir = train(config or preset("demo"), loss_fn=focal_loss)
    summary = load_run(run_dir).summary
    print(f"focal loss {summary['val_loss']:.4f}, accuracy {summary['val_accuracy']:.4f}, {run_dir}")
    return run_dir


if __name__ == "__main__":
    main()
