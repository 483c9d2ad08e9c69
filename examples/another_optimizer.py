"""A custom optimiser: Optax's AdamW with a warm-up and a decaying learning rate.

`tx` is any `optax.GradientTransformation`; if its update takes the extra argument `value`, it receives the loss of the
step. In every mode it replaces SGD and all of SGD's options, such as --learning-rate and --schedule. A schedule counts
the steps of the whole run. From a checkout, after `pip install .`:

    python examples/another_optimizer.py
"""

from pathlib import Path

import optax

from cifar_jax import TrainConfig, load_run
from cifar_jax.config import preset
from cifar_jax.experiment import train

RATE = optax.warmup_exponential_decay_schedule(
    init_value=1e-5, peak_value=1e-3, warmup_steps=30, transition_steps=100, decay_rate=0.5
)
ADAMW = optax.adamw(RATE, weight_decay=1e-4)


def main(config: TrainConfig | None = None) -> Path:
    """Trains with AdamW, by default on the demo preset, and returns the run directory."""
    run_dir = train(config or preset("demo"), tx=ADAMW)
    print(load_run(run_dir))
    return run_dir


if __name__ == "__main__":
    main()
