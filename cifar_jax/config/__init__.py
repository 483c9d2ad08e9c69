"""Configuration of a run: frozen groups of options, their checks, and the named presets."""

from cifar_jax.config.option_groups import (
    FINETUNE_ONLY,
    BackboneConfig,
    DataConfig,
    FinetuneConfig,
    OptimConfig,
    RunConfig,
)
from cifar_jax.config.train_config import DECIDING, PRESETS, TrainConfig, preset, without_meaningless

__all__ = [
    "DECIDING",
    "FINETUNE_ONLY",
    "PRESETS",
    "BackboneConfig",
    "DataConfig",
    "FinetuneConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "preset",
    "without_meaningless",
]
