"""The folded network as an ONNX graph, from uint8 pixels to pooled features and, with a head, to probabilities.

The graph has the layers of `models.folded` under their names, in ONNX's own operators and in NCHW, which every
runtime knows in its fastest form: 133 nodes for a ResNet50 with a dense head.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cifar_jax.errors import extra_missing
from cifar_jax.models.folded import Layer, Prepared, block_strides
from cifar_jax.models.preprocess import Preprocessing
from cifar_jax.models.resnet import block_name

if TYPE_CHECKING:
    import onnx

# Of January 2022: every runtime in use reads it, and no later version says anything of this graph better.
OPSET, IR_VERSION = 17, 8
IMAGE, FEATURES, PROBABILITIES = "image", "features", "probabilities"


def onnx_graph(
    prepared: Prepared,
    side: int,
    head: Sequence[Mapping[str, Any]] = (),
    metadata: Mapping[str, str] | None = None,
    stages: bool = False,
) -> "onnx.ModelProto":
    """Builds the ONNX model of a folded network.

    Its input is `image`, uint8 [N, side, side, 3], RGB, with N symbolic; its outputs are `probabilities` float32
    [N, classes], if there is a head, and `features` float32 [N, features].

    Args:
      prepared: the folded network, float32.
      side: side of the input in pixels, which divides the image size of the network.
      head: layers of a dense head, {"kernel": [in, out], "bias": [out]}, with relu between them.
      metadata: text to store in the file, by key.
      stages: whether the outputs of the stages, `stage1`, ..., are outputs of the model too, as NCHW. They have only
        the positions that the next stage reads; see `models.folded.block_strides`.

    Raises:
      UserError: if the package onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise extra_missing("An ONNX graph", "onnx", "onnx") from None
    graph, float32 = _Graph(onnx), onnx.TensorProto.FLOAT
    x = _preprocessed(graph, prepared.preprocessing, prepared.image_size // side)
    ends = _network(graph, prepared, x)
    x = graph.node("GlobalAveragePool", [ends[-1]], "pooling")
    features = graph.node("Flatten", [x], FEATURES)
    outputs = [onnx.helper.make_tensor_value_info(features, float32, ["N", prepared.config.features])]
    if head:
        probabilities = _head(graph, head, features)
        shape = ["N", np.shape(head[-1]["bias"])[0]]
        outputs.insert(0, onnx.helper.make_tensor_value_info(probabilities, float32, shape))
    for number, end in enumerate(ends if stages else ()):
        name, channels = f"stage{number + 1}", 4 * prepared.config.width * 2**number
        shape = ["N", channels, f"{name}_height", f"{name}_width"]
        outputs.append(onnx.helper.make_tensor_value_info(graph.node("Identity", [end], name), float32, shape))
    image = onnx.helper.make_tensor_value_info(IMAGE, onnx.TensorProto.UINT8, ["N", side, side, 3])
    model = onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, "cifar_jax", [image], outputs, graph.tensors),
        producer_name="cifar_jax",
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    onnx.helper.set_model_props(model, dict(metadata or {}))
    onnx.checker.check_model(model, full_check=True)
    return model


class _Graph:
    """Nodes and tensors of a graph in the making; the output of a node bears its name."""

    def __init__(self, onnx: Any) -> None:
        self._onnx = onnx
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []

    def node(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(self._onnx.helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def tensor(self, name: str, value: Any) -> str:
        array = np.ascontiguousarray(value, np.float32)
        self.tensors.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def conv(self, x: str, name: str, layer: Layer, stride: int) -> str:
        """A convolution padded by half its kernel on every side; 1x1 kernels may be [in, out]."""
        kernel = np.asarray(layer.kernel)
        kernel = kernel if kernel.ndim == 4 else kernel[None, None]
        size = kernel.shape[0]
        inputs = [
            x,
            self.tensor(f"{name}/kernel", kernel.transpose(3, 2, 0, 1)),
            self.tensor(f"{name}/bias", layer.bias),
        ]
        window = {"kernel_shape": [size, size], "strides": [stride] * 2, "pads": [size // 2] * 4}
        return self.node("Conv", inputs, name, **window)

    def max_pool(self, x: str, name: str, size: int, pad: int) -> str:
        window = {"kernel_shape": [size, size], "strides": [2, 2], "pads": [pad] * 4}
        return self.node("MaxPool", [x], name, **window)


def rgb_order(preprocessing: Preprocessing) -> slice:
    """Selects the channels of a network's input in the order red, green, blue."""
    return slice(None, None, -1 if preprocessing.channels == "bgr" else None)


def _preprocessed(graph: _Graph, preprocessing: Preprocessing, factor: int) -> str:
    """Normalises RGB pixels and repeats them; a network that takes BGR has its first kernel permuted instead."""
    x = graph.node("Transpose", [IMAGE], "preprocessing/nchw", perm=[0, 3, 1, 2])
    x = graph.node("Cast", [x], "preprocessing/float", to=1)  # 1: float32
    order = rgb_order(preprocessing)
    steps = (("Div", "scale", (preprocessing.scale,) * 3), ("Sub", "mean", preprocessing.mean))
    for operator, name, values in (*steps, ("Div", "std", preprocessing.std)):
        if set(values) != {0.0 if operator == "Sub" else 1.0}:
            constant = graph.tensor(f"preprocessing/{name}/value", np.float32(values[order]).reshape(1, 3, 1, 1))
            x = graph.node(operator, [x, constant], f"preprocessing/{name}")
    if factor == 1:
        return x
    scales = graph.tensor("upsampling/scales", [1, 1, factor, factor])
    nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return graph.node("Resize", [x, "", scales], "upsampling", **nearest)


def _network(graph: _Graph, prepared: Prepared, x: str) -> list[str]:
    """Adds stem and blocks. Returns the name of each stage's output."""
    config, layers = prepared.config, prepared.layers
    stem = layers["stem"]
    stem = stem._replace(kernel=stem.kernel[:, :, rgb_order(prepared.preprocessing)])
    x = graph.node("Relu", [graph.conv(x, "stem", stem, 2)], "stem/relu")
    x = graph.max_pool(x, "stem/pool", 3, config.pool_padding)
    ends: dict[int, str] = {}
    for (stage, block), stride in block_strides(config).items():
        x = ends[stage] = _block(graph, x, block_name(stage, block), layers[block_name(stage, block)], stride)
    return list(ends.values())


def _block(graph: _Graph, x: str, name: str, layers: Mapping[str, Layer], stride: int) -> str:
    y = graph.node("Relu", [graph.conv(x, f"{name}/conv1", layers["conv1"], 1)], f"{name}/relu1")
    y = graph.node("Relu", [graph.conv(y, f"{name}/conv2", layers["conv2"], stride)], f"{name}/relu2")
    y = graph.conv(y, f"{name}/conv3", layers["conv3"], 1)
    if "conv_proj" in layers:
        x = graph.conv(x, f"{name}/conv_proj", layers["conv_proj"], stride)
    elif stride > 1:
        x = graph.max_pool(x, f"{name}/subsample", 1, 0)  # of windows of one position: it takes every second one
    return graph.node("Relu", [graph.node("Add", [y, x], f"{name}/add")], f"{name}/relu3")


def _head(graph: _Graph, head: Sequence[Mapping[str, Any]], x: str) -> str:
    for number, layer in enumerate(head):
        if number:
            x = graph.node("Relu", [x], f"head{number - 1}/relu")
        inputs = [x, *(graph.tensor(f"head{number}/{part}", layer[part]) for part in ("kernel", "bias"))]
        x = graph.node("Gemm", inputs, f"head{number}")
    return graph.node("Softmax", [x], PROBABILITIES, axis=-1)
