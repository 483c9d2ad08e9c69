"""Export to Keras 3: one .keras file of built-in layers, which every backend of Keras loads without this project.

Layers are named as in `keras.applications`, and BatchNorm is not folded, so that the model can be fine-tuned.
"""

import contextlib
import importlib.util
import json
import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from cifar_jax.errors import RunError, UserError, extra_missing
from cifar_jax.export.rgb import in_rgb, pixel_statistics
from cifar_jax.export.trained_model import CHECKED, TOLERANCE, DenseLayer, TrainedModel, drawn_images
from cifar_jax.models.backbone import Backbone
from cifar_jax.models.folded import features_of, prepare
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained.convert import keras_tensors
from cifar_jax.pretrained.names.keras import FAMILIES
from cifar_jax.runtime.logs import root_handlers_kept

IMAGE, FEATURES, PROBABILITIES = "image", "avg_pool", "probabilities"  # names of layers
ABOUT = "cifar_jax.json"  # a member of the file, which is a zip archive
OF_FEATURES = 1e-4  # largest difference of features in relation to the largest one, by rounding
# On JAX, Keras would compile a random draw for each shape of a kernel whenever it loads the file, for 20 seconds, only
# to replace it by the weights.
INITIALIZER = "zeros"

NAMES = FAMILIES["keras"]


def write_keras(model: TrainedModel, path: Path) -> dict[str, str]:
    """Writes a classifier as a .keras file, loads it again and compares.

    Its input is `image` [N, side, side, 3], RGB in 0..255, uint8 or float. The member `cifar_jax.json` of the file has
    the fields of `about_of`; its preprocessing is that of the stored network, which always takes RGB.

    Returns:
      Descriptions of what was written, by name.

    Raises:
      UserError: if Keras cannot be imported, or the backbone or the head is a function.
      RunError: if the file does not give the features and probabilities of the network.
    """
    backbone, head = in_rgb(model.resnet("keras")), model.dense_layers("keras")
    with _keras() as keras:
        network = _network(keras, backbone, model.side, head)
        _fill(network, backbone, head)
        network.save(path)
        with zipfile.ZipFile(path, "a") as file:
            about = model.about | {"preprocessing": asdict(backbone.preprocessing)}
            file.writestr(ABOUT, json.dumps(about, indent=2, allow_nan=False))
        checked = _check(keras, model, path)
        shown = f"{len(network.layers)} layers; by Keras {keras.__version__} on {keras.backend.backend()}"
    return {"layers": shown, "checked": checked}


@contextlib.contextmanager
def _keras() -> Iterator[Any]:
    """Imports Keras, on JAX if the caller has chosen nothing else, and keeps its logs and TensorFlow's off.

    Until the block ends its backend computes as this project does: in full float32, JAX wherever it runs, any other
    backend on the CPU.
    """
    if importlib.util.find_spec("keras") is None:
        raise extra_missing("--format keras", "keras", "keras")
    is_ours = "keras" not in sys.modules
    if is_ours:
        os.environ.setdefault("KERAS_BACKEND", "jax")
        # Read when TensorFlow is first imported, which Keras does on any backend.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    with root_handlers_kept():
        try:
            import keras
        except (ImportError, ValueError) as error:  # ValueError: there is no such backend
            raise UserError(
                f"Keras cannot be imported with KERAS_BACKEND={os.environ.get('KERAS_BACKEND')} ({error}); install "
                "that backend, or set KERAS_BACKEND=jax."
            ) from error
        on_jax = keras.backend.backend() == "jax"
        if is_ours and keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            with contextlib.suppress(RuntimeError):  # raised if the caller has already initialised it
                tf.config.set_visible_devices([], "GPU")  # it would take the memory that JAX needs
        computes = jax.default_matmul_precision("highest") if on_jax else keras.device("cpu:0")
        # Keras mixes dtypes, which strict promotion would refuse.
        with computes, jax.numpy_dtype_promotion("standard"):
            yield keras


@dataclass(frozen=True)
class _Layers:
    """Layers of a network by name, of one dtype and layout whatever the user's keras.json says."""

    keras: Any
    config: ResNetConfig

    def make(self, kind: str, name: str, *arguments: Any, **options: Any) -> Any:
        return getattr(self.keras.layers, kind)(*arguments, name=name, dtype="float32", **options)

    def image(self, kind: str, name: str, *arguments: Any, **options: Any) -> Any:
        return self.make(kind, name, *arguments, data_format="channels_last", **options)

    def conv(self, x: Any, width: int, size: int, stride: int, conv: str, norm: str) -> Any:
        """A convolution padded by half its kernel on every side, and BatchNorm."""
        # "same" pads strided convolutions on one side only.
        if size > 1 and stride > 1:
            x = self.image("ZeroPadding2D", f"{conv.removesuffix('_conv')}_pad", size // 2)(x)
        window = {"strides": stride, "padding": "same" if stride == 1 else "valid"}
        options = window | {"use_bias": self.config.conv_bias, "kernel_initializer": INITIALIZER}
        x = self.image("Conv2D", conv, width, size, **options)(x)
        return self.make("BatchNormalization", norm, axis=-1, epsilon=self.config.bn_epsilon)(x)

    def block(self, x: Any, label: str, width: int, stride: int, is_first: bool) -> Any:
        """A bottleneck block; the first of a stage has a projected shortcut."""

        def conv(x: Any, role: str, width: int, size: int, stride: int) -> Any:
            names = (NAMES.block[one].format(label) for one in (role, role.replace("conv", "bn")))
            return self.conv(x, width, size, stride, *names)

        first, second = (stride, 1) if self.config.stride_in_1x1 else (1, stride)
        shortcut = conv(x, "conv_proj", 4 * width, 1, stride) if is_first else x
        y = self.make("ReLU", f"conv{label}_1_relu")(conv(x, "conv1", width, 1, first))
        y = self.make("ReLU", f"conv{label}_2_relu")(conv(y, "conv2", width, 3, second))
        y = conv(y, "conv3", 4 * width, 1, 1)
        return self.make("ReLU", f"conv{label}_out")(self.make("Add", f"conv{label}_add")([shortcut, y]))


def _network(keras: Any, backbone: Backbone, side: int, head: Sequence[DenseLayer]) -> Any:
    """Builds the classifier as a functional model whose weights are still missing."""
    config, layers = backbone.config, _Layers(keras, backbone.config)
    mean, std = pixel_statistics(backbone.preprocessing)
    statistics = {"mean": mean.tolist(), "variance": np.square(np.float64(std)).tolist()}
    image = keras.Input((side, side, 3), dtype="float32", name=IMAGE)
    x = layers.make("Normalization", "normalization", axis=-1, **statistics)(image)
    if (factor := backbone.image_size // side) > 1:
        x = layers.image("UpSampling2D", "upsampling", factor, interpolation="nearest")(x)
    x = layers.conv(x, config.width, 7, 2, NAMES.stem["stem_conv"], NAMES.stem["stem_bn"])
    x = layers.make("ReLU", "conv1_relu")(x)
    if config.pool_padding:  # zeros, as after a relu nothing is below
        x = layers.image("ZeroPadding2D", "pool1_pad", config.pool_padding)(x)
    x = layers.image("MaxPooling2D", "pool1_pool", 3, strides=2)(x)
    for stage, num_blocks in enumerate(config.stage_sizes):
        for block in range(num_blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            x = layers.block(x, NAMES.label(stage, block), config.width * 2**stage, stride, block == 0)
    x = layers.image("GlobalAveragePooling2D", FEATURES)(x)
    for name, layer in zip(_head_names(head), head, strict=True):
        activation = "softmax" if name == PROBABILITIES else "relu"
        x = layers.make("Dense", name, layer["bias"].size, activation=activation, kernel_initializer=INITIALIZER)(x)
    return keras.Model(image, x, name="classifier")


def _head_names(head: Sequence[DenseLayer]) -> list[str]:
    return [*(f"dense{number}" for number in range(1, len(head))), PROBABILITIES]


def _fill(network: Any, backbone: Backbone, head: Sequence[DenseLayer]) -> None:
    """Gives a built model its weights."""
    tensors = keras_tensors(backbone, "keras")
    for dense, values in zip(_head_names(head), head, strict=True):
        tensors |= {f"{dense}/{part}": value for part, value in values.items()}
    for name, value in tensors.items():
        layer, _, weight = name.partition("/")
        getattr(network.get_layer(layer), weight).assign(value)


def _check(keras: Any, model: TrainedModel, path: Path) -> str:
    """Compares a written file with the network on synthetic images.

    Raises:
      RunError: if they differ.
    """
    images = drawn_images(model.resize)
    loaded = keras.saving.load_model(path)
    outputs = keras.Model(loaded.input, [loaded.get_layer(FEATURES).output, loaded.output])
    features, probabilities = map(np.asarray, outputs.predict_on_batch(images))
    expected_features, expected = _outputs(model, images)
    difference = float(np.abs(probabilities - expected).max())
    of_features = float(np.abs(features - expected_features).max() / np.abs(expected_features).max())
    if not (difference <= TOLERANCE and of_features <= OF_FEATURES):
        raise RunError(
            f"What was exported gives other results than the run: probabilities by up to {difference:.1e}, features by "
            f"{of_features:.1e} of the largest; nothing was kept. Please report this."
        )
    return f"largest difference of probabilities {difference:.1e} on {CHECKED} drawn images"


def _outputs(model: TrainedModel, images: UInt8[np.ndarray, "n side side 3"]) -> tuple[np.ndarray, np.ndarray]:
    """Features and probabilities of the network itself."""
    prepared = prepare(model.resnet("keras"), platform=jax.default_backend())

    @jax.jit
    def run(images: Array) -> tuple[Float[Array, "n features"], Float[Array, "n classes"]]:
        features = features_of(prepared, images)
        return features, jax.nn.softmax(model.head(model.head_params, features))

    return jax.device_get(run(images))
