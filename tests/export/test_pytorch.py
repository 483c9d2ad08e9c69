"""The directory for PyTorch, read without PyTorch."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from helpers import FIELDS, files_below
from safetensors.numpy import load_file
from untrained_runs import CLASSES, KERAS_LIKE, TORCH_LIKE, drawn_run

from cifar_jax.data.resize import Resize
from cifar_jax.errors import UserError
from cifar_jax.export.trained_model import about_of
from cifar_jax.export.write import export_run
from cifar_jax.models.head import Head, dense_head
from cifar_jax.models.preprocess import CAFFE

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def keras_like():
    """A run of a Keras-like network with a head of three layers."""
    return drawn_run(KERAS_LIKE, side=32, upsampled=True, hidden=(16, 8))


@pytest.fixture(scope="module")
def exported(keras_like, tmp_path_factory):
    """Its export."""
    path = tmp_path_factory.mktemp("pytorch") / "model"
    export_run(keras_like, "pytorch", path)
    return path


def test_directory_has_files_that_others_may_read(exported):
    assert files_below(exported) == ["SHA256SUMS", "config.json", "model.py", "model.safetensors"]
    assert {(exported / name).stat().st_mode & 0o444 for name in files_below(exported)} == {0o444}


def test_tensors_have_the_names_of_torchvision(exported):
    tensors = load_file(exported / "model.safetensors")
    blocks = ["layer1.0", "layer2.0", "layer2.1"]
    convs = ["conv1", *(f"{block}.conv{n}" for block in blocks for n in (1, 2, 3))]
    convs += [f"{block}.downsample.0" for block in blocks[:2]]
    norms = [name.replace("conv", "bn").replace("downsample.0", "downsample.1") for name in convs]
    head = [f"fc.{n}.{part}" for n in (0, 2, 4) for part in ("weight", "bias")]
    expected = [f"{name}.weight" for name in convs] + [f"{name}.{part}" for name in norms for part in NORM] + head
    assert sorted(tensors) == sorted([*expected, "mean", "std"])
    assert tensors["layer2.0.conv2.weight"].shape == (12, 12, 3, 3) and tensors["fc.4.weight"].shape == (3, 8)


def test_biases_are_in_the_means_and_bgr_in_the_first_kernel(keras_like, exported):
    tensors, variables = load_file(exported / "model.safetensors"), keras_like.backbone.variables
    params, stats = variables["params"], variables["batch_stats"]
    kernel = params["stem_conv"]["kernel"][:, :, ::-1].transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(tensors["conv1.weight"], kernel)
    np.testing.assert_array_equal(tensors["mean"].ravel(), np.float32(CAFFE.mean[::-1]))
    ours, theirs = "stage2_block1", "layer2.0"
    for conv, norm in (("conv1", "bn1"), ("conv3", "bn3"), ("conv_proj", "bn_proj")):
        name = {"bn_proj": "downsample.1"}.get(norm, norm)
        expected = stats[ours][norm]["mean"] - params[ours][conv]["bias"]
        np.testing.assert_allclose(tensors[f"{theirs}.{name}.running_mean"], expected, rtol=1e-6, atol=1e-7)


def test_config_has_the_facts_of_the_run_and_what_the_module_needs(keras_like, exported):
    config, about = json.loads((exported / "config.json").read_text()), json.loads(json.dumps(about_of(keras_like)))
    own = {"input", "preprocessing", "network"}
    assert {name: config[name] for name in about if name not in own} == {
        name: value for name, value in about.items() if name not in own
    }
    assert config["side"] == 32 and config["image_size"] == 64 and config["head"] == [48, 16, 8, 3]
    assert config["class_names"] == list(CLASSES) and "[N, 3, 32, 32], RGB" in config["input"]
    assert config["preprocessing"]["channels"] == "rgb"
    assert config["preprocessing"]["mean"] == list(CAFFE.mean[::-1])
    assert config["network"] == json.loads(json.dumps(asdict(replace(KERAS_LIKE, conv_bias=False))))


def test_module_is_python_that_imports_nothing_of_this_project(exported):
    code = (exported / "model.py").read_text()
    compile(code, "model.py", "exec")
    assert "import cifar_jax" not in code and "from cifar_jax" not in code


def test_exported_directory_is_replaced_only_if_asked(exported, keras_like):
    before = (exported / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        export_run(keras_like, "pytorch", exported)
    about = export_run(keras_like, "pytorch", exported, overwrite=True)
    assert (exported / "model.safetensors").read_bytes() == before
    assert "[N, 3, 32, 32]" in about["input"] and "tensors under torchvision's names" in about["weights"]


@pytest.mark.parametrize("form", ["keras", "pytorch"])
def test_functions_are_refused_and_nothing_is_left(form, tmp_path):
    run, out = drawn_run(TORCH_LIKE, side=32), tmp_path / ("model.keras" if form == "keras" else "model")
    of_head = Head(dense_head().init, lambda params, x, **_: x, "mine")
    backbone = replace(run, backbone=FIELDS, resize=Resize("upsample", 32))
    for changed, what in ((replace(run, head=of_head), "head 'mine'"), (backbone, "backbone 'fields'")):
        with pytest.raises(UserError, match=f"The {what} is a function, which --format {form} cannot express"):
            export_run(changed, form, out)
    assert files_below(tmp_path) == []
