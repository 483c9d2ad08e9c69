"""Loads weights files as backbones: one reader per format, name maps as data, one strict merge, a registry of files."""

from cifar_jax.errors import WeightsError
from cifar_jax.models.backbone import AnyBackbone, Backbone, FunctionBackbone
from cifar_jax.pretrained.formats.safetensors_file import save_backbone
from cifar_jax.pretrained.load import load_backbone
from cifar_jax.pretrained.random_init import UNTRAINED, random_backbone

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
