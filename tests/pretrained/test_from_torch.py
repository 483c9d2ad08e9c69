"""Files of torchvision, timm and transformers: tensor mapping, variants, and refusals."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from helpers import NARROW_TORCH, command, torch_tensors, without_pictures
from torch_files import write_torch

from cifar_jax import UserError, load_run
from cifar_jax.models.preprocess import TORCH, EvalTransform
from cifar_jax.pretrained import load_backbone, registry

pytestmark = pytest.mark.usefixtures("narrow_resnet")

# Hand-written names, independent of the library's name maps: of a block's tensors, the stem's variance and the top.
CONV2 = {"torchvision": "layer2.0.conv2.weight", "huggingface": "encoder.stages.1.layers.0.layer.1.convolution.weight"}
SHORTCUT = {
    "torchvision": ("layer2.0.downsample.0.weight", "layer2.0.downsample.1"),
    "huggingface": (
        "encoder.stages.1.layers.0.shortcut.convolution.weight",
        "encoder.stages.1.layers.0.shortcut.normalization",
    ),
}
LAST = {
    "torchvision": ("layer2.0.conv3.weight", "layer2.0.bn3"),
    "huggingface": (
        "encoder.stages.1.layers.0.layer.2.convolution.weight",
        "encoder.stages.1.layers.0.layer.2.normalization",
    ),
}
VARIANCE = {"torchvision": "bn1.running_var", "huggingface": "embedder.embedder.normalization.running_var"}
TOP = {"torchvision": "fc", "huggingface": "classifier.1"}

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
DESCRIBED = replace(TORCH, name="described", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.fixture(params=["torchvision", "huggingface"])
def family(request):
    return request.param


def write(path, tensors):
    """Writes tensors in the format of the file's suffix."""
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(dict(tensors), path)
        return path
    return write_torch(path, tensors, legacy=path.suffix == ".pt")


def assert_filled(backbone, tensors, family):
    """Checks some tensors of each kind."""
    params, statistics = backbone.variables["params"], backbone.variables["batch_stats"]
    block, moments = params["stage2_block1"], statistics["stage2_block1"]
    np.testing.assert_array_equal(block["conv2"]["kernel"], tensors[CONV2[family]].transpose(2, 3, 1, 0))
    for conv, norm, (kernel, prefix) in (("conv3", "bn3", LAST[family]), ("conv_proj", "bn_proj", SHORTCUT[family])):
        np.testing.assert_array_equal(block[conv]["kernel"], tensors[kernel][:, :, 0, 0].T)
        np.testing.assert_array_equal(block[norm]["scale"], tensors[f"{prefix}.weight"])
        np.testing.assert_array_equal(block[norm]["bias"], tensors[f"{prefix}.bias"])
        np.testing.assert_array_equal(moments[norm]["mean"], tensors[f"{prefix}.running_mean"])
        np.testing.assert_array_equal(moments[norm]["var"], tensors[f"{prefix}.running_var"])
    np.testing.assert_array_equal(statistics["stem_bn"]["var"], tensors[VARIANCE[family]])
    np.testing.assert_array_equal(backbone.top["kernel"], tensors[f"{TOP[family]}.weight"].T)
    np.testing.assert_array_equal(backbone.top["bias"], tensors[f"{TOP[family]}.bias"])
    assert all(leaf.dtype == np.float32 for leaf in flatten_dict(backbone.variables).values())


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.safetensors", "no-suffix"])
def test_all_file_formats_load(tmp_path, family, name, log):
    tensors = torch_tensors(NARROW_TORCH, family)
    path = write(tmp_path / name, tensors)
    backbone = load_backbone(path)
    assert_filled(backbone, tensors, family)
    assert backbone.config == NARROW_TORCH and backbone.preprocessing == TORCH and backbone.image_size == 224
    assert backbone.variant == f"{family} (by its tensor names)"
    (message,) = log.messages
    assert f"{path} does not specify its variant" in message and "assuming" in message
    assert load_backbone(path, family).variant == f"{family} (by --variant)" and len(log.messages) == 1


def test_nested_and_prefixed_state_dicts_load(tmp_path, family, log):
    tensors = torch_tensors(NARROW_TORCH, family)
    wrapped = {f"module._orig_mod.{name}": value for name, value in tensors.items()}
    assert_filled(load_backbone(write(tmp_path / "x.safetensors", wrapped)), tensors, family)
    log.clear()
    nested = write_torch(tmp_path / "x.pth", wrapped, wrap=lambda state: {"state_dict": state, "model_ema": state})
    assert_filled(load_backbone(nested), tensors, family)
    assert "loading state_dict, ignoring model_ema" in log.messages[0]


def test_transformers_prefix_is_optional(tmp_path):
    tensors = torch_tensors(NARROW_TORCH, "huggingface")
    prefixed = {name if name.startswith("classifier") else f"resnet.{name}": value for name, value in tensors.items()}
    assert_filled(load_backbone(write(tmp_path / "x.safetensors", prefixed)), tensors, "huggingface")


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


def test_timm_config_sets_preprocessing_and_size(tmp_path, log):
    path = described(write(tmp_path / "model.safetensors", torch_tensors(NARROW_TORCH)), TIMM)
    for given in (path, tmp_path):
        backbone = load_backbone(given)
        assert backbone.preprocessing == DESCRIBED and backbone.config == NARROW_TORCH
        assert (backbone.image_size, backbone.source) == (160, str(path))
        assert backbone.variant == "torchvision as described (by its description)"
    # timm records its default arguments as well.
    described(path, TIMM | {"model_args": {"num_classes": 5, "global_pool": "avg", "in_chans": 3}})
    assert load_backbone(path).image_size == 160
    described(path, {"architecture": "tv_resnet50", "mean": list(TORCH.mean), "std": list(TORCH.std)})
    assert load_backbone(path).variant == "torchvision (by its description)" and not log.messages


@pytest.mark.parametrize("in_1x1", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_transformers_config_sets_stride(tmp_path, in_1x1, name, log):
    path = write(tmp_path / name, torch_tensors(NARROW_TORCH, "huggingface"))
    described(path, HF | {"downsample_in_bottleneck": in_1x1}, PIXELS | {"do_rescale": True, "rescale_factor": 1 / 255})
    backbone = load_backbone(tmp_path)
    assert backbone.config == replace(NARROW_TORCH, stride_in_1x1=in_1x1) and not log.messages
    assert (backbone.preprocessing, backbone.image_size) == (DESCRIBED, 160)
    (tmp_path / "preprocessor_config.json").unlink()
    assert load_backbone(tmp_path).preprocessing == TORCH
    (message,) = log.messages
    assert "no preprocessor_config.json is next to it" in message


def test_preprocessor_without_normalization(tmp_path):
    path = write(tmp_path / "model.safetensors", torch_tensors(NARROW_TORCH, "huggingface"))
    described(path, HF, {"do_rescale": False, "do_normalize": False, "size": 224})
    pixels = load_backbone(path).preprocessing
    assert (pixels.scale, pixels.mean, pixels.std) == (1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def timm_config(**changes):
    return TIMM | {"pretrained_cfg": TIMM["pretrained_cfg"] | changes}


@pytest.mark.parametrize(
    ("changes", "transform"),
    [
        ({}, EvalTransform(182, 160, "bicubic")),  # timm's defaults, 0.875 and bicubic
        ({"crop_pct": None, "interpolation": None}, EvalTransform(182, 160, "bicubic")),
        (
            {"crop_pct": 0.95, "interpolation": "bicubic", "input_size": [3, 224, 224]},
            EvalTransform(235, 224, "bicubic"),
        ),
        ({"crop_pct": 0.875, "interpolation": "bilinear", "input_size": [3, 224, 224]}, EvalTransform()),
        ({"crop_pct": 1.0, "interpolation": "lanczos", "crop_mode": "center"}, EvalTransform(160, 160, "lanczos")),
        # Recommendations for another size than the training's, and a flag of networks that take no other.
        (
            {"crop_pct": 0.9, "test_input_size": [3, 288, 288], "test_crop_pct": 1.0, "fixed_input_size": True},
            EvalTransform(177, 160, "bicubic"),
        ),
    ],
)
def test_timm_config_sets_the_evaluation_transform(tmp_path, changes, transform, log):
    described(write(tmp_path / "model.safetensors", torch_tensors(NARROW_TORCH)), timm_config(**changes))
    backbone = load_backbone(tmp_path)
    assert backbone.transform == transform and backbone.image_size == transform.side and not log.messages


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_other_crop_mode_is_read_as_a_centre_crop_and_logged(tmp_path, mode, log):
    path = write(tmp_path / "model.safetensors", torch_tensors(NARROW_TORCH))
    described(path, timm_config(crop_mode=mode, crop_pct=0.8))
    assert load_backbone(path).transform == EvalTransform(200, 160, "bicubic")
    (message,) = log.messages
    assert f"config.json has crop_mode {mode}; here they keep their proportions: shorter side to 200" in message


CROP = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
SQUASHES = "squashes photos to a square; here they keep their proportions"


@pytest.mark.parametrize(
    ("pixels", "transform", "note"),
    [
        # microsoft/resnet-50, as first published and as transformers writes it today.
        (
            {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 0.875, "resample": 3},
            EvalTransform(256, 224, "bicubic"),
            "",
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "resample": 2},
            EvalTransform(256, 224, "bilinear"),
            "",
        ),
        ({"size": {"shortest_edge": 160}, "crop_pct": 0.95}, EvalTransform(168, 160, "bicubic"), ""),
        ({"size": {"shortest_edge": 383}}, EvalTransform(437, 383, "bicubic"), ""),
        ({"size": {"shortest_edge": 384}, "resample": 1}, EvalTransform(384, 384, "lanczos"), SQUASHES),
        ({"size": {"shortest_edge": 224}} | CROP, EvalTransform(256, 224, "bicubic"), ""),
        (
            {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "resample": 3} | CROP,
            EvalTransform(256, 224, "bicubic"),
            "",
        ),
        (
            {"image_processor_type": "BitImageProcessor", "size": 256} | CROP | {"do_center_crop": False},
            EvalTransform(256, 256, "bilinear"),
            SQUASHES,
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}, "resample": 0},
            EvalTransform(224, 224, "nearest"),
            SQUASHES,
        ),
        ({"do_resize": False, "size": {"shortest_edge": 160}}, EvalTransform(), ""),
    ],
)
def test_processor_config_sets_the_evaluation_transform(tmp_path, pixels, transform, note, log):
    path = write(tmp_path / "model.safetensors", torch_tensors(NARROW_TORCH, "huggingface"))
    normal = {"image_mean": list(TORCH.mean), "image_std": list(TORCH.std)}
    described(path, HF, normal | pixels)
    assert load_backbone(path).transform == transform
    assert len(log.messages) == bool(note) and all(note in message for message in log.messages)


@pytest.mark.parametrize("config", [{"preset": "demo"}, TIMM, {"model_type": "vit", "depths": [9]}])
def test_unrelated_config_is_ignored(tmp_path, config):
    path = described(write(tmp_path / "x.pth", torch_tensors(NARROW_TORCH, "huggingface")), config)
    assert load_backbone(path).variant == "huggingface (by its tensor names)"


STRUCTURE = "has an unexpected structure"


@pytest.mark.parametrize(
    ("family", "config", "pixels", "part"),
    [
        ("torchvision", TIMM | {"architecture": "resnetblur50"}, None, "'resnetblur50', which is not a plain"),
        ("torchvision", TIMM | {"model_args": {"output_stride": 8}}, None, "non-default output_stride"),
        ("torchvision", TIMM | {"pretrained_cfg": {"mean": [0.5]}}, None, STRUCTURE),
        ("torchvision", TIMM | {"pretrained_cfg": {"std": [0, 0, 0]}}, None, STRUCTURE),
        ("torchvision", TIMM | {"pretrained_cfg": {"input_size": [3, 224, 192]}}, None, STRUCTURE),
        ("torchvision", TIMM | {"pretrained_cfg": 3}, None, STRUCTURE),
        ("torchvision", TIMM | {"pretrained_cfg": {"crop_pct": 1.1}}, None, STRUCTURE),
        ("torchvision", TIMM | {"pretrained_cfg": {"crop_pct": "all"}}, None, STRUCTURE),
        ("torchvision", TIMM | {"pretrained_cfg": {"interpolation": "random"}}, None, STRUCTURE),
        ("huggingface", HF | {"layer_type": "basic"}, None, "with basic blocks"),
        ("huggingface", HF | {"hidden_act": "gelu"}, None, "non-default hidden_act"),
        ("huggingface", HF | {"downsample_in_bottleneck": "no"}, None, STRUCTURE),
        ("huggingface", HF | {"depths": [1, 2]}, None, "next to it describes one with (1, 2)"),
        ("huggingface", HF | {"depths": 3}, None, STRUCTURE),
        ("huggingface", HF, {}, STRUCTURE),
        ("huggingface", HF, PIXELS | {"rescale_factor": 0}, STRUCTURE),
        ("huggingface", HF, PIXELS | {"size": {"height": 3, "width": 4}}, STRUCTURE),
        ("huggingface", HF, PIXELS | {"resample": 6}, STRUCTURE),
        ("huggingface", HF, PIXELS | {"resample": "bicubic"}, STRUCTURE),
        ("huggingface", HF, PIXELS | {"crop_pct": 2}, STRUCTURE),
        ("huggingface", HF, [], "not a JSON object"),
    ],
)
def test_unsupported_configs_are_refused(tmp_path, refusal, family, config, pixels, part):
    path = described(write(tmp_path / "x.safetensors", torch_tensors(NARROW_TORCH, family)), config, pixels)
    assert part in refusal(path)


def test_variant_contradicting_the_config_is_refused(tmp_path, refusal):
    path = write(tmp_path / "x.safetensors", torch_tensors(NARROW_TORCH, "huggingface"))
    described(path, HF | {"downsample_in_bottleneck": True}, PIXELS)
    assert "--variant huggingface contradicts the config" in refusal(path, "huggingface")


def test_known_hash_takes_precedence(tmp_path, log):
    path = described(write(tmp_path / "x.pth", torch_tensors(NARROW_TORCH)), TIMM)
    digest, size = f"sha256:{load_backbone(path).sha256[:8]}", path.stat().st_size
    entry = registry.Entry("v1", "x.pth", None, digest, size, "torchvision", "BSD-3-Clause", None, "", "A test.")
    backbone = load_backbone(path, known={"v1": entry})
    assert (backbone.variant, backbone.preprocessing) == ("torchvision (by its hash)", TORCH) and not log.messages


# ---------------------------------------------------------------------------------------------------------------------
# Mismatches; test_bad_weights.py has those that do not depend on the family


def without(tensors, *names):
    return {name: value for name, value in tensors.items() if name not in names}


def test_mismatches_are_shown_in_the_names_and_axis_order_of_the_file(tmp_path, refusal, family):
    tensors, name, path = torch_tensors(NARROW_TORCH, family), CONV2[family], tmp_path / "x.pth"
    assert f"missing tensors: {name}; unexpected tensors: none" in refusal(write(path, without(tensors, name)))
    wide = tensors | {name: np.zeros((8, 9, 3, 3), np.float32)}
    assert f"{name} has shape (8, 9, 3, 3), expected (8, 8, 3, 3)" in refusal(write(path, wide))
    shortcut, _ = SHORTCUT[family]
    transposed = tensors | {shortcut: tensors[shortcut].transpose(1, 0, 2, 3)}
    assert f"{shortcut} has shape (16, 32, 1, 1), expected (32, 16, 1, 1)" in refusal(write(path, transposed))


def test_values_that_are_not_finite_float32_are_refused(tmp_path, refusal):
    tensors, path, name = torch_tensors(NARROW_TORCH), tmp_path / "x.safetensors", VARIANCE["torchvision"]
    assert "non-finite" in refusal(write(path, tensors | {name: np.full(4, 1e300)}))
    assert "integers instead of floats" in refusal(write(path, tensors | {name: np.ones(4, np.int64)}))


def test_basic_blocks_are_refused(tmp_path, refusal, family):
    last = ("conv3", "bn3", "layer.2")
    tensors = torch_tensors(NARROW_TORCH, family)
    basic = {name: value for name, value in tensors.items() if not any(part in name for part in last)}
    message = refusal(write(tmp_path / "x.pth", basic))
    assert "is a ResNet with basic blocks, such as ResNet18 or ResNet34" in message


def test_unpublished_depth_is_refused(tmp_path, refusal):
    path = write(tmp_path / "x.pth", torch_tensors(replace(NARROW_TORCH, stage_sizes=(1, 2))))
    assert "holds a ResNet with (1, 2) blocks; supported are (3, 4, 6, 3) (ResNet50)" in refusal(path)


def test_timm_deep_stem_is_refused(tmp_path, refusal):
    """The mismatch is reported rather than the architecture's name, because it tells more."""
    deep = {f"conv1.{n}.weight": np.zeros((4, 4, 3, 3), np.float32) for n in (0, 3, 6)}
    tensors = without(torch_tensors(NARROW_TORCH), "conv1.weight") | deep
    path = described(write(tmp_path / "x.safetensors", tensors), TIMM | {"architecture": "resnet50d"})
    assert f"missing tensors: conv1.weight; unexpected tensors: {', '.join(deep)}" in refusal(path)


def test_mismatched_classifier_is_refused(tmp_path, refusal):
    tensors, path = torch_tensors(NARROW_TORCH), tmp_path / "x.pth"
    for bad in (without(tensors, "fc.bias"), without(tensors, "fc.weight"), tensors | {"fc.bias": np.float32([0] * 4)}):
        assert "holds a classifier that does not fit" in refusal(write(path, bad))


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_other_networks_are_refused(tmp_path, refusal, name):
    message = refusal(write(tmp_path / name, {"features.0.weight": np.zeros((4, 3, 3, 3), np.float32)}))
    assert ("features.0.weight" if name == "x.pth" else "names are not those of a known ResNet") in message


def test_run_records_the_config_next_to_its_weights(tmp_path, capsys, monkeypatch):
    """Without the config, the hash of the weights is the same but the features are not."""
    without_pictures(monkeypatch)
    weights = tmp_path / "timm"
    weights.mkdir()
    described(write(weights / "model.safetensors", torch_tensors(NARROW_TORCH)), TIMM)
    sizes = ["--image-size", 32, "--hidden", 8, "--train-examples", 64, "--test-examples", 20, "--epochs", 1]
    trained = command(capsys, "train", "--preset", "demo", "--weights", weights, *sizes, "--out", tmp_path / "run")
    assert trained.code == 0, trained
    assert load_run(tmp_path / "run").backbone.preprocessing == DESCRIBED
    (weights / "config.json").rename(weights / "elsewhere.json")
    with pytest.raises(UserError, match=r"with a different preprocessing; restore the config\.json"):
        load_run(tmp_path / "run")
