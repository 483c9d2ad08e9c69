"""`train` with a narrow network, in which one process fails in a phase: `failing_train.py PHASE PROCESS OPTIONS`."""

import os
import sys

import pytest
from helpers import narrow_networks

from cifar_jax.cli.main import run
from cifar_jax.errors import RunError

PHASES = {
    "load": "cifar_jax.experiment.load_inputs",
    "extraction": "cifar_jax.features.extraction.make_extractor",
    "checkpoint": "cifar_jax.runs.writer.RunWriter.checkpoint",
    "evaluation": "cifar_jax.experiment._Scores.validate",
    "figures": "cifar_jax.runs.writer.RunWriter.draw",
}


def fail(*_, **__):
    raise RunError("The disk is full.")


if __name__ == "__main__":
    phase, process, *options = sys.argv[1:]
    with pytest.MonkeyPatch.context() as patch:
        narrow_networks(patch)
        if os.environ["JAX_PROCESS_ID"] == process:
            patch.setattr(PHASES[phase], fail)
        run(["train", *options])
