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

Importing it imports neither TensorFlow nor matplotlib.
"""

from cifar_jax.config import TrainConfig
from cifar_jax.errors import RunError, UserError
from cifar_jax.features.extractor import make_extractor
from cifar_jax.models.backbone import extract
from cifar_jax.models.head import Head, dense_head, dense_logits, flax_head, head_logits, init_head
from cifar_jax.models.preprocess import Preprocessing, preprocess
from cifar_jax.models.resnet import ResNet, ResNetConfig
from cifar_jax.pretrained import Backbone, FunctionBackbone, load_backbone, random_backbone, save_backbone
from cifar_jax.runs.predict import predict_probs
from cifar_jax.runs.reader import Run, load_run
from cifar_jax.train.evaluate import EvalResult, eval_step, evaluate, make_eval_step, make_evaluate
from cifar_jax.train.loop import EpochOrder, fit, make_advance
from cifar_jax.train.losses import cross_entropy, smoothed_cross_entropy
from cifar_jax.train.step import TrainState, init_state, make_train_step
from cifar_jax.train.sweep import train_heads
from cifar_jax.train.task import Batch, Split, Task, cached_task, finetune_task, head_forward, live_task
from cifar_jax.version import __version__

__all__ = [
    "Backbone",
    "Batch",
    "EpochOrder",
    "EvalResult",
    "FunctionBackbone",
    "Head",
    "Preprocessing",
    "ResNet",
    "ResNetConfig",
    "Run",
    "RunError",
    "Split",
    "Task",
    "TrainConfig",
    "TrainState",
    "UserError",
    "__version__",
    "cached_task",
    "cross_entropy",
    "dense_head",
    "dense_logits",
    "eval_step",
    "evaluate",
    "extract",
    "finetune_task",
    "fit",
    "flax_head",
    "head_forward",
    "head_logits",
    "init_head",
    "init_state",
    "live_task",
    "load_backbone",
    "load_run",
    "make_advance",
    "make_eval_step",
    "make_evaluate",
    "make_extractor",
    "make_train_step",
    "predict_probs",
    "preprocess",
    "random_backbone",
    "save_backbone",
    "smoothed_cross_entropy",
    "train_heads",
]
