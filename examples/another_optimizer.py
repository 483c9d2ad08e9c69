"""Another optimiser: AdamW with a warm-up and a falling rate, from Optax.

`tx` is any `optax.GradientTransformation`; one whose update asks for `value` gets the loss of the step. It takes the
place of SGD and of all options that belong to it, such as --learning-rate and --schedule, in every mode. A schedule
counts the steps of the whole run. From a checkout, after `pip install .`:

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
    """Trains with the optimiser, the demo unless told otherwise, and returns the run directory."""
    run_dir = train(config or preset("demo"), tx=ADAMW)
    print(load_run(run_dir))
    return run_dir


if __name__ == "__main__":
    main()
