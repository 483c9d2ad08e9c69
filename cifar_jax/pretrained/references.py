"""The libraries that weights come from, asked what they compute with the same file: `verify-weights --against`.

Each builds its own network, loads the tensors its own way, normalises images by its own means and runs them; none is
needed for anything else and none is imported before it is asked for.
"""

import importlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from cifar_jax.data.sources.shapes import draw_shapes
from cifar_jax.errors import UserError, WeightsError
from cifar_jax.models.backbone import Backbone
from cifar_jax.models.preprocess import preprocess
from cifar_jax.models.resnet import DEPTHS, ResNet, ResNetConfig
from cifar_jax.pretrained.configs import CONFIG, PREPROCESSOR, read_json
from cifar_jax.pretrained.convert import fitting_variant, keras_tensors, torch_tensors, write_keras_h5
from cifar_jax.pretrained.reading import Reading

# The libraries by name, and the family of tensor names that each takes.
FAMILIES = {"keras": "keras", "torchvision": "torchvision", "timm": "torchvision", "transformers": "huggingface"}
NUM_IMAGES = 4
TOLERANCE = 1e-5  # max|a-b| / max|b| of float32 programs that do the same

Outputs = dict[str, np.ndarray]  # stage1, stage2, ..., pooled, and logits where there is a classifier


def differences(library: str, reading: Reading, backbone: Backbone) -> dict[str, float]:
    """How far a library's outputs are from ours on drawn images: max|a-b| / max|b| of each stage's whole tensor.

    Args:
      library: one of FAMILIES.
      reading: the file.
      backbone: what was made of it.

    Raises:
      UserError: when the library is not installed, or has no such network, or cannot load the file.
    """
    images, _ = draw_shapes(NUM_IMAGES, seed=0)
    ours = our_outputs(backbone, images)
    theirs = _RUNNERS[library](reading, backbone, images)
    return {name: _difference(ours[name], theirs[name]) for name in ours}


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float(np.abs(a - b).max() / np.abs(b).max())


def our_outputs(backbone: Backbone, images_u8: UInt8[np.ndarray, "n 32 32 3"]) -> Outputs:
    """What our network computes."""

    @jax.jit
    def run(backbone: Backbone, images: jax.Array) -> Any:
        x = preprocess(images, backbone.preprocessing, backbone.image_size)
        return ResNet(backbone.config).apply(backbone.variables, x)

    found = jax.device_get(run(backbone, images_u8))
    outputs = {f"stage{number + 1}": stage for number, stage in enumerate(found.stages)} | {"pooled": found.pooled}
    if backbone.top is not None:
        outputs["logits"] = found.pooled @ backbone.top["kernel"] + backbone.top["bias"]
    return outputs


def _imported(*names: str) -> list[ModuleType]:
    try:
        return [importlib.import_module(name) for name in names]
    except (ImportError, RuntimeError) as error:  # of which the latter comes from extensions built for another PyTorch
        raise UserError(
            f"--against needs {' and '.join(names)}, which cannot be imported ({str(error).splitlines()[0]}); install "
            "it, or leave the option out."
        ) from error


def _upsampled(images_u8: np.ndarray, size: int) -> np.ndarray:
    factor = size // images_u8.shape[1]
    return images_u8.repeat(factor, axis=1).repeat(factor, axis=2).astype(np.float32)


def _classes(backbone: Backbone) -> int | None:
    return None if backbone.top is None else len(backbone.top["bias"])


def _run_keras(reading: Reading, backbone: Backbone, images_u8: np.ndarray) -> Outputs:
    _require_network("keras", reading, backbone.config)
    os.environ.setdefault("KERAS_BACKEND", "jax")
    (keras,) = _imported("keras")
    side, classes = backbone.image_size, _classes(backbone)
    make = getattr(keras.applications, DEPTHS[backbone.config.stage_sizes])
    shape = {"weights": None, "include_top": classes is not None, "input_shape": (side, side, 3)}
    model = make(**shape, **({} if classes is None else {"classes": classes, "classifier_activation": None}))
    with tempfile.TemporaryDirectory() as directory:
        path = reading.path
        if reading.family != "keras":
            path = Path(directory) / "weights.h5"
            write_keras_h5(path, keras_tensors(backbone, "keras"))
        _or_user_error("keras", reading.path, lambda: model.load_weights(path))
    x = keras.applications.resnet.preprocess_input(_upsampled(images_u8, side))
    ends = [f"conv{stage + 2}_block{blocks}_out" for stage, blocks in enumerate(backbone.config.stage_sizes)]
    wanted = [model.get_layer(name).output for name in ends] + ([] if classes is None else [model.output])
    # float32 means float32 for Keras on an accelerator as well.
    with jax.default_matmul_precision("highest"):
        found = [np.asarray(output) for output in keras.Model(model.input, wanted)(x, training=False)]
    stages = found[: len(ends)]
    return _named(stages, stages[-1].mean(axis=(1, 2)), None if classes is None else found[-1])


def _named(stages: list[np.ndarray], pooled: np.ndarray, logits: np.ndarray | None) -> Outputs:
    outputs = {f"stage{number + 1}": stage for number, stage in enumerate(stages)} | {"pooled": pooled}
    return outputs if logits is None else outputs | {"logits": logits}


def _run_torchvision(reading: Reading, backbone: Backbone, images_u8: np.ndarray) -> Outputs:
    _require_network("torchvision", reading, backbone.config)
    torch, torchvision = _imported("torch", "torchvision")
    name = DEPTHS[backbone.config.stage_sizes]
    classes = _classes(backbone)
    model = getattr(torchvision.models, name.lower())(weights=None, num_classes=classes or 1)
    if classes is None:
        model.fc = torch.nn.Identity()
    usual = getattr(torchvision.models, f"{name}_Weights").IMAGENET1K_V2.transforms()
    layers = [model.layer1, model.layer2, model.layer3, model.layer4, model.avgpool]
    x = _upsampled(images_u8, backbone.image_size) / 255
    return _run_torch(torch, "torchvision", model, layers, reading, backbone, (x - usual.mean) / usual.std)


def _run_timm(reading: Reading, backbone: Backbone, images_u8: np.ndarray) -> Outputs:
    _require_network("timm", reading, backbone.config)
    torch, timm = _imported("torch", "timm")
    beside = read_json(reading.path.parent / CONFIG) or {}
    about = {key: value for key, value in beside.get("pretrained_cfg", {}).items() if key in ("mean", "std")}
    make = {"num_classes": _classes(backbone) or 0, "pretrained_cfg_overlay": about}
    model = timm.create_model(DEPTHS[backbone.config.stage_sizes].lower(), pretrained=False, **make)
    usual = timm.data.resolve_model_data_config(model)
    layers = [model.layer1, model.layer2, model.layer3, model.layer4, model.global_pool]
    x = _upsampled(images_u8, backbone.image_size) / 255
    return _run_torch(torch, "timm", model, layers, reading, backbone, (x - usual["mean"]) / usual["std"])


def _run_transformers(reading: Reading, backbone: Backbone, images_u8: np.ndarray) -> Outputs:
    # Of all these libraries transformers alone builds both: its networks stride where they are told to.
    _require_network("transformers", reading, replace(backbone.config, stride_in_1x1=False))
    torch, transformers = _imported("torch", "transformers")
    config = transformers.ResNetConfig(
        depths=list(backbone.config.stage_sizes),
        downsample_in_bottleneck=backbone.config.stride_in_1x1,
        num_labels=_classes(backbone) or 1,
    )
    model = transformers.ResNetForImageClassification(config)
    network = model if backbone.top is not None else model.resnet
    x = _upsampled(images_u8, backbone.image_size)
    if read_json(reading.path.parent / PREPROCESSOR):
        processor = transformers.AutoImageProcessor.from_pretrained(reading.path.parent)
        pixels = {
            "do_resize": False,
            "do_center_crop": False,
            "return_tensors": "np",
            "input_data_format": "channels_last",
        }
        x = processor(list(x), **pixels)["pixel_values"].transpose(0, 2, 3, 1)
    else:
        x = np.asarray(preprocess(jnp.asarray(images_u8), backbone.preprocessing, backbone.image_size))
    layers = [*model.resnet.encoder.stages, model.resnet.pooler]
    return _run_torch(torch, "transformers", network, layers, reading, backbone, x)


def _require_network(library: str, reading: Reading, config: ResNetConfig) -> None:
    """Refuses what the library would take and run as another network.

    Raises:
      UserError: which says so.
    """
    try:
        variant = fitting_variant(config, FAMILIES[library], str(reading.path))
    except WeightsError:
        variant = None
    if variant is None or variant.family != FAMILIES[library]:
        raise UserError(
            f"No network that {library} builds computes what {reading.path} is run as, {reading.variant}; name the "
            "library that it comes from, or leave --against out."
        )


def _run_torch(
    torch: Any, library: str, model: Any, layers: list[Any], reading: Reading, backbone: Backbone, x: np.ndarray
) -> Outputs:
    """Loads a PyTorch model strictly and runs it; `layers` are those whose outputs are asked for, the pooling last."""
    family = FAMILIES[library]
    state: Mapping[str, np.ndarray] = reading.tensors
    if reading.family != family:
        state = torch_tensors(backbone, family)
    elif family == "huggingface" and backbone.top is not None:  # whose names were read without their prefix
        state = {name if name in reading.top else f"resnet.{name}": value for name, value in state.items()}
    tensors = {name: torch.tensor(np.asarray(value, np.float32)) for name, value in state.items()}
    _or_user_error(library, reading.path, lambda: model.load_state_dict(tensors, strict=True))
    seen: dict[int, Any] = {}
    for at, layer in enumerate(layers):
        layer.register_forward_hook(lambda _, __, output, at=at: seen.__setitem__(at, output))
    with torch.inference_mode():
        output = model.eval()(torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)), dtype=torch.float32))
    *stages, pooled = (seen[at].numpy() for at in range(len(layers)))
    logits = None
    if backbone.top is not None:
        logits = (output.logits if library == "transformers" else output).numpy()
    return _named([stage.transpose(0, 2, 3, 1) for stage in stages], pooled.reshape(len(pooled), -1), logits)


def _or_user_error(library: str, path: Path, load: Callable[[], Any]) -> None:
    try:
        load()
    except WeightsError:
        raise
    except Exception as error:  # a library raises what its many layers happen to raise
        line = str(error).strip().partition("\n")[0]
        raise UserError(f"{library} itself cannot load {path} ({line}); leave --against {library} out.") from error


_RUNNERS: dict[str, Callable[[Reading, Backbone, np.ndarray], Outputs]] = {
    "keras": _run_keras,
    "torchvision": _run_torchvision,
    "timm": _run_timm,
    "transformers": _run_transformers,
}
