"""Reference implementations for parity checks: `verify-weights --against`.

Each reference library builds its own network, loads the tensors itself, applies its own normalisation and runs the
images. The libraries are needed for nothing else and are imported on first use only.
"""

import importlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
from cifar_jax.pretrained.config_json import CONFIG, PREPROCESSOR, read_json
from cifar_jax.pretrained.convert import keras_tensors, matching_variant, torch_tensors, write_keras_h5
from cifar_jax.pretrained.merge import ParsedWeights

# Family of tensor names that each reference library loads.
FAMILIES = {"keras": "keras", "torchvision": "torchvision", "timm": "torchvision", "transformers": "huggingface"}
NUM_IMAGES = 4
TOLERANCE = 1e-5  # max|a-b| / max|b| between equivalent float32 programs

Outputs = dict[str, np.ndarray]  # stage1, stage2, ..., pooled, and logits if there is a classifier
Runner = Callable[[ParsedWeights, Backbone, np.ndarray], Outputs]  # the last argument are uint8 images [n, 32, 32, 3]


def differences(run: Runner, parsed: ParsedWeights, backbone: Backbone) -> dict[str, float]:
    """Compares our outputs with a library's on synthetic images: max|a-b| / max|b| over each stage's whole tensor.

    Args:
      run: a value of RUNNERS.
      parsed: the parsed file.
      backbone: the backbone built from it.

    Raises:
      UserError: if the library is not installed, has no such network, or cannot load the file.
    """
    images, _ = draw_shapes(NUM_IMAGES, seed=0)
    ours = our_outputs(backbone, images)
    theirs = run(parsed, backbone, images)
    return {name: _difference(ours[name], theirs[name]) for name in ours}


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float(np.abs(a - b).max() / np.abs(b).max())


def our_outputs(backbone: Backbone, images_u8: UInt8[np.ndarray, "n 32 32 3"]) -> Outputs:
    """Returns our network's outputs."""

    @jax.jit
    def run(backbone: Backbone, images: jax.Array) -> Any:
        x = preprocess(images, backbone.preprocessing, backbone.image_size)
        return ResNet(backbone.config).apply(backbone.variables, x)

    found = jax.device_get(run(backbone, images_u8))
    top = backbone.top
    logits = None if top is None else found.pooled @ top["kernel"] + top["bias"]
    return _to_outputs(found.stages, found.pooled, logits)


def _import(*names: str) -> list[ModuleType]:
    try:
        return [importlib.import_module(name) for name in names]
    except (ImportError, RuntimeError) as error:  # RuntimeError: extensions built for another PyTorch
        raise UserError(
            f"--against needs {' and '.join(names)}, which cannot be imported ({str(error).splitlines()[0]}). Install "
            "it or omit --against."
        ) from error


def _upsample(images_u8: np.ndarray, size: int) -> np.ndarray:
    factor = size // images_u8.shape[1]
    return images_u8.repeat(factor, axis=1).repeat(factor, axis=2).astype(np.float32)


def _num_classes(backbone: Backbone) -> int | None:
    return None if backbone.top is None else len(backbone.top["bias"])


def _run_keras(parsed: ParsedWeights, backbone: Backbone, images_u8: np.ndarray) -> Outputs:
    _require_network("keras", parsed, backbone.config)
    os.environ.setdefault("KERAS_BACKEND", "jax")
    (keras,) = _import("keras")
    side, classes = backbone.image_size, _num_classes(backbone)
    make = getattr(keras.applications, DEPTHS[backbone.config.stage_sizes])
    shape = {"weights": None, "include_top": classes is not None, "input_shape": (side, side, 3)}
    model = make(**shape, **({} if classes is None else {"classes": classes, "classifier_activation": None}))
    with tempfile.TemporaryDirectory() as directory:
        path = parsed.path
        if parsed.family != "keras":
            path = Path(directory) / "weights.h5"
            write_keras_h5(path, keras_tensors(backbone, "keras"))
        _load_or_raise("keras", parsed.path, lambda: model.load_weights(path))
    x = keras.applications.resnet.preprocess_input(_upsample(images_u8, side))
    ends = [f"conv{stage + 2}_block{blocks}_out" for stage, blocks in enumerate(backbone.config.stage_sizes)]
    wanted = [model.get_layer(name).output for name in ends] + ([] if classes is None else [model.output])
    # Full float32 products in Keras on an accelerator too.
    with jax.default_matmul_precision("highest"):
        found = [np.asarray(output) for output in keras.Model(model.input, wanted)(x, training=False)]
    stages = found[: len(ends)]
    return _to_outputs(stages, stages[-1].mean(axis=(1, 2)), None if classes is None else found[-1])


def _to_outputs(stages: Sequence[np.ndarray], pooled: np.ndarray, logits: np.ndarray | None) -> Outputs:
    outputs = {f"stage{number + 1}": stage for number, stage in enumerate(stages)} | {"pooled": pooled}
    return outputs if logits is None else outputs | {"logits": logits}


def _run_torchvision(parsed: ParsedWeights, backbone: Backbone, images_u8: np.ndarray) -> Outputs:
    _require_network("torchvision", parsed, backbone.config)
    torch, torchvision = _import("torch", "torchvision")
    name = DEPTHS[backbone.config.stage_sizes]
    classes = _num_classes(backbone)
    model = getattr(torchvision.models, name.lower())(weights=None, num_classes=classes or 1)
    if classes is None:
        model.fc = torch.nn.Identity()
    normalize = getattr(torchvision.models, f"{name}_Weights").IMAGENET1K_V2.transforms()
    layers = [model.layer1, model.layer2, model.layer3, model.layer4, model.avgpool]
    x = _upsample(images_u8, backbone.image_size) / 255
    return _run_torch(torch, "torchvision", model, layers, parsed, backbone, (x - normalize.mean) / normalize.std)


def _run_timm(parsed: ParsedWeights, backbone: Backbone, images_u8: np.ndarray) -> Outputs:
    _require_network("timm", parsed, backbone.config)
    torch, timm = _import("torch", "timm")
    config = read_json(parsed.path.parent / CONFIG) or {}
    overlay = {key: value for key, value in config.get("pretrained_cfg", {}).items() if key in ("mean", "std")}
    options = {"num_classes": _num_classes(backbone) or 0, "pretrained_cfg_overlay": overlay}
    model = timm.create_model(DEPTHS[backbone.config.stage_sizes].lower(), pretrained=False, **options)
    data_config = timm.data.resolve_model_data_config(model)
    layers = [model.layer1, model.layer2, model.layer3, model.layer4, model.global_pool]
    x = _upsample(images_u8, backbone.image_size) / 255
    return _run_torch(torch, "timm", model, layers, parsed, backbone, (x - data_config["mean"]) / data_config["std"])


def _run_transformers(parsed: ParsedWeights, backbone: Backbone, images_u8: np.ndarray) -> Outputs:
    # transformers is the only one of these libraries whose networks can stride in either convolution.
    _require_network("transformers", parsed, replace(backbone.config, stride_in_1x1=False))
    torch, transformers = _import("torch", "transformers")
    config = transformers.ResNetConfig(
        depths=list(backbone.config.stage_sizes),
        downsample_in_bottleneck=backbone.config.stride_in_1x1,
        num_labels=_num_classes(backbone) or 1,
    )
    model = transformers.ResNetForImageClassification(config)
    network = model if backbone.top is not None else model.resnet
    x = _upsample(images_u8, backbone.image_size)
    if read_json(parsed.path.parent / PREPROCESSOR):
        processor = transformers.AutoImageProcessor.from_pretrained(parsed.path.parent)
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
    return _run_torch(torch, "transformers", network, layers, parsed, backbone, x)


def _require_network(library: str, parsed: ParsedWeights, config: ResNetConfig) -> None:
    """Refuses weights that the library would load but run as a different network.

    Raises:
      UserError: if the library has no network that computes the same function.
    """
    try:
        variant = matching_variant(config, FAMILIES[library], str(parsed.path))
    except WeightsError:
        variant = None
    if variant is None or variant.family != FAMILIES[library]:
        raise UserError(
            f"{library} has no network that matches {parsed.path}, variant {parsed.variant}. Pass the library that the "
            "weights come from, or omit --against."
        )


def _run_torch(
    torch: Any, library: str, model: Any, layers: list[Any], parsed: ParsedWeights, backbone: Backbone, x: np.ndarray
) -> Outputs:
    """Loads a PyTorch model strictly and runs it; `layers` are the modules to record, the pooling last."""
    family = FAMILIES[library]
    state: Mapping[str, np.ndarray] = parsed.tensors
    if parsed.family != family:
        state = torch_tensors(backbone, family)
    elif family == "huggingface" and backbone.top is not None:  # restore the prefix that the parser removed
        state = {name if name in parsed.top else f"resnet.{name}": value for name, value in state.items()}
    tensors = {name: torch.tensor(np.asarray(value, np.float32)) for name, value in state.items()}
    _load_or_raise(library, parsed.path, lambda: model.load_state_dict(tensors, strict=True))
    recorded: dict[int, Any] = {}
    for at, layer in enumerate(layers):
        layer.register_forward_hook(lambda _, __, output, at=at: recorded.__setitem__(at, output))
    with torch.inference_mode():
        output = model.eval()(torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)), dtype=torch.float32))
    *stages, pooled = (recorded[at].numpy() for at in range(len(layers)))
    logits = None
    if backbone.top is not None:
        logits = (output.logits if library == "transformers" else output).numpy()
    return _to_outputs([stage.transpose(0, 2, 3, 1) for stage in stages], pooled.reshape(len(pooled), -1), logits)


def _load_or_raise(library: str, path: Path, load: Callable[[], Any]) -> None:
    try:
        load()
    except Exception as error:  # the libraries do not document their exceptions
        line = str(error).strip().partition("\n")[0]
        raise UserError(f"{library} cannot load {path} ({line}). Omit --against {library}.") from error


RUNNERS: dict[str, Runner] = {
    "keras": _run_keras,
    "torchvision": _run_torchvision,
    "timm": _run_timm,
    "transformers": _run_transformers,
}
