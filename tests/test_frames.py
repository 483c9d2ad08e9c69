"""From the command to the network's stem there are at most ten frames of ours, in every mode."""

import sys
from pathlib import Path

import jax
import pytest
from helpers import TINY

import cifar_jax
from cifar_jax.cli.main import main

PACKAGE = str(Path(cifar_jax.__file__).parent)
# The functions that apply the stem: in a compiled step, and in extraction.
STEMS = {("resnet.py", "__call__"), ("folded.py", "features_of")}
MOST = 10


def frames_to_the_stem(*options):
    """Functions of the package on the stack when a step or extraction first applies the stem, outermost first."""
    found = []

    def on_call(frame, event, _):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        if (Path(code.co_filename).name, code.co_name) in STEMS and "ResNet" in code.co_qualname + "ResNet" * (
            code.co_name != "__call__"
        ):
            stack = []
            while frame:
                if frame.f_code.co_filename.startswith(PACKAGE):
                    stack.append(frame.f_code.co_qualname)
                frame = frame.f_back
            found.append(stack[::-1])

    jax.clear_caches()  # what is compiled already is not traced
    sys.setprofile(on_call)
    try:
        assert main(["train", *TINY, "--epochs", "1", *map(str, options)]) == 0
    finally:
        sys.setprofile(None)
    # Shape evaluation and calibration, while the weights are made, do not count.
    return [stack for stack in found if not {"load_inputs", "make_untrained"} & set(stack)]


@pytest.mark.parametrize("mode", ["cached", "live", "finetune"])
def test_ten_frames_at_most_lead_from_the_command_to_the_stem(tmp_path, narrow, mode):
    stacks = frames_to_the_stem("--mode", mode, "--out", tmp_path / "run", "--cache-dir", tmp_path / "cache")

    assert stacks and all(stack[0] == "main" for stack in stacks)
    assert max(map(len, stacks)) <= MOST, " > ".join(max(stacks, key=len))
