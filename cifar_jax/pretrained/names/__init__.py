"""Tensor names of published ResNets, one module per family."""
