"""In which order the axes of a tensor stand in a file, and in the network here."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """How tensors of a file become variables and back. Both ways are views: nothing is copied.

    Attributes:
      to_network: (tensor of the file, number of axes that the variable has) -> the same as the variable has it.
      from_network: a convolution's kernel of the network, dense ones of two axes included -> as the file has it.
    """

    to_network: Callable[[np.ndarray, int], np.ndarray]
    from_network: Callable[[np.ndarray], np.ndarray]

    def shape(self, tensor: np.ndarray) -> tuple[int, ...]:
        """A variable's shape as the file would have it."""
        return self.from_network(tensor).shape if tensor.ndim > 1 else tensor.shape


def _from_keras(tensor: np.ndarray, ndim: int) -> np.ndarray:
    """A 1x1 convolution's kernel [1, 1, in, out] is this network's dense kernel [in, out]; all else is alike."""
    return tensor[0, 0] if ndim == 2 and tensor.ndim == 4 and tensor.shape[:2] == (1, 1) else tensor


def _to_keras(kernel: np.ndarray) -> np.ndarray:
    return kernel[None, None] if kernel.ndim == 2 else kernel


def _from_torch(tensor: np.ndarray, ndim: int) -> np.ndarray:
    """A convolution's kernel [out, in, h, w] is [h, w, in, out] here, and [in, out] if it is a 1x1."""
    return _from_keras(tensor.transpose(2, 3, 1, 0), ndim) if tensor.ndim == 4 else tensor


def _to_torch(kernel: np.ndarray) -> np.ndarray:
    return _to_keras(kernel).transpose(3, 2, 0, 1)


KERAS = Layout(_from_keras, _to_keras)
TORCH = Layout(_from_torch, _to_torch)
