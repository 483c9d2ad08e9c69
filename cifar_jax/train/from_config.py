"""Builds everything that training needs from a configuration and its inputs: task, optimiser, steps and evaluation."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from cifar_jax.config import TrainConfig
from cifar_jax.config.option_groups import DEFAULTS, OF_A_RESNET
from cifar_jax.data.augment import RESIZED_CROP, augment as augment_images
from cifar_jax.data.crops import RandomCrops
from cifar_jax.data.pictures import Resized
from cifar_jax.errors import UserError
from cifar_jax.features.extraction import Extracted, dataset_features
from cifar_jax.features.extractor import default_batch_size
from cifar_jax.features.time_estimate import Forecast, faster_ways
from cifar_jax.models.backbone import extract
from cifar_jax.models.head import Head, dense_head
from cifar_jax.pretrained import AnyBackbone, FunctionBackbone
from cifar_jax.rng import stream_key
from cifar_jax.runtime.multihost import gather, own_rows
from cifar_jax.runtime.progress import Reporter
from cifar_jax.runtime.sharding import replicate
from cifar_jax.runtime.timing import Clock
from cifar_jax.train.evaluate import Evaluate, make_evaluate
from cifar_jax.train.finetune import trainable_backbone
from cifar_jax.train.load_inputs import Inputs
from cifar_jax.train.loop import Advance, EpochOrder, make_advance
from cifar_jax.train.losses import LossFn, loss_of
from cifar_jax.train.memory import SHARE, device_bytes, largest_fitting, step_bytes
from cifar_jax.train.optimizer import make_optimizer
from cifar_jax.train.step import TrainState, TrainStep, first_not_finite, init_state, make_train_step
from cifar_jax.train.task import Augment, Split, Task, cached_task, finetune_task, live_task

FORWARD_SHARE = 1 / 3  # of a step that trains all layers; the backward pass takes about twice as long as the forward
FEATURES_AT_ONCE = 2048  # batch size of evaluation on features


class Parts(NamedTuple):
    """User-supplied replacements for the components that a configuration describes; None keeps the default."""

    loss_fn: LossFn | None = None
    head: Head | None = None
    backbone: AnyBackbone | None = None
    tx: optax.GradientTransformation | None = None
    augment: Augment | None = None

    def names(self) -> dict[str, str]:
        """Names of the replaced components, recorded with a run; a backbone is also recorded by its digest."""
        return {
            name: part.name if isinstance(part, Head) else str(getattr(part, "__qualname__", type(part).__name__))
            for name, part in self._asdict().items()
            if part is not None
        }


class Composed(NamedTuple):
    """The components of a training step; the task's frozen variables are on the devices."""

    task: Task
    loss_fn: LossFn
    tx: optax.GradientTransformation
    micro_batch: int | None

    def train_step(self) -> TrainStep:
        """The training step, not compiled."""
        return make_train_step(
            self.task.forward, self.loss_fn, self.tx, augment=self.task.augment, micro_batch=self.micro_batch
        )

    def state(self) -> TrainState:
        """The state before the first step."""
        return init_state(self.task.params, self.tx, self.task.batch_stats)


def compose(config: TrainConfig, inputs: Inputs, parts: Parts, mesh: Mesh, extracted: Extracted | None) -> Composed:
    """Builds the task, loss and optimiser of a configuration, with `parts` replacing its own; see `prepare`."""
    task = make_task(config, inputs, parts, mesh, extracted)
    tx = make_optimizer(config, -(-len(inputs.data.train.labels) // config.optim.batch_size), parts.tx)
    data = inputs.data
    loss_fn = parts.loss_fn or loss_of(config, np.asarray(data.train.labels), len(data.splits.class_names))
    return Composed(task, loss_fn, tx, config.finetune.micro_batch)


# Type of each of the `Parts`, its name, and advice to those who pass something else.
TYPES = {
    "loss_fn": (Callable, "a function", ""),
    "head": (
        Head,
        "a Head",
        "; wrap a Flax module as flax_head(module), or two functions as Head(init, logits, name)",
    ),
    "backbone": (AnyBackbone, "a Backbone", "; wrap a function as FunctionBackbone(function, variables, name)"),
    "tx": (optax.GradientTransformation, "an optax.GradientTransformation", ""),
    "augment": (Callable, "a function", ""),
}


def check_parts(config: TrainConfig, parts: Parts) -> None:
    """Checks that the replacements have the right types and are compatible with the options.

    Raises:
      UserError: if one is not, naming it.
    """
    if parts.augment and config.optim.mode == "cached":
        raise UserError(
            "augment needs the pixels at every step, which --mode cached sees only once; use --mode live or finetune."
        )
    if parts.loss_fn and config.optim.class_weights != "none":
        raise UserError(
            f"--class-weights {config.optim.class_weights} weights the cross-entropy that loss_fn= replaces; leave one "
            "of them out."
        )
    for name, part in parts._asdict().items():
        expected, words, advice = TYPES[name]
        if part is not None and not isinstance(part, expected):
            raise UserError(f"{name}= takes {words}, got {type(part).__name__}{advice}.")
    if isinstance(parts.backbone, FunctionBackbone):
        _check_function(config, parts.backbone)


def _check_function(config: TrainConfig, backbone: FunctionBackbone) -> None:
    """Checks that a function can be used as a backbone and that no options specific to a ResNet are set."""
    options = config.options() | {"image_size": config.backbone.image_size or backbone.image_size}
    defaults = DEFAULTS | {"image_size": backbone.image_size}
    if ignored := [name for name in OF_A_RESNET if options[name] != defaults[name]]:
        values = ("" if options[name] is True else f" {options[name]}" for name in ignored)
        named = ", ".join(f"--{name.replace('_', '-')}{value}" for name, value in zip(ignored, values, strict=True))
        raise UserError(f"Options of a ResNet do not apply to {backbone!r}: leave out {named}.")
    _ = backbone.num_features  # raises if the function returns the wrong shape
    if config.optim.mode == "finetune":
        trainable_backbone(config, backbone, backbone.image_size)


class Training(NamedTuple):
    """Everything that `fit` needs."""

    task: Task  # its frozen variables are on the devices
    state: TrainState  # before the first step
    advance: Advance
    evaluate: Evaluate
    extracted: Extracted | None  # in `cached` mode
    reporter: Reporter  # shows the progress bars of training
    fault: Callable[[TrainState, int, int], str]  # `(state, epoch, step)`: names the first tensor that is not finite
    smaller_step: Callable[[], str]  # after a step ran out of memory: an option with which it fits, or ""


def prepare(
    config: TrainConfig,
    inputs: Inputs,
    parts: Parts,
    mesh: Mesh,
    clock: Clock,
    reporter: Reporter,
    first_epoch: int = 0,
    stopping: Callable[[], bool] | None = None,
) -> Training:
    """Builds the training of a configuration. In `cached` mode this extracts the features.

    `parts` replaces components that the configuration describes, `first_epoch` is where training starts, for the time
    estimate, and `stopping` is polled during evaluations. `clock` records the seconds of the phase `features`, and the
    time of the first step.

    Raises:
      UserError: if a replacement does not fit the inputs.
    """
    extracted, bars = None, clock.watch(reporter)
    if config.optim.mode == "cached":
        with clock("features"):
            extracted = extract_features(config, inputs, bars, clock)
    composed = compose(config, inputs, parts, mesh, extracted)
    task, loss_fn, tx, micro_batch = composed
    run_key, order_key = jax.random.key(config.optim.seed), stream_key(config.optim.seed, "order")
    order = EpochOrder(order_key, run_key, config.optim.batch_size, config.data.shuffle)
    advance = make_advance(task, composed.train_step(), order, mesh)
    training_bars, evaluation_bars = _forecast(config, inputs, first_epoch, clock, bars)
    images_at_once = config.backbone.extract_batch_size or default_batch_size(inputs.image_size) * mesh.size
    at_once = FEATURES_AT_ONCE if extracted else images_at_once

    def fault(state: TrainState, epoch: int, step: int) -> str:
        batch = advance.batch(epoch, step)
        return first_not_finite(
            task.forward, loss_fn, tx, state, task.frozen, batch, run_key, task.augment, micro_batch
        )

    def smaller_step() -> str:
        def bytes_of(size: int) -> int:
            step = composed._replace(micro_batch=size if in_pieces else None).train_step()
            return step_bytes(step, state, task, advance, config.optim.batch_size if in_pieces else size)

        in_pieces = config.optim.mode == "finetune"
        limit = SHARE * device_bytes(mesh.local_devices[0])
        size = largest_fitting(bytes_of, micro_batch or config.optim.batch_size, limit, mesh.size)
        return f"--{'micro-batch' if in_pieces else 'batch-size'} {size}" if size else ""

    state = composed.state()
    return Training(
        task,
        state,
        advance,
        make_evaluate(task, loss_fn, mesh, at_once, evaluation_bars, stopping),
        extracted,
        training_bars,
        fault,
        smaller_step,
    )


def init_params(config: TrainConfig, inputs: Inputs, head: Head) -> PyTree:
    """Initialises the parameters of a head.

    Raises:
      UserError: if the number of logits differs from the number of classes.
    """
    num_features, num_classes = inputs.backbone.num_features, len(inputs.data.splits.class_names)
    params = head.init(stream_key(config.optim.seed, "init"), num_features, num_classes)
    features = jax.ShapeDtypeStruct((1, num_features), jnp.float32)
    logits = jax.eval_shape(lambda params, features: head(params, features), params, features)
    if (shape := getattr(logits, "shape", None)) != (1, num_classes):
        raise UserError(
            f"The head {head.name!r} returns {logits if shape is None else f'shape {list(shape)}'} for the features of "
            f"one image, expected [1, {num_classes}]: {config.data.dataset} has {num_classes} classes."
        )
    return params


def make_task(config: TrainConfig, inputs: Inputs, parts: Parts, mesh: Mesh, extracted: Extracted | None) -> Task:
    """Builds the task of a configuration, with its frozen variables replicated over the mesh.

    Raises:
      UserError: if the head's number of logits differs from the number of classes.
    """
    data, backbone, image_size = inputs
    head = parts.head or dense_head(config.optim.hidden)
    head_params = init_params(config, inputs, head)
    if extracted:
        features = {name: Split(extracted.features[name], part.labels) for name, part in data.parts.items()}
        return cached_task(head_params, head, features)
    images = {name: Split(*part) for name, part in data.parts.items()}
    augment = parts.augment
    if not augment:
        cut, in_step = cropped_when_read(data.train.images, config.data.augment, config.optim.seed)
        images["train"], augment = images["train"]._replace(inputs=cut), image_augmentation(in_step)
    if config.optim.mode == "live":
        function = partial(extract, image_size=image_size, precision=config.backbone.precision)
        return live_task(head_params, head, replicate(mesh, backbone), function, images, augment)
    counts = (config.optim.batch_size, len(data.train.labels) % config.optim.batch_size)
    has_padding = any(count % mesh.size for count in counts)
    variables, trainable = trainable_backbone(config, backbone, image_size, mesh, has_padding)
    return finetune_task(head_params, head, variables, trainable, images, augment)


def cropped_when_read(images: Any, names: tuple[str, ...], seed: int) -> tuple[Any, tuple[str, ...]]:
    """Cuts random crops of pictures while they are decoded, instead of in the step.

    Returns:
      The training images, and the names of the augmentations that are left to the step: all, unless `names` has random
      resized crops and the images are pictures of any size.
    """
    if RESIZED_CROP in names and isinstance(images, Resized) and images.resize.method == "eval-transform":
        return RandomCrops(images.source, images.resize, seed), tuple(n for n in names if n != RESIZED_CROP)
    return images, names


def image_augmentation(names: tuple[str, ...]) -> Augment | None:
    """The named image augmentations as the `augment` function of a `Task`; None if there are none."""
    if not names:
        return None
    return lambda key, batch: batch._replace(inputs=augment_images(key, batch.inputs, names))


def extract_features(config: TrainConfig, inputs: Inputs, reporter: Reporter, clock: Clock) -> Extracted:
    """Extracts the features of all images by split. Each process extracts a share into its own cache."""
    data, backbone, image_size = inputs
    names = {"train": "training images", "val": f"{data.val_name} images", "test": "test images"}
    own, digests = {}, None
    for split, part in data.parts.items():
        rows = own_rows(len(part.labels))
        own[names[split]] = part.take(rows)
    if jax.process_count() == 1:
        digests = {names[split]: data.digests[split].images for split in data.parts}
    found = dataset_features(config, backbone, image_size, own, digests=digests, reporter=reporter, clock=clock)
    features = {split: gather(found.features[names[split]], len(part.labels)) for split, part in data.parts.items()}
    return found._replace(features=features)


def _forecast(
    config: TrainConfig, inputs: Inputs, first_epoch: int, clock: Clock, reporter: Reporter
) -> tuple[Reporter, Reporter]:
    """Reporters of training and evaluation; unless features are cached, they also drive the time estimate."""
    if config.optim.mode == "cached":
        return reporter, reporter  # an epoch takes seconds
    share = FORWARD_SHARE if config.optim.mode == "finetune" else 1.0
    num = {name: len(part.labels) for name, part in inputs.data.parts.items()}
    evaluated = (config.optim.epochs - first_epoch) * num.get("val", num["test"]) + (num["test"] if "val" in num else 0)
    work = (config.optim.epochs - first_epoch) * num["train"] + share * evaluated
    forecast = Forecast(work, clock, faster_ways(config, inputs.backbone, inputs.image_size))
    return forecast.watch(reporter), forecast.watch(reporter, share)
