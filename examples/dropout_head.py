"""A custom head: a Flax module with dropout, which is active in training and disabled in evaluation.

`flax_head` takes any module that maps features [batch, in_features] to logits [batch, classes]. The run does not store
the module's code, so pass the head to `load_run` as well. From a checkout, after `pip install .`:

    python examples/dropout_head.py
"""

from pathlib import Path

import flax.linen as nn
import jax

from cifar_jax import TrainConfig, flax_head, load_run
from cifar_jax.config import preset
from cifar_jax.experiment import train


class DropoutHead(nn.Module):
    """One hidden layer with dropout before and after it."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, features: jax.Array, train: bool) -> jax.Array:
        """Computes class logits from pooled features."""
        x = nn.Dropout(0.2, deterministic=not train)(features)
        x = nn.relu(nn.Dense(512)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)


HEAD = flax_head(DropoutHead())


def main(config: TrainConfig | None = None) -> Path:
    """Trains the head, by default with the demo preset, and returns the run directory."""
    run_dir = train(config or preset("demo"), head=HEAD)
    print(load_run(run_dir, head=HEAD))
    return run_dir


if __name__ == "__main__":
    main()
