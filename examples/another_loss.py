"""Another loss: focal loss, which gives little weight to examples that are already classified well.

A loss is a function `(logits, labels) -> [batch]`, one number an example. Every mode trains on it and the validation
reports it; padding and the mean are the step's business. From a checkout, after `pip install .`:

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
    """Trains with the loss, the demo unless told otherwise, and returns the run directory."""
    run_dir = train(config or preset("demo"), loss_fn=focal_loss)
    summary = load_run(run_dir).summary
    print(f"focal loss {summary['val_loss']:.4f}, accuracy {summary['val_accuracy']:.4f}, {run_dir}")
    return run_dir


if __name__ == "__main__":
    main()
