"""`train` as the command line has it, with networks as narrow as tests need them: `narrow_train.py OPTIONS`."""

import sys

import pytest
from helpers import narrow_networks

from cifar_jax.cli.main import run

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        narrow_networks(patch)
        run(["train", *sys.argv[1:]])
