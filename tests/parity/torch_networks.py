"""Reference networks of torchvision, timm and transformers, and their files.

PyTorch is imported only when a test needs it.
"""

import importlib.util
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OTHER = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)  # no library's default
NAMES = ("torch", "torchvision", "timm", "transformers")
REASON = "PyTorch, torchvision, timm and transformers are not all installed; `make parity` installs them"


@dataclass(frozen=True)
class TorchCase:
    """A network and its file.

    Attributes:
      lib: the library that builds, writes and runs it: torchvision, timm or transformers.
      writer: a key of WRITERS.
      seed: seed of its weights.
      image_size: side in pixels of its input.
      depth: 50, 101 or 152.
      usual: whether images are normalised by IMAGENET, else by OTHER.
      in_1x1: whether blocks stride in their first 1x1 convolution, which only transformers supports.
    """

    lib: str
    writer: str
    seed: int
    image_size: int
    depth: int = 50
    usual: bool = True
    in_1x1: bool = False

    def __str__(self) -> str:
        """Returns the case's name in test ids."""
        changes = ("" if self.usual else "-other pixels") + ("-stride in 1x1" if self.in_1x1 else "")
        return f"{self.lib}{self.depth}.{self.writer}{changes}-seed{self.seed}-{self.image_size}px"


@dataclass(frozen=True)
class TorchReference:
    """A PyTorch network as a function from images to the four stages, the pooled features and the logits."""

    libs: SimpleNamespace
    model: Any
    case: TorchCase

    def preprocess(self, images_u8: np.ndarray) -> Any:
        """Applies nearest-neighbour upsampling and the library's own normalisation."""
        torch = self.libs.torch
        size = (self.case.image_size,) * 2
        x = torch.nn.functional.interpolate(torch.tensor(images_u8).permute(0, 3, 1, 2).float(), size, mode="nearest")
        if self.case.lib == "transformers":
            return image_processor(self.libs, self.case)(x, return_tensors="pt")["pixel_values"]
        if self.case.lib == "timm":
            about = self.libs.timm.data.resolve_model_data_config(self.model)
            mean, std = about["mean"], about["std"]
        else:
            about = self.libs.torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()
            mean, std = about.mean, about.std
        return self.libs.torchvision.transforms.functional.normalize(x / 255, mean, std)

    def __call__(self, images_u8: np.ndarray) -> list[np.ndarray]:
        """Returns a batch's stages and pooled features in our axis order, and its logits, in inference mode."""
        seen: dict[int, Any] = {}
        watched = parts(self.model, self.case.lib)
        hooks = [
            part.register_forward_hook(lambda _, __, output, at=at: seen.__setitem__(at, output))
            for at, part in enumerate(watched)
        ]
        with self.libs.torch.inference_mode():
            logits = self.model.eval()(self.preprocess(images_u8))
        for hook in hooks:
            hook.remove()
        *stages, pooled = (seen[at].numpy() for at in range(len(watched)))
        logits = logits.logits if self.case.lib == "transformers" else logits
        return [*(stage.transpose(0, 2, 3, 1) for stage in stages), pooled.reshape(len(pooled), -1), logits.numpy()]


@contextmanager
def imported() -> Iterator[SimpleNamespace]:
    """Imports the four libraries, or skips the test with a hint on how to install them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch", reason=REASON)
        definitions = declare_operators(torch)
        rest = {name: pytest.importorskip(name, reason=REASON, exc_type=ImportError) for name in NAMES[1:]}
        yield SimpleNamespace(torch=torch, **rest)
        del definitions


def declare_operators(torch: ModuleType) -> Any:
    """Declares the compiled operators of a torchvision that was built for another PyTorch.

    Such a torchvision, installed without its dependencies, can still run every network, because none uses these
    operators. But its import registers gradients for them and fails if they do not exist.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for compiled in root.glob("_C*.so"):
                torch.ops.load_library(str(compiled))
            return None
        except OSError:
            library = torch.library.Library("torchvision", "DEF")
    sources = "".join(path.read_text(encoding="utf-8") for path in root.rglob("*.py"))
    for name in sorted(set(re.findall(r"torchvision::(\w+)", sources))):
        library.define(f"{name}(Tensor x) -> Tensor")
    return library


def build(libs: SimpleNamespace, case: TorchCase) -> Any:
    """Builds the network of a case, as initialised by its library."""
    name, (mean, std) = f"resnet{case.depth}", IMAGENET if case.usual else OTHER
    if case.lib == "torchvision":
        return getattr(libs.torchvision.models, name)(weights=None)
    if case.lib == "timm":
        about = {"mean": mean, "std": std, "input_size": (3, case.image_size, case.image_size)}
        return libs.timm.create_model(name, pretrained=False, pretrained_cfg_overlay=about)
    depths = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}[case.depth]
    config = libs.transformers.ResNetConfig(depths=depths, downsample_in_bottleneck=case.in_1x1, num_labels=1000)
    return libs.transformers.ResNetForImageClassification(config)


def image_processor(libs: SimpleNamespace, case: TorchCase) -> Any:
    """Returns the image processor of `microsoft/resnet-50`, with its resizing turned off."""
    mean, std = IMAGENET if case.usual else OTHER
    size = {"shortest_edge": case.image_size}
    processor = libs.transformers.ConvNextImageProcessor
    return processor(do_resize=False, size=size, image_mean=list(mean), image_std=list(std))


def parts(model: Any, lib: str) -> list[Any]:
    """Returns the modules whose outputs are compared: four stages and the pooling."""
    if lib == "transformers":
        return [*model.resnet.encoder.stages, model.resnet.pooler]
    pool = model.avgpool if lib == "torchvision" else model.global_pool
    return [model.layer1, model.layer2, model.layer3, model.layer4, pool]


def make_reference(libs: SimpleNamespace, case: TorchCase, images_u8: np.ndarray) -> TorchReference:
    """Builds a network with random weights that reveal mistakes, and BatchNorm statistics of the given images."""
    reference = TorchReference(libs, build(libs, case), case)
    draw_weights(libs.torch, reference.model, np.random.default_rng(case.seed))
    norms = batch_norms(reference.model)
    for norm in norms:
        norm.momentum = 1.0  # in PyTorch, the weight of the new statistics
    with libs.torch.no_grad():
        reference.model.train()(reference.preprocess(images_u8))
    for norm in norms:
        norm.momentum = 0.1
    return reference


# Name suffixes of the last BatchNorm of a residual branch, and of the two before it.
BRANCH_END = re.compile(r"(layer\d\.\d+\.bn3|layer\.2\.normalization)$")
WITHIN_BRANCH = re.compile(r"(layer\d\.\d+\.bn[12]|layer\.[01]\.normalization)$")


def stage_of(name: str) -> str:
    """Returns the part of a module's name that identifies its stage."""
    match = re.search(r"layer\d(?=\.\d+\.bn)|stages\.\d", name)
    return match[0] if match else ""


def draw_weights(torch: ModuleType, model: Any, rng: np.random.Generator) -> None:
    """Draws random weights like `networks.draw_weights`, for the same reasons, but without biases."""
    blocks = Counter(stage_of(name) for name, _ in model.named_modules() if BRANCH_END.search(name))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            out, fan_in, height, width = module.weight.shape
            faint = np.where(rng.random(out) < 0.25, 10 ** rng.uniform(-3, -1, out), 1.0)
            kernel = rng.normal(0, (2 / (height * width * fan_in)) ** 0.5, module.weight.shape)
            drawn = {"weight": kernel * faint[:, None, None, None]}
        elif isinstance(module, torch.nn.BatchNorm2d):
            gain, shift, spread = 1.0, 0.5 if WITHIN_BRANCH.search(name) else 0.1, 0.2
            if BRANCH_END.search(name):
                # Scaled so that the sum of 23 or 36 branches has the spread of that of 6, and does not drift upwards:
                # otherwise hardly any unit of their stage would ever be cut off.
                share = min(1.0, 6 / blocks[stage_of(name)])
                gain, shift, spread = 0.4 * share**0.5, 0.1 if share == 1 else 0.0, 0.2 * share**0.5
            size = module.weight.shape
            drawn = {"weight": gain * rng.uniform(0.5, 1.5, size), "bias": rng.normal(shift, spread, size)}
        elif isinstance(module, torch.nn.Linear):
            drawn = {"weight": rng.normal(0, 0.02, module.weight.shape), "bias": rng.normal(0, 0.02, module.bias.shape)}
        else:
            continue
        with torch.no_grad():
            for parameter, values in drawn.items():
                getattr(module, parameter).copy_(torch.tensor(values, dtype=torch.float32))


def batch_norms(model: Any) -> list[Any]:
    """Returns all BatchNorm layers."""
    return [module for module in model.modules() if type(module).__name__.startswith("BatchNorm")]


def statistics(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns all running means and all running variances."""
    norms = batch_norms(model)
    means, variances = ([getattr(norm, of).numpy() for norm in norms] for of in ("running_mean", "running_var"))
    return np.concatenate(means), np.concatenate(variances)


def _saved(zipped: bool) -> Callable[[TorchReference, Path], Path]:
    def write(reference: TorchReference, directory: Path) -> Path:
        path = directory / "weights.pth"
        state = reference.model.state_dict()
        reference.libs.torch.save(state, path, _use_new_zipfile_serialization=zipped)
        return path

    return write


def _hub(reference: TorchReference, directory: Path) -> Path:
    """Writes a directory as published by timm and transformers."""
    if reference.case.lib == "timm":
        reference.libs.timm.models.save_for_hf(reference.model, directory, safe_serialization=True)
        assert json.loads((directory / "config.json").read_text())["architecture"] == f"resnet{reference.case.depth}"
        return directory
    reference.model.save_pretrained(directory)
    image_processor(reference.libs, reference.case).save_pretrained(directory)
    return directory


def _hub_bin(reference: TorchReference, directory: Path) -> Path:
    """Writes the same directory with the tensors in PyTorch's own format."""
    _hub(reference, directory)
    (directory / "model.safetensors").unlink()
    reference.libs.torch.save(reference.model.state_dict(), directory / "pytorch_model.bin")
    return directory


# Functions that save a network, by name.
WRITERS = {"pth": _saved(True), "legacy-pth": _saved(False), "hub": _hub, "hub-bin": _hub_bin}

# Type of the fixture `torch_written`, which builds a reference network and saves it with its library.
TorchWritten = Callable[[TorchCase], AbstractContextManager[tuple[TorchReference, Path]]]
