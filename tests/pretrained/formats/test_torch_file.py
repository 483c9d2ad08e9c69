"""PyTorch checkpoints are read without PyTorch, and nothing in them is ever executed."""

import io
import os
import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from torch_files import (
    Call,
    Global,
    Persistent,
    View,
    encode,
    pickled,
    tensor,
    views,
    write_torch,
    write_zip,
)

from cifar_jax.pretrained import WeightsError
from cifar_jax.pretrained.formats import torch_pickle
from cifar_jax.pretrained.formats.torch_file import read_torch

RNG = np.random.default_rng(0)
TENSORS = {
    "conv1.weight": RNG.normal(size=(4, 3, 7, 7)).astype(np.float32),
    "bn1.running_var": RNG.random(4).astype(np.float32),
    "bn1.num_batches_tracked": np.array(7),
}


def refusal(path):
    with pytest.raises(WeightsError) as caught:
        read_torch(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message, message
    return message


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value)


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def legacy(request):
    """Whether files are in the legacy container."""
    return request.param


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64])
def test_dtypes(tmp_path, legacy, dtype):
    tensors = TENSORS | {"x": np.linspace(-2, 2, 12).reshape(3, 4).astype(dtype)}
    assert_same(read_torch(write_torch(tmp_path / "x.pth", tensors, legacy)).tensors, tensors)


def test_views_of_one_storage(tmp_path, legacy):
    flat = np.arange(24, dtype=np.float32)
    tensors = {
        "whole": View("s", flat, 0, (4, 6), (6, 1)),
        "transposed": View("s", flat, 0, (6, 4), (1, 6)),
        "part": View("s", flat, 6, (2, 3), (6, 2)),
        "one": View("s", flat, 23, (), ()),
        "none": View("s", flat, 0, (0, 3), (3, 1)),
        "last": View("s", flat, 20, (4,), (1,)),
    }
    whole = flat.reshape(4, 6)
    wanted = {"whole": whole, "transposed": whole.T, "part": whole[1:3, :5:2], "one": flat[23], "last": flat[20:]}
    found = read_torch(write_torch(tmp_path / "x.pth", tensors, legacy)).tensors
    assert found.pop("none").shape == (0, 3)
    assert_same(found, wanted)
    assert np.shares_memory(found["whole"], found["last"])


@pytest.mark.parametrize(
    "view",
    [
        View("s", np.zeros(6, np.float32), 0, (7,), (1,)),
        View("s", np.zeros(6, np.float32), 1, (2, 3), (3, 1)),
        View("s", np.zeros(6, np.float32), -1, (2,), (1,)),
        View("s", np.zeros(6, np.float32), 5, (2,), (-1,)),
        View("s", np.zeros(6, np.float32), 0, (2**40,), (0,)),
        View("s", np.zeros(6, np.float32), 0, (2**30, 2**30), (0, 0)),
        View("s", np.zeros(6, np.float32), 0, (2,), (2**60,)),
        View("s", np.zeros(6, np.float32), 0, (2, 3), (3,)),
    ],
)
def test_views_outside_their_storage_are_refused(tmp_path, legacy, view):
    assert "is corrupt" in refusal(write_torch(tmp_path / "x.pth", {"x": view}, legacy))


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "net"])
def test_nested_state_dicts(tmp_path, legacy, key):
    def wrap(state):
        return {"epoch": 3, "loss": 0.25, "best": None, "optimizer": {"groups": [{0: (1, 2)}]}, key: state}

    checkpoint = read_torch(write_torch(tmp_path / "x.pth", TENSORS, legacy, wrap))
    assert_same(checkpoint.tensors, TENSORS)
    assert (checkpoint.place, checkpoint.others) == (key, ())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "ema_model.module.", "model."])
def test_wrapper_prefixes_are_removed(tmp_path, prefix):
    wrapped = {f"{prefix}{name}": value for name, value in TENSORS.items()} | {"n_averaged": np.array(3)}
    assert_same(read_torch(write_torch(tmp_path / "x.pth", wrapped)).tensors, TENSORS)


def test_prefix_of_some_tensors_is_kept(tmp_path):
    tensors = TENSORS | {"module.extra": np.zeros(2, np.float32)}
    assert_same(read_torch(write_torch(tmp_path / "x.pth", tensors)).tensors, tensors)


def test_parameters_sizes_and_other_opcodes(tmp_path):
    """Covers the opcodes of a state dict of parameters with `_metadata`, and of another pickle protocol."""
    view = views({"x": np.ones((2, 3), np.float32)})["x"]
    parameter = Call(
        Global("torch._utils", "_rebuild_parameter"),
        (tensor(view), True, Call(Global("collections", "OrderedDict"), ())),
    )
    about = {"size": Call(Global("torch", "Size"), ((1, 2),)), "device": Call(Global("torch", "device"), ("cuda", 0))}
    state = encode({"x": parameter}) + encode({"_metadata": {"": {"version": 1}}}) + b"b"
    content = b"\x80\x02}(" + encode("about") + encode(about) + encode("state_dict") + state + b"u."
    path = write_zip(tmp_path / "x.pth", content, {"0": view.flat.tobytes()})
    assert_same(read_torch(path).tensors, {"x": np.ones((2, 3), np.float32)})
    plain = {"text": ["a", 1.5, True, None, 2**40], "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), 1: {2: 3}}
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        read = torch_pickle.read_pickle(io.BytesIO(pickle.dumps(plain, protocol)), "x")
        assert read == plain


# ---------------------------------------------------------------------------------------------------------------------
# Malicious, corrupt and malformed files


class Runs:
    def __reduce__(self):
        return os.system, ("touch /tmp/this-must-not-be",)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (pickle.dumps(Runs(), 2), "system"),
        (pickle.dumps(Runs(), 5), "system"),
        (pickled(Call(Global("builtins", "eval"), ("1",))), "builtins.eval"),
        (pickled(Call(Global("torch", "hub.load"), ("x",))), "torch.hub.load"),
        (pickled(Call(Global("torchvision.models.resnet", "ResNet"), ())), "torchvision.models.resnet.ResNet"),
        (pickled({"args": Call(Global("argparse", "Namespace"), ())}), "argparse.Namespace"),
        (b"\x80\x02(i__main__\nx\n.", "INST"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02N0.", "POP"),
        (b"P1\n.", "PERSID"),
    ],
)
def test_unsupported_globals_and_opcodes_are_refused(tmp_path, legacy, value, name):
    path = tmp_path / "x.pth"
    if legacy:
        path.write_bytes(value)
    else:
        write_zip(path, value, {})
    message = refusal(path)
    assert "a plain checkpoint does not need" in message and name in message
    assert not os.path.exists("/tmp/this-must-not-be")


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\x80\x02}",
        b"\x80\x02]K\x01K\x02s.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02}]K\x01s.",  # a list as a key
        b"S'\\F",  # an invalid escape sequence, of which pickletools warns
        b"\x80\x02h\x05.",  # a missing memo entry
        b"\x80\x02K\x01K\x02R.",
        b"\x80\x02(K\x01.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",  # a string of 2^63 bytes
        b"\x80\x02\x8b\xff\xff\xff\x7f1.",  # a number of 2^31 bytes
        pickled(Persistent(("storage", Global("torch", "FloatStorage"), "0", "cpu", -1))),
        pickled(Call(Global("torch._utils", "_rebuild_tensor_v2"), (1, 2, (), ()))),
        pickled(Call(Global("torch", "Size"), (1, 2, 3))),
    ],
)
def test_corrupt_pickles_are_refused(tmp_path, value):
    assert "is corrupt" in refusal(write_zip(tmp_path / "x.pth", value, {}))


def test_small_malicious_files_cost_nothing(tmp_path):
    """Python's unpickler allocates 64 GB for the first, and overflows the C stack on the second."""
    put = b"\x80\x02K\x01r" + struct.pack("<I", 2**32 - 1) + b"."
    assert torch_pickle.read_pickle(io.BytesIO(put), "x") == 1
    deep = b"\x80\x02}" + b")" + b"\x85" * 400_000 + b"K\x01s."
    assert "is corrupt" in refusal(write_zip(tmp_path / "x.pth", deep, {}))
    long = b"\x80\x02" + b"N" * 600_000 + b"."
    assert "too long for a ResNet" in refusal(write_zip(tmp_path / "y.pth", long, {}))


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ([1, 2], "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        ({"state_dict": {"x": 3}}, "holds no state dict"),
        ({"x": tensor(View("s", np.zeros(2, np.float32), 0, (2,), (1,))), "y": 3}, "is not a tensor"),
    ],
)
def test_checkpoint_without_state_dict_is_refused(tmp_path, value, part):
    assert part in refusal(write_zip(tmp_path / "x.pth", value, {"s": bytes(8)}))


def rezipped(path, change):
    """Rewrites an archive with its entries changed by a function of (name, content)."""
    with zipfile.ZipFile(path) as file:
        entries = [(name, file.read(name)) for name in file.namelist()]
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries:
            for entry in change(name, content):
                file.writestr(*entry)
    return path


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda name, content: [] if name.endswith("/0") else [(name, content)], "missing entry archive/data/0"),
        (lambda name, content: [(name, content[:-4] if name.endswith("/0") else content)], "size mismatch"),
        (lambda name, content: [(name, b"big" if name.endswith("byteorder") else content)], "big-endian"),
        (
            lambda name, content: [(name.replace("data.pkl", "x.pkl"), content)],
            "neither a PyTorch checkpoint nor a Keras archive",
        ),
        (
            lambda name, content: [(name, content), (f"other/{name.removeprefix('archive/')}", content)],
            "neither a PyTorch checkpoint nor",
        ),
    ],
)
def test_malformed_archives_are_refused(tmp_path, change, part):
    assert part in refusal(rezipped(write_torch(tmp_path / "x.pth", TENSORS), change))


def test_zip_bomb_is_refused(tmp_path):
    path = write_zip(tmp_path / "x.pth", {}, {"0": bytes(10**7)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000 and "compressed or encrypted" in refusal(path)


def test_truncated_files_are_refused(tmp_path, legacy):
    """tests/robustness/test_mutations.py changes bytes."""
    path = write_torch(tmp_path / "x.pth", TENSORS, legacy)
    content = path.read_bytes()
    for size in (*range(0, 200, 7), *np.random.default_rng(0).integers(0, len(content), 30)):
        path.write_bytes(content[:size])
        refusal(path)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda content: content.replace(struct.pack("<q", 6), struct.pack("<q", 3)), "size mismatch"),
        (lambda content: pickled(5) + content, "not a PyTorch checkpoint"),
        (
            lambda content: content.replace(encode("little_endian") + b"\x88", encode("little_endian") + b"\x89"),
            "big-endian",
        ),
    ],
)
def test_malformed_legacy_containers_are_refused(tmp_path, change, part):
    path = write_torch(tmp_path / "x.pth", {"x": np.zeros(6, np.float32)}, legacy=True)
    path.write_bytes(change(path.read_bytes()))
    assert part in refusal(path)
