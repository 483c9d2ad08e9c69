"""Export to ONNX: one file with the whole classifier, for ONNX Runtime, OpenVINO, browsers and phones."""

import json
from pathlib import Path

from cifar_jax.export.trained_model import TrainedModel
from cifar_jax.features.engines.onnx_graph import OPSET, onnx_graph
from cifar_jax.models.folded import prepare


def onnx_bytes(model: TrainedModel) -> tuple[bytes, int]:
    """Serialises a classifier as ONNX; returns the file's content and the number of nodes of its graph.

    The metadata has the fields of `about_of` by name, each as JSON.

    Raises:
      UserError: if the package onnx is not installed, or the backbone or the head is a function.
    """
    backbone, head = model.resnet("onnx"), model.dense_layers("onnx")
    metadata = {name: json.dumps(value) for name, value in model.about.items()}
    graph = onnx_graph(prepare(backbone, platform=""), model.side, head, metadata)
    return graph.SerializeToString(), len(graph.graph.node)


def write_onnx(model: TrainedModel, path: Path) -> dict[str, str]:
    """Writes a classifier as an ONNX file. Returns what is worth saying about it; see `onnx_bytes`."""
    content, nodes = onnx_bytes(model)
    path.write_bytes(content)
    return {"graph": f"{nodes} nodes, opset {OPSET}"}
