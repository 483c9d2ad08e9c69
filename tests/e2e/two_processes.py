"""Run by test_distributed.py, the same in each of two processes: `two_processes.py DIRECTORY`."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import TINY, narrow_networks

from cifar_jax import experiment
from cifar_jax.cli.main import main
from cifar_jax.errors import UserError
from cifar_jax.runtime import multihost
from cifar_jax.runtime.supervisor import supervise

JOB = (*TINY, "--schedule", "constant", "--train-examples", "127", "--cache-dir")


def error_of(call):
    """Returns the message of the error that a call raises."""
    with pytest.raises(UserError) as raised:
        call()
    return str(raised.value)


def refuse():
    raise UserError("No.")


def exchange():
    """Calls each function of `multihost` and returns its results in this process."""
    own = jax.process_index()
    rows = np.arange(14, dtype=np.float32).reshape(7, 2)
    share = rows[multihost.own_rows(7)]
    return {
        "count": jax.process_count(),
        "value": multihost.from_first(lambda: {"process": own}),
        "error": error_of(lambda: multihost.from_first(refuse)),
        "differ": error_of(lambda: multihost.require_same({"data": "a", "weights": str(own)})),
        "share": len(share),
        "gathered": np.array_equal(multihost.gather(share, 7), rows),
        "arrays": multihost.arrays_from_first([np.full(2, own, np.int32)])[0].tolist(),
    }


def run(directory):
    """Trains an epoch, resumes for another, and is refused a third command without --resume."""
    out, found = directory / f"process{jax.process_index()}", exchange()
    train = ["train", *JOB, str(directory / "cache"), "--out", str(directory / "run")]
    usual = experiment.fit

    def kept(*arguments, **more):
        state, rows = usual(*arguments, **more)
        np.savez(out, *jax.tree.leaves(jax.device_get(state.params)))
        return state, rows

    with pytest.MonkeyPatch.context() as patch:
        narrow_networks(patch)
        patch.setattr(experiment, "fit", kept)
        patch.setattr("cifar_jax.report.run_figures.write_samples", lambda *_: None)
        found["codes"] = [main([*train, *more]) for more in (["--epochs", "1"], ["--epochs", "2", "--resume"])]
        out.with_suffix(".json").write_text(json.dumps(found))
        main(train)  # which ends both processes


if __name__ == "__main__":
    supervise()
    multihost.join()
    run(Path(sys.argv[1]))
