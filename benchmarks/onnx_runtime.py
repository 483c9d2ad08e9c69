"""The peer ONNX Runtime, on its CPU provider."""

from collections.abc import Callable
from pathlib import Path

import numpy as np


def make_onnx_runtime(path: Path) -> Callable[[np.ndarray, int], np.ndarray]:
    """Pixels to features by a session with the usual options: all optimisations, a thread a core."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def extractor(images_u8: np.ndarray, batch_size: int) -> np.ndarray:
        starts = range(0, len(images_u8), batch_size)
        return np.concatenate([session.run(None, {"images": images_u8[i : i + batch_size]})[0] for i in starts])

    return extractor
