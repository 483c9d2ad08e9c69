"""Files of torchvision, timm and transformers: tensor mapping, variants, and refusals."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from helpers import NARROW_TORCH, command, files_below, is_one_error, narrow_networks, torch_tensors
from torch_files import write_torch

from cifar_jax.models.preprocess import TORCH
from cifar_jax.pretrained import WeightsError, load_backbone, registry

FAMILIES = ["torchvision", "huggingface"]
BLOCK = {"torchvision": "layer2.0.", "huggingface": "encoder.stages.1.layers.0."}
CONV2 = {"torchvision": "layer2.0.conv2.weight", "huggingface": "encoder.stages.1.layers.0.layer.1.convolution.weight"}
SHORTCUT = {
    "torchvision": "layer2.0.downsample.0.weight",
    "huggingface": f"{BLOCK['huggingface']}shortcut.convolution.weight",
}
LAST = {"torchvision": "layer2.0.conv3.weight", "huggingface": f"{BLOCK['huggingface']}layer.2.convolution.weight"}
VARIANCE = {"torchvision": "bn1.running_var", "huggingface": "embedder.embedder.normalization.running_var"}
TIMM = {
    "architecture": "resnet50",
    "pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "input_size": [3, 160, 160]},
}
HF = {
    "model_type": "resnet",
    "depths": [1, 1],
    "hidden_sizes": [16, 32],
    "embedding_size": 4,
    "layer_type": "bottleneck",
}
PIXELS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": {"shortest_edge": 160}}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    narrow_networks(monkeypatch)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def write(path, tensors):
    """Writes tensors in the format of the file's suffix."""
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(dict(tensors), path)
        return path
    return write_torch(path, tensors, legacy=path.suffix == ".pt")


def refusal(path, variant=None):
    with pytest.raises(WeightsError) as caught:
        load_backbone(path, variant)
    message = str(caught.value)
    assert "\n" not in message and str(path.parent) in message, message
    return message


def assert_filled(backbone, tensors, family):
    """Checks some tensors of each kind by hand-written names, independently of the library's name maps."""
    params, statistics = backbone.variables["params"], backbone.variables["batch_stats"]
    block, moments = params["stage2_block1"], statistics["stage2_block1"]
    np.testing.assert_array_equal(block["conv2"]["kernel"], tensors[CONV2[family]].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(block["conv_proj"]["kernel"], tensors[SHORTCUT[family]][:, :, 0, 0].T)
    np.testing.assert_array_equal(block["conv3"]["kernel"], tensors[LAST[family]][:, :, 0, 0].T)
    norm = {"torchvision": "layer2.0.bn3.", "huggingface": f"{BLOCK[family]}layer.2.normalization."}[family]
    shortcut = {"torchvision": "layer2.0.downsample.1.", "huggingface": f"{BLOCK[family]}shortcut.normalization."}[
        family
    ]
    for module, prefix in (("bn3", norm), ("bn_proj", shortcut)):
        np.testing.assert_array_equal(block[module]["scale"], tensors[f"{prefix}weight"])
        np.testing.assert_array_equal(block[module]["bias"], tensors[f"{prefix}bias"])
        np.testing.assert_array_equal(moments[module]["mean"], tensors[f"{prefix}running_mean"])
        np.testing.assert_array_equal(moments[module]["var"], tensors[f"{prefix}running_var"])
    np.testing.assert_array_equal(statistics["stem_bn"]["var"], tensors[VARIANCE[family]])
    top = {"torchvision": "fc", "huggingface": "classifier.1"}[family]
    np.testing.assert_array_equal(backbone.top["kernel"], tensors[f"{top}.weight"].T)
    np.testing.assert_array_equal(backbone.top["bias"], tensors[f"{top}.bias"])
    assert all(leaf.dtype == np.float32 for leaf in flatten_dict(backbone.variables).values())


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.bin", "x.safetensors", "no-suffix"])
def test_all_file_formats_load(tmp_path, family, name, said):
    tensors = torch_tensors(NARROW_TORCH, family)
    path = write(tmp_path / name, tensors)
    backbone = load_backbone(path)
    assert_filled(backbone, tensors, family)
    assert backbone.config == NARROW_TORCH and backbone.preprocessing == TORCH and backbone.image_size == 224
    assert backbone.variant == f"{family} (by its tensor names)"
    assert len(said) == 1 and f"{path} does not specify its variant" in said[0] and "assuming" in said[0]
    assert load_backbone(path, family).variant == f"{family} (by --variant)" and len(said) == 1


def test_nested_and_prefixed_state_dicts_load(tmp_path, family, said):
    tensors = torch_tensors(NARROW_TORCH, family)
    wrapped = {f"module._orig_mod.{name}": value for name, value in tensors.items()}
    assert_filled(load_backbone(write(tmp_path / "x.safetensors", wrapped)), tensors, family)
    path = write_torch(
        tmp_path / "x.pth", wrapped, wrap=lambda state: {"epoch": 1, "state_dict": state, "model_ema": state}
    )
    said.clear()
    assert_filled(load_backbone(path), tensors, family)
    assert "loading state_dict, ignoring model_ema" in said[0]


def test_transformers_prefix_is_optional(tmp_path):
    tensors = torch_tensors(NARROW_TORCH, "huggingface")
    prefixed = {name if name.startswith("classifier") else f"resnet.{name}": value for name, value in tensors.items()}
    assert_filled(load_backbone(write(tmp_path / "x.safetensors", prefixed)), tensors, "huggingface")
    bare = {name: value for name, value in tensors.items() if not name.startswith("classifier")}
    assert load_backbone(write(tmp_path / "y.safetensors", bare)).top is None


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_other_dtypes_load(tmp_path, dtype, name):
    tensors = {
        name: value if "num_batches" in name else value.astype(dtype)
        for name, value in torch_tensors(NARROW_TORCH).items()
    }
    assert_filled(load_backbone(write(tmp_path / name, tensors)), tensors, "torchvision")


# ---------------------------------------------------------------------------------------------------------------------
# Variants and configs


def described(path, config, pixels=None):
    (path.parent / "config.json").write_text(json.dumps(config))
    if pixels is not None:
        (path.parent / "preprocessor_config.json").write_text(json.dumps(pixels))
    return path


def test_timm_config_sets_preprocessing_and_size(tmp_path, said):
    path = described(write(tmp_path / "model.safetensors", torch_tensors(NARROW_TORCH)), TIMM)
    for given in (path, tmp_path, str(tmp_path)):
        backbone = load_backbone(given)
        assert backbone.preprocessing == replace(TORCH, name="described", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
        assert (backbone.image_size, backbone.source) == (160, str(path)) and backbone.config == NARROW_TORCH
        assert backbone.variant == "torchvision as described (by its description)"
    # timm records its default arguments as well.
    described(path, TIMM | {"model_args": {"num_classes": 5, "global_pool": "avg", "in_chans": 3}})
    assert load_backbone(path).image_size == 160
    described(path, {"architecture": "tv_resnet50", "mean": list(TORCH.mean), "std": list(TORCH.std)})
    assert load_backbone(path).variant == "torchvision (by its description)" and not said


@pytest.mark.parametrize("in_1x1", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_transformers_config_sets_stride(tmp_path, in_1x1, name, said):
    path = write(tmp_path / name, torch_tensors(NARROW_TORCH, "huggingface"))
    described(path, HF | {"downsample_in_bottleneck": in_1x1}, PIXELS | {"do_rescale": True, "rescale_factor": 1 / 255})
    backbone = load_backbone(tmp_path)
    assert backbone.config == replace(NARROW_TORCH, stride_in_1x1=in_1x1) and not said
    assert backbone.preprocessing == replace(TORCH, name="described", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    assert backbone.image_size == 160
    (tmp_path / "preprocessor_config.json").unlink()
    assert load_backbone(tmp_path).preprocessing == TORCH
    assert len(said) == 1 and "no preprocessor_config.json is next to it" in said[0]


def test_preprocessor_without_normalization(tmp_path):
    path = write(tmp_path / "model.safetensors", torch_tensors(NARROW_TORCH, "huggingface"))
    described(path, HF, {"do_rescale": False, "do_normalize": False, "size": 224})
    pixels = load_backbone(path).preprocessing
    assert (pixels.scale, pixels.mean, pixels.std) == (1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("config", [{"preset": "demo"}, TIMM, {"model_type": "vit", "depths": [9]}])
def test_unrelated_config_is_ignored(tmp_path, config):
    path = described(write(tmp_path / "x.pth", torch_tensors(NARROW_TORCH, "huggingface")), config)
    assert load_backbone(path).variant == "huggingface (by its tensor names)"


@pytest.mark.parametrize(
    ("family", "config", "pixels", "part"),
    [
        (
            "torchvision",
            TIMM | {"architecture": "resnetblur50"},
            None,
            "describes 'resnetblur50', which is not a plain",
        ),
        ("torchvision", TIMM | {"model_args": {"output_stride": 8}}, None, "non-default output_stride"),
        ("torchvision", TIMM | {"pretrained_cfg": {"mean": [0.5]}}, None, "has an unexpected structure"),
        ("torchvision", TIMM | {"pretrained_cfg": {"std": [0, 0, 0]}}, None, "has an unexpected structure"),
        (
            "torchvision",
            TIMM | {"pretrained_cfg": {"input_size": [3, 224, 192]}},
            None,
            "has an unexpected structure",
        ),
        ("torchvision", TIMM | {"pretrained_cfg": 3}, None, "has an unexpected structure"),
        ("huggingface", HF | {"layer_type": "basic"}, None, "with basic blocks"),
        ("huggingface", HF | {"hidden_act": "gelu"}, None, "non-default hidden_act"),
        ("huggingface", HF | {"downsample_in_first_stage": True}, None, "non-default downsample_in_first_stage"),
        ("huggingface", HF | {"downsample_in_bottleneck": "no"}, None, "has an unexpected structure"),
        ("huggingface", HF | {"depths": [1, 2]}, None, "next to it describes one with (1, 2)"),
        ("huggingface", HF | {"depths": 3}, None, "has an unexpected structure"),
        ("huggingface", HF, {}, "has an unexpected structure"),
        ("huggingface", HF, PIXELS | {"rescale_factor": 0}, "has an unexpected structure"),
        ("huggingface", HF, PIXELS | {"size": {"height": 3, "width": 4}}, "has an unexpected structure"),
        ("huggingface", HF, [], "not a JSON object"),
    ],
)
def test_unsupported_configs_are_refused(tmp_path, family, config, pixels, part):
    path = described(write(tmp_path / "x.safetensors", torch_tensors(NARROW_TORCH, family)), config, pixels)
    assert part in refusal(path)


def test_variant_contradicting_the_config_is_refused(tmp_path):
    path = write(tmp_path / "x.safetensors", torch_tensors(NARROW_TORCH, "huggingface"))
    described(path, HF | {"downsample_in_bottleneck": True}, PIXELS)
    assert "--variant huggingface contradicts the config" in refusal(path, "huggingface")
    assert "--variant keras does not fit" in refusal(path, "keras")


def test_known_hash_takes_precedence(tmp_path, monkeypatch, said):
    path = described(write(tmp_path / "x.pth", torch_tensors(NARROW_TORCH)), TIMM)
    digest, size = f"sha256:{load_backbone(path).sha256[:8]}", path.stat().st_size
    entry = registry.Entry(
        "v1", "x.pth", "https://x/x.pth", digest, size, "torchvision", "BSD-3-Clause", "", "", "A test."
    )
    monkeypatch.setattr(registry, "entries", lambda: {"v1": entry})
    backbone = load_backbone(path)
    assert (backbone.variant, backbone.preprocessing) == ("torchvision (by its hash)", TORCH) and not said


# ---------------------------------------------------------------------------------------------------------------------
# Mismatches


def without(tensors, *names):
    return {name: value for name, value in tensors.items() if name not in names}


def transposed(tensors, name):
    return tensors | {name: tensors[name].transpose(1, 0, 2, 3).copy()}


def test_mismatch_lists_missing_and_unexpected_tensors(tmp_path, family):
    tensors, name, path = torch_tensors(NARROW_TORCH, family), CONV2[family], tmp_path / "x.pth"
    assert f"missing tensors: {name}; unexpected tensors: none" in refusal(write(path, without(tensors, name)))
    extra = tensors | {"extra.weight": tensors[name]}
    assert "missing tensors: none; unexpected tensors: extra.weight" in refusal(write(path, extra))
    wide = tensors | {name: np.zeros((8, 9, 3, 3), np.float32)}
    assert f"{name} has shape (8, 9, 3, 3), expected (8, 8, 3, 3)" in refusal(write(path, wide))
    shortcut = SHORTCUT[family]
    assert f"{shortcut} has shape (16, 32, 1, 1), expected (32, 16, 1, 1)" in refusal(
        write(path, transposed(tensors, shortcut))
    )


def test_invalid_values_are_refused(tmp_path, family):
    tensors, path, name = torch_tensors(NARROW_TORCH, family), tmp_path / "x.safetensors", VARIANCE[family]
    assert "negative variances" in refusal(write(path, tensors | {name: np.full(4, -1, np.float32)}))
    assert "non-finite" in refusal(write(path, tensors | {name: np.full(4, np.nan, np.float32)}))
    assert "non-finite" in refusal(write(path, tensors | {name: np.full(4, 1e300)}))
    assert "integers instead of floats" in refusal(write(path, tensors | {name: np.ones(4, np.int64)}))


def test_basic_blocks_are_refused(tmp_path, family):
    tensors, path = torch_tensors(NARROW_TORCH, family), tmp_path / "x.pth"
    last = ("conv3", "bn3", "layer.2")
    basic = {name: value for name, value in tensors.items() if not any(part in name for part in last)}
    assert "is a ResNet with basic blocks, such as ResNet18 or ResNet34" in refusal(write(path, basic))


def test_unpublished_depth_is_refused(tmp_path):
    tensors = torch_tensors(replace(NARROW_TORCH, stage_sizes=(1, 2)))
    assert "holds a ResNet with (1, 2) blocks; supported are (3, 4, 6, 3) (ResNet50)" in refusal(
        write(tmp_path / "x.pth", tensors)
    )


def test_timm_deep_stem_is_refused(tmp_path):
    tensors = torch_tensors(NARROW_TORCH)
    deep = without(tensors, "conv1.weight") | {
        f"conv1.{n}.weight": np.zeros((4, 4, 3, 3), np.float32) for n in (0, 3, 6)
    }
    path = described(write(tmp_path / "x.safetensors", deep), TIMM | {"architecture": "resnet50d"})
    message = refusal(path)
    assert (
        "missing tensors: conv1.weight; unexpected tensors: conv1.0.weight, conv1.3.weight, conv1.6.weight" in message
    )


def test_mismatched_classifier_is_refused(tmp_path, family):
    tensors, path = torch_tensors(NARROW_TORCH, family), tmp_path / "x.pth"
    weight, bias = {
        "torchvision": ("fc.weight", "fc.bias"),
        "huggingface": ("classifier.1.weight", "classifier.1.bias"),
    }[family]
    for bad in (without(tensors, bias), without(tensors, weight), tensors | {bias: np.zeros(4, np.float32)}):
        assert "holds a classifier that does not fit" in refusal(write(path, bad))


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_other_networks_are_refused(tmp_path, name):
    message = refusal(write(tmp_path / name, {"features.0.weight": np.zeros((4, 3, 3, 3), np.float32)}))
    assert ("features.0.weight" if name == "x.pth" else "names are not those of a known ResNet") in message


def test_directory_without_weights_is_refused(tmp_path, capsys):
    result = command(capsys, "train", "--preset", "demo", "--weights", tmp_path, "--out", tmp_path / "out")
    is_one_error(result, 2, "is a directory without model.safetensors or pytorch_model.bin")
    assert files_below(tmp_path) == []


def test_run_records_the_config_next_to_its_weights(tmp_path, capsys):
    """Without the config, the hash of the weights is the same but the features are not."""
    weights = tmp_path / "timm"
    weights.mkdir()
    described(write(weights / "model.safetensors", torch_tensors(NARROW_TORCH)), TIMM)
    sizes = ["--image-size", 32, "--hidden", 8, "--train-examples", 64, "--test-examples", 20, "--epochs", 1]
    trained = command(capsys, "train", "--preset", "demo", "--weights", weights, *sizes, "--out", tmp_path / "run")
    assert trained.code == 0, trained
    assert command(capsys, "evaluate", tmp_path / "run").code == 0
    (weights / "config.json").rename(weights / "elsewhere.json")
    is_one_error(
        command(capsys, "evaluate", tmp_path / "run"), 2, "with a different preprocessing", "restore the config.json"
    )
