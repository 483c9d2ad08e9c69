"""The peer PyTorch, eager and compiled, and the export of its network for ONNX Runtime."""

import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Extractor = Callable[[np.ndarray, int], np.ndarray]


def make_pytorch(
    weights: Path, image_size: int, compiled: bool, device: str = "cpu", precision: str = "float32"
) -> Extractor:
    """Pixels to features by the ResNet50 of torchvision, channels last, and where `compiled` by inductor."""
    torch = import_torch()

    if device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("there is a GPU, and this PyTorch does not see it")
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # as ours: float32 is no TF32
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    model = make_model(weights, image_size, getattr(torch, precision)).to(device)
    if compiled:
        # Weights become constants: BatchNorm is folded, kernels are laid out once.
        importlib.import_module("torch._inductor.config").freezing = True
        model = torch.compile(model, dynamic=False)

    def extractor(images_u8: np.ndarray, batch_size: int) -> np.ndarray:
        with torch.no_grad():
            batches = torch.from_numpy(images_u8).split(batch_size)
            features = [model(batch.to(device, non_blocking=True)) for batch in batches]
            return torch.cat(features).float().cpu().numpy()

    return extractor


def make_model(weights: Path, image_size: int, dtype: Any) -> Any:
    """uint8 [n, 32, 32, 3] -> features [n, 2048], as a module."""
    torch = import_torch()
    from safetensors.torch import load_file

    torchvision = import_torchvision()
    network = torchvision.models.resnet50(weights=None)
    network.load_state_dict(load_file(weights), strict=False)
    network.fc = torch.nn.Identity()

    class FromPixels(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network.to(dtype)
            self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1))
            self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1))

        def forward(self, images_u8: Any) -> Any:
            # Normalised while it is small, as ours is.
            x = (images_u8.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
            x = x.to(dtype)
            return self.network(torch.nn.functional.interpolate(x, scale_factor=image_size // 32, mode="nearest"))

    return FromPixels().eval().to(memory_format=torch.channels_last)


def import_torch() -> Any:
    """PyTorch, whose types say less than it can do."""
    return importlib.import_module("torch")


def import_torchvision() -> Any:
    """The library, which may have been built for another PyTorch: then its compiled operators do not load.

    No network needs them, but the import registers gradients for them and fails where they are not declared.
    """
    torch = import_torch()

    spec = importlib.util.find_spec("torchvision")
    assert spec and spec.origin, "make bench installs it"
    root = Path(spec.origin).parent
    try:
        for compiled in root.glob("_C*.so"):
            torch.ops.load_library(str(compiled))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        sources = "".join(path.read_text(encoding="utf-8") for path in root.rglob("*.py"))
        for name in sorted(set(re.findall(r"torchvision::(\w+)", sources))):
            library.define(f"{name}(Tensor x) -> Tensor")
        _declared.append(library)
    return importlib.import_module("torchvision")


_declared: list[Any] = []  # a library's declarations end with it


def export_onnx(weights: Path, path: Path, image_size: int) -> None:
    """Writes the same module as an ONNX file, for batches of any size."""
    torch = import_torch()

    images = torch.zeros((1, 32, 32, 3), dtype=torch.uint8)
    model, names = make_model(weights, image_size, torch.float32), ["images"]
    torch.onnx.export(model, (images,), path, input_names=names, dynamic_axes={names[0]: {0: "batch"}}, dynamo=False)
