"""Reference networks built by real Keras, in both generations of its ResNet50, and the files that it writes.

`lib` is always `keras` (Keras 3) or `tf_keras` (Keras 2); only what both provide is used, and neither is imported here.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np

STAGE_SIZES = (3, 4, 6, 3)
MODERN_STAGES = ("conv2_block3_out", "conv3_block4_out", "conv4_block6_out", "conv5_block3_out")
STAGES_2016 = ("out2c", "out3d", "out4f", "out5c")
# Name suffixes of the last BatchNorm of a residual branch, and of the two before it.
BRANCH_ENDS = ("_3_bn", "_branch2c")
WITHIN_BRANCH = ("_1_bn", "_2_bn", "_branch2a", "_branch2b")

# Keras 1's tensor names by their later names; its `running_std` was the variance.
KERAS_1_NAMES = {
    "kernel": "W",
    "bias": "b",
    "gamma": "gamma",
    "beta": "beta",
    "moving_mean": "running_mean",
    "moving_variance": "running_std",
}


@dataclass(frozen=True)
class Case:
    """A network and its file.

    Attributes:
      variant: keras, keras-2016 or keras-2016-unpadded.
      lib: the library that builds and runs it, `keras` or `tf_keras`.
      writer: a key of WRITERS.
      seed: seed of its weights.
      image_size: side in pixels of its input.
      top: name of its classifier layer, or None.
    """

    variant: str
    lib: str
    writer: str
    seed: int
    image_size: int
    top: str | None = None

    def __str__(self) -> str:
        """Returns the case's name in test ids."""
        top = f"-{self.top}" if self.top else ""
        return f"{self.variant}-{self.lib}.{self.writer}{top}-seed{self.seed}-{self.image_size}px"


@dataclass(frozen=True)
class Reference:
    """A Keras network, as the model to save and as a function of images.

    Attributes:
      lib: the Keras library.
      model: the model to save.
      outputs: model of the same layers that outputs the four stages, the pooled features and the classifier's output.
      image_size: side in pixels of its input.
      top: name of its classifier layer, or None.
    """

    lib: ModuleType
    model: Any
    outputs: Any
    image_size: int
    top: str | None = None

    def preprocess(self, images_u8: np.ndarray) -> Any:
        """Applies Keras's own upsampling and preprocessing."""
        x = self.lib.layers.UpSampling2D(self.image_size // images_u8.shape[1])(images_u8.astype(np.float32))
        return self.lib.applications.resnet50.preprocess_input(x)

    def __call__(self, images_u8: np.ndarray) -> list[np.ndarray]:
        """Returns a batch's stages, pooled features and, with a classifier, logits, in inference mode."""
        with self._logits():
            return [np.asarray(output) for output in self.outputs.predict_on_batch(self.preprocess(images_u8))]

    @contextmanager
    def _logits(self) -> Iterator[None]:
        """Makes the classifier output logits instead of the softmax."""
        if self.top is None:
            yield
            return
        layer = self.model.get_layer(self.top)
        activation, layer.activation = layer.activation, self.lib.activations.linear
        try:
            yield
        finally:
            layer.activation = activation


def build(lib: ModuleType, case: Case) -> Any:
    """Builds the network of a case, as initialised by Keras."""
    if case.variant == "keras":
        return modern(lib, case.image_size, case.top)
    return of_2016(lib, case.image_size, case.top, pool_padding=0 if case.variant.endswith("unpadded") else 1)


def modern(lib: ModuleType, image_size: int, top: str | None) -> Any:
    """Builds ResNet50 as today's Keras does, with names like `conv2_block1_1_conv`."""
    shape = (image_size, image_size, 3)
    if top == "predictions":
        return lib.applications.ResNet50(weights=None, include_top=True, input_shape=shape)
    base = lib.applications.ResNet50(weights=None, include_top=False, input_shape=shape)
    return base if top is None else lib.Model(base.input, _classifier(lib, base.output, top))


def of_2016(lib: ModuleType, image_size: int, top: str | None, pool_padding: int = 1) -> Any:
    """Builds ResNet50 as Keras did from 2016 on; no current Keras does.

    It has names like `res2a_branch2a`, BatchNorm's default epsilon, and a max-pool that is padded since 2018-08-31.
    """
    layers = lib.layers
    inputs = layers.Input((image_size, image_size, 3))
    x = layers.ZeroPadding2D(3, name="conv1_pad")(inputs)
    x = layers.Conv2D(64, 7, strides=2, name="conv1")(x)
    x = layers.Activation("relu")(layers.BatchNormalization(name="bn_conv1")(x))
    if pool_padding:
        x = layers.ZeroPadding2D(pool_padding, name="pool1_pad")(x)
    x = layers.MaxPooling2D(3, strides=2)(x)
    for stage, num_blocks in enumerate(STAGE_SIZES, start=2):
        for block in range(num_blocks):
            x = _block_2016(layers, x, 64 * 2 ** (stage - 2), stage, "abcdef"[block])
    return lib.Model(inputs, x if top is None else _classifier(lib, x, top))


def _block_2016(layers: ModuleType, x: Any, features: int, stage: int, block: str) -> Any:
    def conv_bn(x: Any, branch: str, features: int, size: int = 1, stride: int = 1) -> Any:
        name = f"{stage}{block}_branch{branch}"
        x = layers.Conv2D(features, size, strides=stride, padding="same", name=f"res{name}")(x)
        return layers.BatchNormalization(name=f"bn{name}")(x)

    stride = 2 if block == "a" and stage > 2 else 1
    y = layers.Activation("relu")(conv_bn(x, "2a", features, stride=stride))
    y = layers.Activation("relu")(conv_bn(y, "2b", features, size=3))
    y = conv_bn(y, "2c", 4 * features)
    if block == "a":
        x = conv_bn(x, "1", 4 * features, stride=stride)
    return layers.Activation("relu", name=f"out{stage}{block}")(layers.add([y, x]))


def _classifier(lib: ModuleType, x: Any, name: str) -> Any:
    x = lib.layers.GlobalAveragePooling2D(name="avg_pool")(x)
    return lib.layers.Dense(1000, activation="softmax", name=name)(x)


def make_reference(
    lib: ModuleType, model: Any, image_size: int, seed: int, images_u8: np.ndarray, top: str | None = None
) -> Reference:
    """Gives a network random weights that reveal mistakes, and BatchNorm statistics of the given images."""
    reference = watched(lib, model, image_size, top)
    draw_weights(model, np.random.default_rng(seed))
    calibrate(reference, images_u8)
    return reference


def watched(lib: ModuleType, model: Any, image_size: int, top: str | None = None) -> Reference:
    """Makes a network's stages observable; its weights stay as they are."""
    names = {layer.name for layer in model.layers}
    stages = [model.get_layer(name).output for name in (MODERN_STAGES if MODERN_STAGES[0] in names else STAGES_2016)]
    pooled = lib.layers.GlobalAveragePooling2D()(stages[-1])
    outputs = [*stages, pooled, *([] if top is None else [model.output])]
    return Reference(lib, model, lib.Model(model.input, outputs), image_size, top)


def draw_weights(model: Any, rng: np.random.Generator) -> None:
    """Draws random weights that reveal mistakes without losing float32 accuracy.

    A quarter of the channels is faint: scaled down by 10 to 1000 before their BatchNorm, whose variances therefore
    range from below 1e-6 to above 1. An epsilon wrong by a thousandth then changes outputs by 1e-4; with variances
    around one it would go unnoticed.

    Random networks amplify rounding errors from layer to layer, until Keras itself is 5e-5 away from the same network
    in float64. As in trained networks, residual branches are smaller than the shortcuts (a gain of 0.4 at their ends),
    and most of their units are active (a shift of 0.5); the relu still cuts off a tenth of each stage's outputs.
    """
    for layer in model.layers:
        kind, shapes = type(layer).__name__, [weight.shape for weight in layer.get_weights()]
        if kind == "Conv2D":
            drawn = _convolution(rng, *shapes[0])
        elif kind == "BatchNormalization":
            gain = 0.4 if layer.name.endswith(BRANCH_ENDS) else 1.0
            shift = 0.5 if layer.name.endswith(WITHIN_BRANCH) else 0.1
            gamma, beta = gain * rng.uniform(0.5, 1.5, shapes[0]), rng.normal(shift, 0.2, shapes[1])
            drawn = [gamma, beta, *layer.get_weights()[2:]]
        elif kind == "Dense":
            drawn = [rng.normal(0, 0.02, shape) for shape in shapes]
        else:
            continue
        layer.set_weights([np.asarray(weight, np.float32) for weight in drawn])


def _convolution(rng: np.random.Generator, height: int, width: int, fan_in: int, channels: int) -> list[np.ndarray]:
    """Draws a He-normal kernel and a bias, with a quarter of the channels faint."""
    scale = np.where(rng.random(channels) < 0.25, 10 ** rng.uniform(-3, -1, channels), 1.0)
    kernel = rng.normal(0, (2 / (height * width * fan_in)) ** 0.5, (height, width, fan_in, channels))
    return [kernel * scale, rng.normal(0, 0.2, channels) * scale]


def batch_norms(model: Any) -> list[Any]:
    """Returns all BatchNorm layers."""
    return [layer for layer in model.layers if type(layer).__name__ == "BatchNormalization"]


def statistics(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns all moving means and all moving variances."""
    weights = [norm.get_weights() for norm in batch_norms(model)]
    return np.concatenate([w[2] for w in weights]), np.concatenate([w[3] for w in weights])


def calibrate(reference: Reference, images_u8: np.ndarray) -> None:
    """Sets every BatchNorm's statistics to those of its own input.

    In training mode a BatchNorm normalises by its batch, so one pass without momentum stores in each layer the
    statistics of its input, given those of the layers below.
    """
    norms = batch_norms(reference.model)
    momentums = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    reference.model(reference.preprocess(images_u8), training=True)
    for norm, momentum in zip(norms, momentums, strict=True):
        norm.momentum = momentum


def teach(reference: Reference, images_u8: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> None:
    """Makes the features of a modern network informative about the labels, so that a head has something to learn.

    Features of a random network contain so little class information that two epochs barely lower the loss, and their
    common mean is so large that SGD is at the edge of stability, where it amplifies rounding errors. So the last 1x1
    convolution is replaced by random mixtures of ten directions that predict the labels (ridge regression on its pooled
    input), its threshold is raised, and the whole stage is scaled to a squared feature norm of about 150.
    """
    model = reference.model
    before = reference.lib.Model(model.input, model.get_layer("conv5_block3_2_relu").output)
    parts = np.split(images_u8, range(100, len(images_u8), 100))
    inputs = np.concatenate([before.predict_on_batch(reference.preprocess(part)).mean(axis=(1, 2)) for part in parts])
    inputs = (inputs - inputs.mean(axis=0)).astype(np.float64)
    gram = inputs.T @ inputs
    ridge = np.trace(gram) / len(gram) * np.eye(len(gram))
    directions = np.linalg.solve(gram + ridge, inputs.T @ (np.eye(10)[labels] - 0.1))
    conv, norm = model.get_layer("conv5_block3_3_conv"), model.get_layer("conv5_block3_3_bn")
    kernel, bias = conv.get_weights()
    conv.set_weights([(directions @ rng.normal(size=(10, kernel.shape[-1]))).reshape(kernel.shape), bias])
    gamma, beta, *moving = norm.get_weights()
    norm.set_weights([np.full_like(gamma, 2), np.full_like(beta, -2), *moving])
    for name in ("1_0", "1_3", "2_3", "3_3"):
        norm = model.get_layer(f"conv5_block{name}_bn")
        gamma, beta, *moving = norm.get_weights()
        norm.set_weights([0.54 * gamma, 0.54 * beta, *moving])
    calibrate(reference, images_u8[:32])


def tensors(model: Any) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields all weights as (layer, tensor, value): `("conv1_conv", "kernel", ...)`."""
    for layer in model.layers:
        for variable in layer.weights:
            yield layer.name, variable.name.split("/")[-1].removesuffix(":0"), np.asarray(variable)


def write_as_keras_1(model: Any, path: Path) -> None:
    """Writes a weights file as Keras 1 did: `conv1_W:0` directly in the layer's group, `running_std` for variances."""
    names = [layer.name for layer in model.layers]
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in names]
        written: dict[str, list[bytes]] = {name: [] for name in names}
        for name in names:
            file.create_group(name)
        for layer, tensor, value in tensors(model):
            name = f"{layer}_{KERAS_1_NAMES[tensor]}:0"
            file[layer][name] = value
            written[layer].append(name.encode())
        for layer, weights in written.items():
            file[layer].attrs["weight_names"] = weights


def write_archive(model: Any, path: Path) -> None:
    """Writes a whole model as a `.keras` archive, whatever the suffix of the path."""
    made = path.with_name("made.keras")
    model.save(made)
    made.rename(path)


def write_keras_3_weights(model: Any, path: Path) -> None:
    """Writes a file with Keras 3's `save_weights`, which numbers layers by class."""
    made = path.with_name("made.weights.h5")
    model.save_weights(made)
    made.rename(path)


# Type of the fixture `written`, which builds a reference network and saves it with its Keras.
Written = Callable[[Case], AbstractContextManager[tuple[Reference, Path]]]

# Functions that save a model, by name.
WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "save": lambda model, path: model.save(path),
    "save_weights": lambda model, path: model.save_weights(path),
    "keras-1": write_as_keras_1,
    "archive": write_archive,
    "keras-3-weights": write_keras_3_weights,
}
