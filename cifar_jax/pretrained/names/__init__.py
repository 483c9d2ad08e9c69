"""Tensor names of published ResNets, one family a module."""
