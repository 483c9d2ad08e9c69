"""Axis orders of tensors in files and in our network."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """A conversion between the axis orders of a file and of our network; both directions return views, not copies.

    Attributes:
      to_network: (tensor in the file, number of axes of the variable) -> view in the network's axis order.
      from_network: convolution kernel of the network, including dense ones with two axes -> view in the file's order.
    """

    to_network: Callable[[np.ndarray, int], np.ndarray]
    from_network: Callable[[np.ndarray], np.ndarray]

    def shape(self, tensor: np.ndarray) -> tuple[int, ...]:
        """Returns the shape that a variable has in the file."""
        return self.from_network(tensor).shape if tensor.ndim > 1 else tensor.shape


def _from_keras(tensor: np.ndarray, ndim: int) -> np.ndarray:
    """Converts a 1x1 convolution's kernel [1, 1, in, out] to a dense kernel [in, out]; the rest stays as it is."""
    return tensor[0, 0] if ndim == 2 and tensor.ndim == 4 and tensor.shape[:2] == (1, 1) else tensor


def _to_keras(kernel: np.ndarray) -> np.ndarray:
    return kernel[None, None] if kernel.ndim == 2 else kernel


def _from_torch(tensor: np.ndarray, ndim: int) -> np.ndarray:
    """Converts a convolution's kernel [out, in, h, w] to [h, w, in, out], or to [in, out] if it is 1x1."""
    return _from_keras(tensor.transpose(2, 3, 1, 0), ndim) if tensor.ndim == 4 else tensor


def _to_torch(kernel: np.ndarray) -> np.ndarray:
    return _to_keras(kernel).transpose(3, 2, 0, 1)


KERAS = Layout(_from_keras, _to_keras)
TORCH = Layout(_from_torch, _to_torch)
