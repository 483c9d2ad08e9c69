"""From the command to the network's stem there are at most ten frames of ours, in every mode."""

import sys
from pathlib import Path

import jax
import pytest
from helpers import TINY

import cifar_jax
from cifar_jax.cli.main import main

PACKAGE = str(Path(cifar_jax.__file__).parent)
STEMS = {"ResNet.__call__", "features_of"}  # apply the stem: in a compiled step, and in extraction
MOST = 10


def frames_to_the_stem(*options):
    """Functions of the package on the stack whenever a job applies the stem, outermost first."""
    found = []

    def on_call(frame, event, _):
        if event != "call" or frame.f_code.co_qualname not in STEMS:
            return
        stack = []
        while frame:
            if frame.f_code.co_filename.startswith(PACKAGE):
                stack.append(frame.f_code.co_qualname)
            frame = frame.f_back
        found.append(stack[::-1])

    jax.clear_caches()  # a function that is compiled already is not traced
    sys.setprofile(on_call)
    try:
        assert main(["train", *TINY, "--epochs", "1", *map(str, options)]) == 0
    finally:
        sys.setprofile(None)
    # Shape evaluation and calibration, while the weights are made, do not count.
    return [stack for stack in found if not {"load_inputs", "make_untrained"} & set(stack)]


@pytest.mark.parametrize("mode", ["cached", "live", "finetune"])
def test_at_most_ten_frames_lead_from_the_command_to_the_stem(tmp_path, narrow, quick_compile, mode):
    stacks = frames_to_the_stem("--mode", mode, "--out", tmp_path / "run", "--cache-dir", tmp_path / "cache")

    assert stacks and all(stack[0] == "main" for stack in stacks)
    assert max(map(len, stacks)) <= MOST, " > ".join(max(stacks, key=len))
