"""Weights files to backbones: one reader a format, names as data, one total merge, the registry of known files."""

from cifar_jax.errors import WeightsError
from cifar_jax.models.backbone import AnyBackbone, Backbone, FunctionBackbone
from cifar_jax.pretrained.formats.native import save_backbone
from cifar_jax.pretrained.load import load_backbone
from cifar_jax.pretrained.untrained import UNTRAINED, random_backbone

__all__ = [
    "UNTRAINED",
    "AnyBackbone",
    "Backbone",
    "FunctionBackbone",
    "WeightsError",
    "load_backbone",
    "random_backbone",
    "save_backbone",
]
