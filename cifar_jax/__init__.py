"""Transfer learning of CIFAR-10 with a pretrained ResNet50, in pure JAX functions.

The pure core, for import:

  load_backbone    weights file or name -> Backbone
  preprocess       uint8 pixels -> a network's input
  extract          Backbone, uint8 pixels -> pooled features; plain, ends in stop_gradient
  make_extractor   the same for any number of images, prepared once
  init_head, head_logits, predict_probs
  Task             what trains, what goes in, and how logits come of it: cached_task, live_task, finetune_task
  make_train_step, make_eval_step, init_state, Batch, TrainState
  make_advance, make_evaluate, fit
  dense_head, flax_head, FunctionBackbone, cross_entropy
  train_heads      many seeds or learning rates on the same features, compiled once
  load_run, TrainConfig
  export_run       a run -> ONNX, StableHLO and other formats; load_exported reads those two

A name is imported when it is first asked for, so `import cifar_jax` costs nothing, not even JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cifar_jax.config.train_config import TrainConfig as TrainConfig
    from cifar_jax.errors import RunError as RunError, UserError as UserError
    from cifar_jax.export.exported import ExportedModel as ExportedModel, load_exported as load_exported
    from cifar_jax.export.write import export_run as export_run
    from cifar_jax.features.extractor import make_extractor as make_extractor
    from cifar_jax.models.backbone import Backbone as Backbone, FunctionBackbone as FunctionBackbone, extract as extract
    from cifar_jax.models.head import (
        Head as Head,
        dense_head as dense_head,
        dense_logits as dense_logits,
        flax_head as flax_head,
        head_logits as head_logits,
        init_head as init_head,
    )
    from cifar_jax.models.preprocess import Preprocessing as Preprocessing, preprocess as preprocess
    from cifar_jax.models.resnet import ResNet as ResNet, ResNetConfig as ResNetConfig
    from cifar_jax.pretrained.formats.safetensors_file import save_backbone as save_backbone
    from cifar_jax.pretrained.load import load_backbone as load_backbone
    from cifar_jax.pretrained.random_init import random_backbone as random_backbone
    from cifar_jax.runs.predict import predict_probs as predict_probs
    from cifar_jax.runs.reader import Run as Run, load_run as load_run
    from cifar_jax.train.evaluate import (
        EvalResult as EvalResult,
        eval_step as eval_step,
        evaluate as evaluate,
        make_eval_step as make_eval_step,
        make_evaluate as make_evaluate,
    )
    from cifar_jax.train.loop import EpochOrder as EpochOrder, fit as fit, make_advance as make_advance
    from cifar_jax.train.losses import cross_entropy as cross_entropy, smoothed_cross_entropy as smoothed_cross_entropy
    from cifar_jax.train.step import (
        TrainState as TrainState,
        init_state as init_state,
        make_train_step as make_train_step,
    )
    from cifar_jax.train.sweep import train_heads as train_heads
    from cifar_jax.train.task import (
        Batch as Batch,
        Split as Split,
        Task as Task,
        cached_task as cached_task,
        finetune_task as finetune_task,
        head_forward as head_forward,
        live_task as live_task,
    )
    from cifar_jax.version import __version__ as __version__

# Where each public name is.
_MODULES = {
    "config.train_config": "TrainConfig",
    "errors": "RunError UserError",
    "export.exported": "ExportedModel load_exported",
    "export.write": "export_run",
    "features.extractor": "make_extractor",
    "models.backbone": "Backbone FunctionBackbone extract",
    "models.head": "Head dense_head dense_logits flax_head head_logits init_head",
    "models.preprocess": "Preprocessing preprocess",
    "models.resnet": "ResNet ResNetConfig",
    "pretrained.formats.safetensors_file": "save_backbone",
    "pretrained.load": "load_backbone",
    "pretrained.random_init": "random_backbone",
    "runs.predict": "predict_probs",
    "runs.reader": "Run load_run",
    "train.evaluate": "EvalResult eval_step evaluate make_eval_step make_evaluate",
    "train.loop": "EpochOrder fit make_advance",
    "train.losses": "cross_entropy smoothed_cross_entropy",
    "train.step": "TrainState init_state make_train_step",
    "train.sweep": "train_heads",
    "train.task": "Batch Split Task cached_task finetune_task head_forward live_task",
    "version": "__version__",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
