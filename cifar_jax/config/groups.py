"""The options of a training run in groups, and what kind each option is, which its group and its field say."""

from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, get_type_hints

# Marks of single fields. A path is recorded as an absolute one.
PATH = {"is_path": True}
# Inputs and caches, which stay where they are when --config runs the same job again.
RERUN_KEEPS = {"rerun_keeps": True}
# Decides when processes that train together wait for each other, so they must agree on it.
SYNCHRONISES = {"synchronises": True}


@dataclass(frozen=True)
class DataConfig:
    """Images to train and test on."""

    dataset: str = "cifar10"
    """cifar10, shapes (drawn, needs no download), or the name of another 32x32 classification set of TFDS"""
    train_examples: int | None = None
    """train on that many images, balanced over the classes; else all"""
    test_examples: int | None = None
    """test on that many images, balanced over the classes; else all"""
    val_fraction: float = 0.0
    """share of the training images held out for validation; at 0 the test images are, as in the notebook"""
    shuffle: bool = True
    """reshuffle the training images every epoch"""
    augment: tuple[Literal["flip", "crop", "cutout"], ...] = ()
    """random changes to each training image: flip, crop (padded by 4), cutout (a grey square); not with cached"""


@dataclass(frozen=True)
class BackboneConfig:
    """The pretrained network and how features are extracted with it."""

    weights: str = "keras-resnet50"
    """the backbone: a file or directory, a name that `info` lists, or random / random-w16 (untrained)"""
    variant: str | None = None
    """how to run the weights, where their file leaves a choice: keras, keras-2016, keras-2016-unpadded, torchvision or
    huggingface"""
    image_size: int | None = None
    """side in pixels to which images are upsampled; a multiple of 32; else the weights' own (224 for ImageNet's)"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """what the backbone computes in; parameters, features and head are float32 either way"""
    extract_batch_size: int | None = None
    """images at a time through the backbone when features are extracted; else chosen by device and image size; a power
    of two up to 1024 divides the chunks that features are kept in, another number leaves their last batches unfilled"""
    feature_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """cached: what features are kept in; the smaller ones take half the space and round them, the first time too"""


@dataclass(frozen=True)
class OptimConfig:
    """Training: what trains, for how long, by which steps."""

    mode: Literal["cached", "live", "finetune"] = "cached"
    """cached: features once, then the head on them; live: every step through the whole network, as Keras does;
    finetune: backbone and head train together"""
    hidden: tuple[int, ...] = (1024, 512)
    """widths of the head's hidden layers, as 512 256 or 512,256; none after it for a linear probe"""
    epochs: int = 4
    """passes over the training images"""
    batch_size: int = 64
    """examples a step; the last step of an epoch takes what is left"""
    learning_rate: float = 0.01
    """step size of SGD, also --lr; with --schedule cosine its peak"""
    momentum: float = 0.0
    """momentum of SGD, 0 to below 1"""
    nesterov: bool = False
    """Nesterov's form of momentum"""
    weight_decay: float = 0.0
    """share of every kernel that is added to its gradient; biases and BatchNorm are left out"""
    schedule: Literal["constant", "cosine"] = "constant"
    """learning rate schedule: constant, or a cosine that falls to zero over all steps"""
    warmup_epochs: float = 0.0
    """epochs over which --schedule cosine first rises to the learning rate; below --epochs"""
    label_smoothing: float = 0.0
    """share of each label that is spread over all classes, 0 to below 1; the training loss is reported with it"""
    clip_norm: float | None = None
    """gradients of a larger norm (over all trained parameters together) are scaled down to it"""
    seed: int = 0
    """seed of everything random: initial head, order, subsets, drawn images"""
    devices: int | None = None
    """devices of this machine that each training step is divided between; else all accelerators, or one CPU device"""
    deterministic: bool = False
    """on a GPU take only algorithms that give the same bits every time, which is slower; a CPU and a TPU always do"""


@dataclass(frozen=True)
class FinetuneConfig:
    """Options of --mode finetune, which trains the backbone too."""

    freeze_stages: int = 0
    """finetune: the stem and that many stages keep their parameters and statistics, 1 to 4; 0 freezes nothing"""
    backbone_learning_rate: float | None = None
    """finetune: step size of the backbone's parameters; else --learning-rate"""
    bn_statistics: Literal["batch", "frozen"] = "batch"
    """finetune: BatchNorm normalises by each batch and updates its statistics as Keras does, or keeps its statistics"""
    bn_momentum: float = 0.99
    """finetune: share of its old statistics that BatchNorm keeps at each step, 0 to below 1"""
    zero_gamma: bool = False
    """finetune: start with zero scale in the last BatchNorm of each block, so that blocks begin as identities"""
    micro_batch: int | None = None
    """finetune: run a step in pieces of that many examples, which takes less memory; each piece is normalised alone"""
    remat: bool = False
    """finetune: compute each block's activations again in the backward pass, which takes less memory and more time"""


@dataclass(frozen=True)
class RunConfig:
    """Places, progress, checkpoints and resuming, none of which changes results."""

    out: str | None = field(default=None, metadata=PATH)
    """the run directory; else runs/TIME-PRESET"""
    config: str | None = field(default=None, metadata=PATH)
    """a run directory or its config.json, from which the other options get their defaults: the same run again, in a
    directory of its own; --preset does the same with a name"""
    resume: bool = False
    """continue the unfinished run in --out from its newest checkpoint, to the same bits; start it if there is none"""
    overwrite: bool = False
    """replace the run that is already in the run directory"""
    checkpoint_every: int | None = field(default=None, metadata=SYNCHRONISES)
    """steps after which a checkpoint is made within an epoch; else only at its end, and when Ctrl-C or SIGTERM comes"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints are kept, beside the best where --val-fraction holds images out"""
    data_dir: str | None = field(default=None, metadata=PATH | RERUN_KEEPS)
    """where TFDS keeps its data sets; else $TFDS_DATA_DIR, else ~/tensorflow_datasets"""
    cache_dir: str | None = field(default=None, metadata=PATH | RERUN_KEEPS)
    """where decoded data, features, compiled functions and downloaded weights are kept; else $CIFAR_JAX_CACHE, else
    ~/.cache/cifar_jax"""
    cache_limit: float = field(default=20.0, metadata=RERUN_KEEPS)
    """gigabytes of features that are kept; beyond it those used least recently are removed, never the run's own"""
    profile: str | None = field(default=None, metadata=PATH)
    """write a trace of the run to that directory, for XProf or Perfetto; best of a short run"""
    progress: bool = True
    """progress bars (only ever on a terminal)"""
    debug: bool = False
    """show tracebacks, and stop at the first NaN that any compiled function makes (slow)"""


# Every option is in one group, and no two of them have the same name: that is how they are typed and recorded.
GROUPS: dict[str, type[Any]] = {
    "data": DataConfig,
    "backbone": BackboneConfig,
    "optim": OptimConfig,
    "finetune": FinetuneConfig,
    "run": RunConfig,
}
FIELDS: dict[str, Field[Any]] = {one.name: one for group in GROUPS.values() for one in fields(group)}
GROUP_OF = {one.name: name for name, group in GROUPS.items() for one in fields(group)}
HINTS: dict[str, Any] = {name: hint for group in GROUPS.values() for name, hint in get_type_hints(group).items()}
DEFAULTS: dict[str, Any] = {name: one.default for name, one in FIELDS.items()}

# What has a meaning only where the backbone trains.
FINETUNE_ONLY = tuple(one.name for one in fields(FinetuneConfig))
# What says how a ResNet is run and trained, and has no meaning for another function in its place.
OF_A_RESNET = (
    *("image_size", "precision"),
    *("freeze_stages", "bn_statistics", "bn_momentum", "zero_gamma", "remat"),
)
# What cannot change results.
RUN_ONLY = tuple(one.name for one in fields(RunConfig))
# What a run's config.json says of the command that made it, and not of the run.
OF_THE_COMMAND = tuple(name for name in RUN_ONLY if "rerun_keeps" not in FIELDS[name].metadata)
# What may differ between processes that train together.
OF_A_PROCESS = tuple(name for name in RUN_ONLY if "synchronises" not in FIELDS[name].metadata)
PATHS = tuple(name for name, one in FIELDS.items() if "is_path" in one.metadata)
