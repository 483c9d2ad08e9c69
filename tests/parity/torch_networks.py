"""Reference networks of torchvision, timm and transformers, alive and awkward as those of Keras, and their files.

Nothing of PyTorch is imported here before a test asks for it.
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
OTHER = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)  # what no library assumes
NAMES = ("torch", "torchvision", "timm", "transformers")
REASON = "PyTorch, torchvision, timm and transformers are not all installed: run `make parity`, which sees to that"


@dataclass(frozen=True)
class TorchCase:
    """A network and its file.

    Attributes:
      lib: torchvision, timm or transformers, which builds, writes and runs it.
      writer: one of WRITERS.
      seed: of its weights.
      image_size: side in pixels of its input.
      depth: 50, 101 or 152.
      usual: whether its images are normalised as most are; else by OTHER.
      in_1x1: whether a block strides in its first 1x1 convolution, which only transformers offers.
    """

    lib: str
    writer: str
    seed: int
    image_size: int
    depth: int = 50
    usual: bool = True
    in_1x1: bool = False

    def __str__(self) -> str:
        """As a test's name shows it."""
        changes = ("" if self.usual else "-other pixels") + ("-stride in 1x1" if self.in_1x1 else "")
        return f"{self.lib}{self.depth}.{self.writer}{changes}-seed{self.seed}-{self.image_size}px"


@dataclass(frozen=True)
class TorchReference:
    """A network of PyTorch as a function of images to the four stages, the pooled features and the logits."""

    libs: SimpleNamespace
    model: Any
    case: TorchCase

    def preprocess(self, images_u8: np.ndarray) -> Any:
        """Nearest-neighbour upsampling, and the library's own normalising."""
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
        """Stages and pooled features in our order of axes, and the logits, of a batch, in inference mode."""
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
    """The four libraries, or a skip that says how to get them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch", reason=REASON)
        definitions = declare_operators(torch)
        rest = {name: pytest.importorskip(name, reason=REASON, exc_type=ImportError) for name in NAMES[1:]}
        yield SimpleNamespace(torch=torch, **rest)
        del definitions


def declare_operators(torch: ModuleType) -> Any:
    """Declares the compiled operators of a torchvision that was built for another PyTorch.

    Such a one, installed without its dependencies, runs every network all the same: none uses these operators, but its
    import registers gradients for them and fails where they are not there.
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
    """The network of a case, as its library initialises it."""
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
    """The one that `microsoft/resnet-50` comes with, its resizing left to us."""
    mean, std = IMAGENET if case.usual else OTHER
    size = {"shortest_edge": case.image_size}
    processor = libs.transformers.ConvNextImageProcessor
    return processor(do_resize=False, size=size, image_mean=list(mean), image_std=list(std))


def parts(model: Any, lib: str) -> list[Any]:
    """The modules whose outputs are compared: four stages and the pooling."""
    if lib == "transformers":
        return [*model.resnet.encoder.stages, model.resnet.pooler]
    pool = model.avgpool if lib == "torchvision" else model.global_pool
    return [model.layer1, model.layer2, model.layer3, model.layer4, pool]


def make_reference(libs: SimpleNamespace, case: TorchCase, images_u8: np.ndarray) -> TorchReference:
    """A network with random weights that no mistake survives, and BatchNorm statistics of the given images."""
    reference = TorchReference(libs, build(libs, case), case)
    draw_weights(libs.torch, reference.model, np.random.default_rng(case.seed))
    norms = batch_norms(reference.model)
    for norm in norms:
        norm.momentum = 1.0  # PyTorch's is the share of the new
    with libs.torch.no_grad():
        reference.model.train()(reference.preprocess(images_u8))
    for norm in norms:
        norm.momentum = 0.1
    return reference


# How the names of a residual branch's last BatchNorm end, and those of the two before it.
BRANCH_END = re.compile(r"(layer\d\.\d+\.bn3|layer\.2\.normalization)$")
WITHIN_BRANCH = re.compile(r"(layer\d\.\d+\.bn[12]|layer\.[01]\.normalization)$")


def stage_of(name: str) -> str:
    """The part of a module's name that all modules of its stage share."""
    match = re.search(r"layer\d(?=\.\d+\.bn)|stages\.\d", name)
    return match[0] if match else ""


def draw_weights(torch: ModuleType, model: Any, rng: np.random.Generator) -> None:
    """Random weights as `networks.draw_weights` has them, for the same reasons, without biases."""
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
                # What 23 or 36 branches add up to spreads no more than what 6 do, and does not climb: else hardly a
                # unit of their stage is ever off.
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
    """All BatchNorm layers."""
    return [module for module in model.modules() if type(module).__name__.startswith("BatchNorm")]


def statistics(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """All running means, and all running variances."""
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
    """A directory as timm and transformers publish it."""
    if reference.case.lib == "timm":
        reference.libs.timm.models.save_for_hf(reference.model, directory, safe_serialization=True)
        assert json.loads((directory / "config.json").read_text())["architecture"] == f"resnet{reference.case.depth}"
        return directory
    reference.model.save_pretrained(directory)
    image_processor(reference.libs, reference.case).save_pretrained(directory)
    return directory


def _hub_bin(reference: TorchReference, directory: Path) -> Path:
    """The same with the tensors in PyTorch's own form."""
    _hub(reference, directory)
    (directory / "model.safetensors").unlink()
    reference.libs.torch.save(reference.model.state_dict(), directory / "pytorch_model.bin")
    return directory


# How a file comes to be.
WRITERS = {"pth": _saved(True), "legacy-pth": _saved(False), "hub": _hub, "hub-bin": _hub_bin}

# The fixture `torch_written`: makes a reference network and has its library write it.
TorchWritten = Callable[[TorchCase], AbstractContextManager[tuple[TorchReference, Path]]]
