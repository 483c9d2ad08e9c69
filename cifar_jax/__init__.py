"""Transfer learning of CIFAR-10 with a pretrained ResNet50, in pure JAX functions.

The pure core, for import:

  load_backbone    weights file or name -> Backbone
  preprocess       uint8 pixels -> a network's input
  extract          Backbone, uint8 pixels -> pooled features; plain, ends in stop_gradient
  make_extractor   the same for any number of images, prepared once
  init_head, head_logits, predict_probs
  TrainState, Batch, make_train_step, head_loss, eval_step
  train_heads      many seeds or learning rates on the same features, compiled once
  load_run, TrainConfig

Importing it imports neither TensorFlow nor matplotlib.
"""

from cifar_jax.config import TrainConfig
from cifar_jax.errors import RunError, UserError
from cifar_jax.evaluation import eval_step, evaluate
from cifar_jax.features import extract, make_extractor
from cifar_jax.head import head_logits, init_head
from cifar_jax.predict import predict_probs
from cifar_jax.preprocess import Preprocessing, preprocess
from cifar_jax.pretrained import Backbone, load_backbone, random_backbone, save_backbone
from cifar_jax.resnet import ResNet, ResNetConfig
from cifar_jax.runners import EpochOrder
from cifar_jax.saved_run import Run, load_run
from cifar_jax.sweep import train_heads
from cifar_jax.training import Batch, TrainState, head_loss, init_state, make_train_step
from cifar_jax.version import __version__

__all__ = [
    "Backbone",
    "Batch",
    "EpochOrder",
    "Preprocessing",
    "ResNet",
    "ResNetConfig",
    "Run",
    "RunError",
    "TrainConfig",
    "TrainState",
    "UserError",
    "__version__",
    "eval_step",
    "evaluate",
    "extract",
    "head_logits",
    "head_loss",
    "init_head",
    "init_state",
    "load_backbone",
    "load_run",
    "make_extractor",
    "make_train_step",
    "predict_probs",
    "preprocess",
    "random_backbone",
    "save_backbone",
    "train_heads",
]
