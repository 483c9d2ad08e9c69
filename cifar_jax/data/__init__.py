"""Data sets as arrays: real ones from tensorflow-datasets, synthetic ones drawn with NumPy."""

from cifar_jax.data.dataset import Dataset, Splits, balanced_subset, epoch_batches, hold_out
from cifar_jax.data.load import load_splits
from cifar_jax.data.splits import RunData, load_data

__all__ = [
    "Dataset",
    "RunData",
    "Splits",
    "balanced_subset",
    "epoch_batches",
    "hold_out",
    "load_data",
    "load_splits",
]
