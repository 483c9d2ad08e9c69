"""Data sets as arrays: real ones from tensorflow-datasets, synthetic ones drawn with NumPy."""

from cifar_jax.data.dataset import Dataset, Splits, balanced_subset, epoch_batches, hold_out
from cifar_jax.data.load import load_splits
from cifar_jax.data.splits import Problem, load_problem

__all__ = [
    "Dataset",
    "Problem",
    "Splits",
    "balanced_subset",
    "epoch_batches",
    "hold_out",
    "load_problem",
    "load_splits",
]
