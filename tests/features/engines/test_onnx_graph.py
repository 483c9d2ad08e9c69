"""The ONNX graph of the folded network gives what the plain network gives, stage by stage, in ONNX Runtime."""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import relative_difference
from flax.traverse_util import unflatten_dict

from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.errors import UserError
from cifar_jax.features.engines.onnx_graph import OPSET, onnx_graph
from cifar_jax.models.backbone import Backbone
from cifar_jax.models.folded import block_strides, prepare
from cifar_jax.models.head import head_logits, init_head
from cifar_jax.models.preprocess import CAFFE, TORCH, preprocess
from cifar_jax.models.resnet import ResNet, ResNetConfig
from cifar_jax.pretrained import random_backbone
from cifar_jax.pretrained.merge import variable_shapes

KERAS = ResNetConfig(stage_sizes=(1, 2), width=8)
TORCH_LIKE = replace(KERAS, stride_in_1x1=False, conv_bias=False, bn_epsilon=1e-5)
CASES = {
    "keras": (KERAS, CAFFE, 64),
    "torch": (TORCH_LIKE, TORCH, 64),
    "not upsampled": (TORCH_LIKE, TORCH, 32),
    "odd maps, unpadded pool": (replace(KERAS, pool_padding=0, stage_sizes=(2, 1, 1)), CAFFE, 96),
    "one stage": (replace(KERAS, stage_sizes=(1,)), TORCH, 32),
}
IMAGES = draw_shapes(32, seed=0)[0]


def run(model, images, names=None):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = names or [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": images}), strict=True))


def plain_outputs(backbone, images):
    x = preprocess(jnp.asarray(images), backbone.preprocessing, backbone.image_size)
    return jax.jit(lambda variables, x: ResNet(backbone.config).apply(variables, x))(backbone.variables, x)


@pytest.mark.parametrize("name", CASES)
def test_every_stage_matches_the_plain_network(name):
    config, preprocessing, image_size = CASES[name]
    calibrated = random_backbone(jax.random.key(0), IMAGES, config, image_size)
    backbone = replace(calibrated, preprocessing=preprocessing)
    expected = plain_outputs(backbone, IMAGES[:4])
    found = run(onnx_graph(prepare(backbone), 32, stages=True), IMAGES[:4])
    assert relative_difference(found["features"], expected.pooled) < 1e-5
    last = {stage: stride for (stage, _), stride in block_strides(config).items()}
    for stage, plain in enumerate(expected.stages):
        # Where the next stage reads every second position of a stage, the folded one computes no others.
        step = last[stage] if config.stride_in_1x1 else 1
        read = np.asarray(plain)[:, ::step, ::step]
        assert relative_difference(found[f"stage{stage + 1}"].transpose(0, 2, 3, 1), read) < 1e-5
    assert np.abs(np.diff(found["features"], axis=0)).max() > 0.01 * np.abs(found["features"]).max()


@pytest.fixture(scope="module")
def backbone():
    return random_backbone(jax.random.key(1), IMAGES, TORCH_LIKE, 64)


@pytest.mark.parametrize("hidden", [(), (16, 8)])
def test_head_and_softmax_are_those_of_the_run(backbone, hidden):
    head = init_head(jax.random.key(2), backbone.num_features, hidden, 3)
    found = run(onnx_graph(prepare(backbone), 32, head), IMAGES)
    assert list(found) == ["probabilities", "features"]
    expected = jax.nn.softmax(head_logits(head, plain_outputs(backbone, IMAGES).pooled))
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-6)


def test_the_batch_is_symbolic_and_rows_do_not_depend_on_it(backbone):
    graph = onnx_graph(prepare(backbone), 32)
    whole = run(graph, IMAGES[:7])["features"]
    for size in (1, 3):
        np.testing.assert_allclose(run(graph, IMAGES[:size])["features"], whole[:size], rtol=1e-5, atol=1e-6)
    assert run(graph, IMAGES[:0])["features"].shape == (0, backbone.num_features)
    (image,) = graph.graph.input
    assert (image.name, image.type.tensor_type.elem_type) == ("image", onnx.TensorProto.UINT8)
    assert [axis.dim_param or axis.dim_value for axis in image.type.tensor_type.shape.dim] == ["N", 32, 32, 3]


def test_metadata_opset_and_names(backbone):
    graph = onnx_graph(prepare(backbone), 32, metadata={"note": "a\nb"})
    assert {one.key: one.value for one in graph.metadata_props} == {"note": "a\nb"}
    assert [(one.domain, one.version) for one in graph.opset_import] == [("", OPSET)]
    assert {"stem", "stage1_block1/conv1", "stage2_block2/conv3"} <= {node.name for node in graph.graph.node}
    onnx.checker.check_model(graph, full_check=True)


@pytest.mark.parametrize("config", [ResNetConfig(), ResNetConfig(stride_in_1x1=False, conv_bias=False)])
def test_a_resnet50_has_few_nodes_of_plain_operators(config):
    variables = unflatten_dict({path: np.ones(shape, np.float32) for path, shape in variable_shapes(config).items()})
    head = init_head(jax.random.key(0), config.features)
    graph = onnx_graph(prepare(Backbone(config, CAFFE, 224, variables)), 32, head).graph
    assert len(graph.node) <= 140
    assert {node.op_type for node in graph.node} == {
        *("Transpose", "Cast", "Sub", "Resize", "Conv", "Relu", "MaxPool", "Add", "GlobalAveragePool", "Flatten"),
        *("Gemm", "Softmax"),
    }
    assert [node.op_type for node in graph.node].count("Conv") == 53


def test_a_missing_package_is_named(backbone, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"needs the package onnx; install it with `pip install 'cifar-jax\[onnx\]'`"):
        onnx_graph(prepare(backbone), 32)
