"""Parity of fine-tuning: Keras's `fit` with all layers trainable, and ours, from the same weights on real images.

Eight steps of 32 images at 64x64, unshuffled. The agreement is limited by ReLUs whose input is so close to zero that a
rounding error decides whether the gradient passes. With the reference networks of the other tests, one step's gradient
of an early layer differs by half a per cent between Keras and this program, and by as much between two implementations
of the same convolution in this program; eight steps later nothing agrees any more. If one unit in fifty is off, losses
agree to 1e-5 and updates to 2e-4; with one in a thousand, at five times the learning rate, to 7e-7 and 1e-5. So the
test uses a calm network and tolerances of five to ten times the measured differences, and deliberate mistakes show that
these tolerances are tight enough.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from tasks import on_all_layers, start_of, steps_of

from cifar_jax import Backbone, EpochOrder, init_head, load_backbone
from cifar_jax.config import TrainConfig
from cifar_jax.data import Dataset, Splits
from cifar_jax.pretrained.names import keras as keras_names
from parity.networks import WRITERS, Case, Reference, Written, batch_norms, calibrate

pytestmark = [
    pytest.mark.parity,
    # Keras 3.15 passes TensorFlow tensors without `copy` support to NumPy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

IMAGE_SIZE, BATCH_SIZE, STEPS, LEARNING_RATE, MOMENTUM = 64, 32, 8, 1e-4, 0.9
SHIFT = 2.0  # bias of each BatchNorm, in units of its scale
LOSS_TOLERANCE = 1e-4  # relative, for each step's loss
STATISTICS_TOLERANCE = (
    1e-4  # for each channel's moving mean, in standard deviations, and for its moving variance, relative
)
UPDATE_TOLERANCE = 1e-3  # relative to the norm of the update of all params together
Record = Callable[[str, float], None]
CONFIG = TrainConfig(mode="finetune", batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, momentum=MOMENTUM)


class Trained(NamedTuple):
    """A network before and after some steps: flat dicts of variables by path, and the loss of each step."""

    start: dict[Any, np.ndarray]
    end: dict[Any, np.ndarray]
    losses: np.ndarray


class Lesson(NamedTuple):
    """The inputs of both programs, and the result of Keras."""

    backbone: Backbone
    head: Any
    dataset: Dataset
    theirs: Trained


@pytest.fixture(scope="module")
def lesson(keras: ModuleType, written: Written, cifar10: Splits) -> Iterator[Lesson]:
    dataset = cifar10.train.take(np.arange(BATCH_SIZE * STEPS))
    with written(Case("keras", "keras", "save", 0, IMAGE_SIZE)) as (reference, path):
        # Calibrated on other images, so that training changes the statistics.
        calm(reference, cifar10.train.images[-BATCH_SIZE:])
        WRITERS["save"](reference.model, path)
        backbone = load_backbone(path)
        head = init_head(jax.random.key(1), backbone.config.features, (), 10)
        yield Lesson(backbone, head, dataset, keras_fit(keras, reference, backbone, head, dataset))


def calm(reference: Reference, images_u8: np.ndarray) -> None:
    """Makes a network that trains stably: less faint channels, and few ReLUs close to their threshold.

    The gradient of a kernel before a BatchNorm, and its rounding error, grow as the channel gets fainter, so faint
    channels become a tenth of the others' size instead of a thousandth. With thresholds two standard deviations below
    the mean, one unit in fifty is cut off.
    """
    for layer in reference.model.layers:
        if type(layer).__name__ == "Conv2D":
            kernel, bias = layer.get_weights()
            size = np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), axis=0)
            factor = np.maximum(1, 0.1 * np.median(size) / size)
            layer.set_weights([kernel * factor, bias * factor])
    for norm in batch_norms(reference.model):
        gamma, _, *moving = norm.get_weights()
        norm.set_weights([gamma, SHIFT * gamma, *moving])
    calibrate(reference, images_u8)


def keras_fit(keras: ModuleType, reference: Reference, backbone: Backbone, head: Any, dataset: Dataset) -> Trained:
    """Trains the whole model with Keras's `fit`."""
    base = reference.model
    base.trainable = True
    inputs = keras.layers.Input((32, 32, 3))
    x = keras.layers.UpSampling2D(IMAGE_SIZE // 32)(inputs)
    x = keras.applications.resnet50.preprocess_input(x)
    # Without `training=`, `fit` runs the model in training mode, including BatchNorm.
    x = keras.layers.GlobalAveragePooling2D()(base(x))
    dense = keras.layers.Dense(10, "softmax")
    model = keras.Model(inputs, dense(x))
    dense.set_weights([np.asarray(head[0]["kernel"]), np.asarray(head[0]["bias"])])
    losses: list[float] = []

    class Losses(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            losses.append(logs["loss"])

    sgd = keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM)
    model.compile(optimizer=sgd, loss="sparse_categorical_crossentropy")
    model.fit(
        dataset.images.astype(np.float32),
        dataset.labels,
        batch_size=BATCH_SIZE,
        shuffle=False,
        verbose=0,
        callbacks=[Losses()],
    )
    names = keras_names.FAMILIES["keras"].name_map(backbone.config.stage_sizes)
    layers = {layer.name: layer for layer in base.layers}
    end: dict[Any, np.ndarray] = {}
    for path, name in names.items():
        layer, _, tensor = name.rpartition("/")
        value = next(np.asarray(v) for v in layers[layer].weights if v.name == tensor)
        end[path] = value.reshape(np.shape(flatten_dict(backbone.variables)[path]))
    kernel, bias = dense.get_weights()
    end |= {("head", "kernel"): kernel, ("head", "bias"): bias}
    # `logs` holds the running mean over the epoch, as shown in Keras's progress bar.
    counts = np.arange(1, STEPS + 1)
    sums = np.asarray(losses) * counts
    return Trained(flat(backbone.variables, head), end, np.diff(sums, prepend=0.0))


def flat(variables: Any, head: Any) -> dict[Any, np.ndarray]:
    leaves = flatten_dict(variables) | {("head", name): value for name, value in head[0].items()}
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def ours(lesson: Lesson, config: TrainConfig = CONFIG) -> Trained:
    """Runs our training steps."""
    backbone = lesson.backbone
    tx = optax.sgd(config.learning_rate, momentum=config.momentum)
    order = EpochOrder(jax.random.key(0), jax.random.key(0), BATCH_SIZE, shuffle=False)
    task = on_all_layers(config, lesson.head, backbone, lesson.dataset, size=IMAGE_SIZE)
    state, metrics = steps_of(task, tx, order)(start_of(task, tx), {}, 0, range(STEPS))
    variables = {"params": state.params["backbone"], "batch_stats": state.batch_stats}
    end = flat(variables, state.params["head"])
    return Trained(flat(backbone.variables, lesson.head), end, metrics.loss_sum / metrics.num)


@pytest.fixture(scope="module")
def right(lesson: Lesson) -> Trained:
    """Our training without a mistake."""
    return ours(lesson)


def distances(mine: Trained, theirs: Trained) -> dict[str, float]:
    """Measures the differences between two training runs.

    `loss`: relative, of the worst step. `update`: distance of the params, relative to the norm of their update. `mean`
    and `var`: moving statistics of the worst channel, in standard deviations and in variances of that channel.
    """

    def norm(paths: list[Any], of: dict[Any, np.ndarray]) -> float:
        return float(np.sqrt(sum(np.sum((of[p].astype(np.float64) - theirs.end[p]) ** 2) for p in paths)))

    params = [path for path in theirs.end if path[0] in ("params", "head")]
    worst = {"mean": 0.0, "var": 0.0}
    for path in theirs.end:
        if path[-1] in worst:
            var = theirs.end[(*path[:-1], "var")].astype(np.float64)
            apart = np.abs(mine.end[path] - theirs.end[path]) / (var if path[-1] == "var" else np.sqrt(var))
            worst[path[-1]] = max(worst[path[-1]], float(apart.max()))
    return {
        "loss": float(np.max(np.abs(mine.losses / theirs.losses[: len(mine.losses)] - 1))),
        "update": norm(params, mine.end) / norm(params, theirs.start),
        **worst,
    }


TOLERANCES = {
    "loss": LOSS_TOLERANCE,
    "mean": STATISTICS_TOLERANCE,
    "var": STATISTICS_TOLERANCE,
    "update": UPDATE_TOLERANCE,
}


def differing(found: dict[str, float]) -> dict[str, float]:
    """Returns the distances above their tolerances."""
    # Not `value > tolerance`, which is false for NaN.
    return {name: value for name, value in found.items() if not value <= TOLERANCES[name]}


def test_reference_training_makes_progress(lesson: Lesson, record_property: Record) -> None:
    """Without progress, the comparisons below would be meaningless."""
    theirs = lesson.theirs
    moved = [np.abs(theirs.end[path] - theirs.start[path]).max() for path in theirs.end if path[-1] != "bias"]
    record_property("first", float(theirs.losses[0]))
    record_property("last", float(theirs.losses[-1]))
    assert len(theirs.losses) == STEPS and min(moved) > 0
    assert theirs.losses[-1] < 0.95 * theirs.losses[0]


def test_training_of_all_layers_agrees_with_keras(lesson: Lesson, right: Trained, record_property: Record) -> None:
    found = distances(right, lesson.theirs)
    for name, value in found.items():
        record_property(name, value)
    assert differing(found) == {}


def wrong_momentum(lesson: Lesson, right: Trained) -> Trained:
    return ours(lesson, replace(CONFIG, bn_momentum=0.9))


def wrong_epsilon(lesson: Lesson, right: Trained) -> Trained:
    network = replace(lesson.backbone.config, bn_epsilon=1e-3)
    return ours(lesson._replace(backbone=lesson.backbone.replace(config=network)))


def unbiased_variance(lesson: Lesson, right: Trained) -> Trained:
    """Uses torch's estimator: n / (n - 1) times the batch's variance, with n values per channel.

    Running statistics are linear in the batch statistics and do not affect training, so the result of the wrong
    estimator follows from that of the right one.
    """

    def wrong(path: tuple[str, ...], end: np.ndarray) -> np.ndarray:
        if path[-1] != "var":
            return end
        side = IMAGE_SIZE // (2 if path[1] == "stem_bn" else 2 ** (int(path[1][len("stage")]) + 1))
        count = BATCH_SIZE * side**2
        old = CONFIG.bn_momentum**STEPS * right.start[path]
        return old + (end - old) * count / (count - 1)

    return right._replace(end={path: wrong(path, end) for path, end in right.end.items()})


def frozen_statistics(lesson: Lesson, right: Trained) -> Trained:
    return ours(lesson, replace(CONFIG, bn_statistics="frozen"))


@pytest.mark.parametrize("mistake", [wrong_momentum, wrong_epsilon, unbiased_variance, frozen_statistics])
def test_mistakes_are_noticed(
    mistake: Callable[[Lesson, Trained], Trained],
    lesson: Lesson,
    right: Trained,
    record_property: Record,
) -> None:
    found = distances(mistake(lesson, right), lesson.theirs)
    for name, value in found.items():
        record_property(name, value)
    assert differing(found) != {}
