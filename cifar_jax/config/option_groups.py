"""Options of a training run in groups, and the sets of options that its group and field metadata define."""

from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, get_type_hints

# Field metadata. Paths are recorded as absolute.
PATH = {"is_path": True}
# Locations of inputs and caches, which --config takes over when it runs the same job again.
RERUN_KEEPS = {"rerun_keeps": True}
# Determines when the processes of a distributed run synchronise, so they must agree on it.
SYNCHRONISES = {"synchronises": True}


@dataclass(frozen=True)
class DataConfig:
    """Images to train and test on."""

    dataset: str = "cifar10"
    """a folder of pictures (ROOT/CLASS/... or ROOT/{train,test}/CLASS/...), an .npz file, a TFDS set by name, as
    cifar10, or by directory, or shapes (synthetic, needs no download)"""
    train_examples: int | None = None
    """number of training images, balanced over the classes; if omitted, all"""
    test_examples: int | None = None
    """number of test images, balanced over the classes; if omitted, all"""
    val_fraction: float = 0.0
    """fraction of the training images to hold out for validation; at 0 the test images are used, as in the notebook"""
    test_fraction: float = 0.2
    """fraction of the images to test on, where a data set has neither test nor validation images"""
    label_key: str | None = None
    """name of the label to learn, where a TFDS set has several"""
    skip_unreadable: bool = False
    """leave out pictures of a folder that cannot be read, and list them; if omitted, the first one is an error"""
    resize: Literal["auto", "upsample", "eval-transform"] = "auto"
    """how pictures become the network's input: upsample repeats the pixels of small squares of one size by a whole
    factor; eval-transform resizes the shorter side and crops the centre as the weights expect; auto upsamples squares
    of at most 64 pixels"""
    interpolation: Literal["auto", "nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "auto"
    """eval-transform: filter of the resize; auto takes that of the weights"""
    shuffle: bool = True
    """reshuffle the training images every epoch"""
    augment: tuple[Literal["flip", "crop", "cutout", "random-resized-crop", "color-jitter"], ...] = ()
    """random augmentations of training images: flip, crop (padding 4), cutout (grey square), random-resized-crop (8 to
    100 % of the area, in place of crop), color-jitter (brightness, contrast and saturation by up to 40 %); not with
    --mode cached"""


@dataclass(frozen=True)
class BackboneConfig:
    """Pretrained network and feature extraction."""

    weights: str = "keras-resnet50"
    """backbone weights: a file, a directory, a name from `info weights`, or random / random-w16 (untrained)"""
    variant: str | None = None
    """network variant to run the weights with, where the file does not determine it: keras, keras-2016,
    keras-2016-unpadded, torchvision or huggingface"""
    image_size: int | None = None
    """side of the network's input in pixels, 32 to 4096; if omitted, the weights' own (224 for ImageNet)"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """dtype the backbone computes in; parameters, features and head are float32 either way"""
    extract_batch_size: int | None = None
    """batch size of the feature extraction; if omitted, chosen by device and image size; powers of two up to 1024
    divide the cache's chunks evenly, other sizes leave the last batch of each chunk partly empty"""
    feature_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """cached: dtype of the cached features; the 16-bit ones halve the cache and round the features, also in the run
    that extracts them"""


@dataclass(frozen=True)
class OptimConfig:
    """Training mode, head, optimizer, schedule and devices."""

    mode: Literal["cached", "live", "finetune"] = "cached"
    """cached: extract features once and train the head on them; live: run the whole network every step, as Keras does;
    finetune: train backbone and head together"""
    hidden: tuple[int, ...] = (1024, 512)
    """widths of the head's hidden layers, as 512 256 or 512,256; give --hidden alone for a linear probe"""
    epochs: int = 4
    """number of passes over the training images"""
    batch_size: int = 64
    """examples per step; the last step of an epoch takes the remainder"""
    learning_rate: float = 0.01
    """learning rate of SGD, also --lr; with --schedule cosine its peak"""
    momentum: float = 0.0
    """momentum of SGD, at least 0 and below 1"""
    nesterov: bool = False
    """use Nesterov momentum"""
    weight_decay: float = 0.0
    """weight decay, added to the gradients of all kernels (L2); biases and BatchNorm are exempt"""
    schedule: Literal["constant", "cosine"] = "constant"
    """learning rate schedule: constant, or a cosine decay to zero over all steps"""
    warmup_epochs: float = 0.0
    """epochs of linear warmup to the learning rate, with --schedule cosine; must be below --epochs"""
    label_smoothing: float = 0.0
    """label smoothing, at least 0 and below 1; the reported training loss includes it"""
    class_weights: Literal["none", "balanced"] = "none"
    """weights of the classes in the loss, also in that of validation and test images; balanced: in inverse proportion
    to the number of training images of a class"""
    clip_norm: float | None = None
    """clip gradients to this global norm (over all trained parameters)"""
    seed: int = 0
    """random seed of everything: initial head, data order, subsets, synthetic images"""
    devices: int | None = None
    """devices of this machine to divide each training step between; if omitted, all accelerators or one CPU device"""
    deterministic: bool = False
    """use only deterministic algorithms on a GPU, which is slower; CPUs and TPUs are always deterministic"""


@dataclass(frozen=True)
class FinetuneConfig:
    """Options of --mode finetune, which also trains the backbone."""

    freeze_stages: int = 0
    """finetune: freeze parameters and statistics of the stem and this many stages (1 to 4); 0 freezes nothing"""
    backbone_learning_rate: float | None = None
    """finetune: learning rate of the backbone; if omitted, --learning-rate"""
    bn_statistics: Literal["batch", "frozen"] = "batch"
    """finetune: BatchNorm normalises by batch statistics and updates the running ones, as Keras does (batch), or uses
    the pretrained statistics (frozen)"""
    bn_momentum: float = 0.99
    """finetune: decay of BatchNorm's running statistics, at least 0 and below 1"""
    zero_gamma: bool = False
    """finetune: initialise the scale of each block's last BatchNorm to zero, so that blocks start as identities"""
    micro_batch: int | None = None
    """finetune: split each step into pieces of this many examples to save memory; BatchNorm sees each piece alone"""
    remat: bool = False
    """finetune: recompute each block's activations in the backward pass, which saves memory and costs time"""


@dataclass(frozen=True)
class RunConfig:
    """Directories, progress, checkpoints and resuming; nothing here changes results."""

    out: str | None = field(default=None, metadata=PATH)
    """run directory; if omitted, runs/TIME-PRESET"""
    config: str | None = field(default=None, metadata=PATH)
    """a run directory or its config.json to take the other options' defaults from, to repeat that run in a new
    directory; in place of --preset"""
    resume: bool = False
    """resume the unfinished run in --out from its newest checkpoint, with bit-identical results; start it if there is
    none"""
    overwrite: bool = False
    """replace the run that is already in the run directory"""
    checkpoint_every: int | None = field(default=None, metadata=SYNCHRONISES)
    """save a checkpoint every this many steps within an epoch; if omitted, only at the end of each epoch and on Ctrl-C
    or SIGTERM"""
    keep_checkpoints: int = 2
    """number of newest checkpoints to keep, besides the best one where --val-fraction holds images out"""
    data_dir: str | None = field(default=None, metadata=PATH | RERUN_KEEPS)
    """TFDS data directory; if omitted, $TFDS_DATA_DIR or ~/tensorflow_datasets"""
    cache_dir: str | None = field(default=None, metadata=PATH | RERUN_KEEPS)
    """cache directory for decoded data, features, compiled functions and downloaded weights; if omitted,
    $CIFAR_JAX_CACHE or ~/.cache/cifar_jax"""
    cache_limit: float = field(default=20.0, metadata=RERUN_KEEPS)
    """size limit of the feature cache in gigabytes; least recently used features are evicted, never the run's own"""
    profile: str | None = field(default=None, metadata=PATH)
    """directory to write a profiler trace of the run to, for XProf or Perfetto; best used on a short run"""
    progress: bool = True
    """show progress bars (on a terminal only)"""
    debug: bool = False
    """show tracebacks, and stop at the first NaN in any compiled function (slow)"""


# Every option is in exactly one group and its name is unique, as options are typed and recorded without their groups.
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

# Options that apply only where the backbone trains.
FINETUNE_ONLY = tuple(one.name for one in fields(FinetuneConfig))
# What says how a ResNet is run and trained, and has no meaning for another function in its place.
OF_A_RESNET = (
    *("image_size", "precision"),
    *("freeze_stages", "bn_statistics", "bn_momentum", "zero_gamma", "remat"),
)
# What cannot change results.
RUN_ONLY = tuple(one.name for one in fields(RunConfig))
# Options in config.json that belong to the command that was typed rather than to the run.
OF_THE_COMMAND = tuple(name for name in RUN_ONLY if "rerun_keeps" not in FIELDS[name].metadata)
# Options that may differ between the processes of a distributed run.
OF_A_PROCESS = tuple(name for name in RUN_ONLY if "synchronises" not in FIELDS[name].metadata)
PATHS = tuple(name for name, one in FIELDS.items() if "is_path" in one.metadata)
