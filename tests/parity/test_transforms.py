"""Parity of the evaluation transform of photos, and of the reading of folders, with torchvision, timm and transformers.

The pictures are drawn, of odd sizes, and in addition real photos where $CIFAR_JAX_PHOTOS names a folder of them.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from cifar_jax import preprocess
from cifar_jax.data.pictures import resized
from cifar_jax.data.pipeline import read_batches
from cifar_jax.data.resize import Resize, centre_crop, shorter_side_to
from cifar_jax.data.sources.folder import load_folder
from cifar_jax.data.sources.images import read_image
from cifar_jax.models.preprocess import INTERPOLATIONS, TORCH, EvalTransform
from cifar_jax.pretrained import registry
from cifar_jax.pretrained.config_json import TIMM_ARCHITECTURES, parse_hf_config, parse_timm_config

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

PHOTOS = os.environ.get("CIFAR_JAX_PHOTOS")
SIDES = (64, 96, 128, 224)
ODD_SIZES = [(1, 20), (1, 500), (37, 400), (224, 224), (225, 224), (255, 1000), (500, 375), (149, 150)]
Record = Callable[[str, float], None]


def drawn(width: int, height: int) -> Image.Image:
    """Draws noise over a gradient: every pixel and every edge counts."""
    rng = np.random.default_rng(width * 1000 + height)
    ramp = np.add.outer(np.linspace(0, 120, height), np.linspace(0, 80, width))
    return Image.fromarray((ramp[..., None] + rng.integers(0, 56, (height, width, 3))).astype(np.uint8))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Picture files: drawn ones, one of them lying on its side by EXIF, and real photos if there are any."""
    root = tmp_path_factory.mktemp("drawn")
    for size in [*ODD_SIZES, *((height, width) for width, height in ODD_SIZES)]:
        drawn(*size).save(root / "{}x{}.png".format(*size))
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn(300, 200).save(root / "turned.jpg", exif=exif)
    return [*sorted(root.iterdir()), *(sorted(Path(PHOTOS).glob("*/*/*.jpg")) if PHOTOS else ())]


@pytest.fixture(scope="module")
def pictures(paths: list[Path]) -> list[Image.Image]:
    """The same, decoded by Pillow alone."""
    return [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in paths]


def assert_equal(ours: np.ndarray, theirs: np.ndarray, path: Path) -> None:
    np.testing.assert_array_equal(ours, theirs, err_msg=str(path))


# ---------------------------------------------------------------------------------------------------------------------
# torchvision


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_resize_and_crop_are_bit_equal_to_torchvision(
    interpolation: str, torch_libs: SimpleNamespace, paths: list[Path], pictures: list[Image.Image]
) -> None:
    transforms = torch_libs.torchvision.transforms
    for side in SIDES:
        shorter = EvalTransform().shorter_side(side)
        theirs = transforms.Compose(
            [transforms.Resize(shorter, transforms.InterpolationMode(interpolation)), transforms.CenterCrop(side)]
        )
        ours = Resize("eval-transform", side, shorter, interpolation)
        for path, picture in zip(paths, pictures, strict=True):
            assert_equal(ours(picture), np.asarray(theirs(picture)), path)


def test_files_are_read_as_torchvision_reads_them(
    torch_libs: SimpleNamespace, paths: list[Path], pictures: list[Image.Image]
) -> None:
    transforms = torch_libs.torchvision.transforms
    theirs = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    for path, picture in zip(paths[:60], pictures, strict=False):
        assert_equal(read_image(path, Resize("eval-transform", 224, 256)), np.asarray(theirs(picture)), path)


@pytest.mark.parametrize("version", [1, 2])
def test_known_weights_have_the_transform_of_torchvision(
    version: int, torch_libs: SimpleNamespace, pictures: list[Image.Image]
) -> None:
    weights = getattr(torch_libs.torchvision.models.ResNet50_Weights, f"IMAGENET1K_V{version}")
    entry, theirs = registry.entries()[f"torchvision-resnet50-v{version}"], weights.transforms()
    ours = entry.transform
    assert ours is not None and entry.url == weights.url
    assert ([ours.side], [ours.shorter]) == (theirs.crop_size, theirs.resize_size)
    assert ours.interpolation == theirs.interpolation.value
    # With the normalisation, as the network receives it.
    resize = Resize("eval-transform", ours.side, ours.shorter, ours.interpolation)
    for picture in pictures[:20]:
        x = preprocess(jnp.asarray(resize(picture)[None]), TORCH, ours.side)[0]
        np.testing.assert_allclose(x, theirs(picture).numpy().transpose(1, 2, 0), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# timm and transformers, from their configs


def timm_config(timm: Any, tag: str, **changes: Any) -> dict[str, Any]:
    """Returns config.json of published weights as timm writes it, without their tensors."""
    about = {name: value for name, value in timm.get_pretrained_cfg(tag).to_dict().items() if value is not None}
    return {"architecture": tag.partition(".")[0], "pretrained_cfg": about | changes}


def timm_transform(timm: Any, config: dict[str, Any], **kwargs: Any) -> Any:
    resolved = timm.data.resolve_data_config({}, pretrained_cfg=config["pretrained_cfg"])
    return timm.data.create_transform(**resolved, is_training=False, **kwargs)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("crop_pct", "interpolation"), [(0.95, "bicubic"), (0.875, "bilinear")])
def test_transform_is_bit_equal_to_timm(
    crop_pct: float,
    interpolation: str,
    side: int,
    torch_libs: SimpleNamespace,
    paths: list[Path],
    pictures: list[Image.Image],
) -> None:
    changes = {"crop_pct": crop_pct, "interpolation": interpolation, "input_size": (3, side, side)}
    config = timm_config(torch_libs.timm, "resnet50.a1_in1k", **changes)
    theirs = timm_transform(torch_libs.timm, config, normalize=False)
    found = parse_timm_config(config, "config.json").transform
    assert found is not None and (found.side, found.interpolation) == (side, interpolation)
    ours = Resize("eval-transform", side, found.shorter_side(side), interpolation)
    for path, picture in zip(paths, pictures, strict=True):
        assert_equal(ours(picture), theirs(picture).numpy().transpose(1, 2, 0), path)


def test_transforms_of_all_published_timm_weights_are_read(torch_libs: SimpleNamespace) -> None:
    timm = torch_libs.timm
    tags = [tag for tag in timm.list_pretrained("resnet*") if tag.partition(".")[0] in TIMM_ARCHITECTURES]
    assert len(tags) > 30
    found, expected = {}, {}
    for tag in tags:
        config = timm_config(timm, tag)
        resize, crop, *_ = timm_transform(timm, config).transforms
        (side,) = set(crop.size)
        expected[tag] = EvalTransform(resize.size, side, resize.interpolation.value)
        found[tag] = parse_timm_config(config, "config.json").transform
    assert found == expected and len(set(found.values())) > 3


@pytest.mark.parametrize(("shortest_edge", "crop_pct"), [(224, 0.875), (224, 0.95), (96, 0.875), (64, 0.9)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_transform_agrees_with_transformers(
    interpolation: str,
    shortest_edge: int,
    crop_pct: float,
    torch_libs: SimpleNamespace,
    paths: list[Path],
    pictures: list[Image.Image],
    record_property: Record,
) -> None:
    """Equal to the bit to what it computes with Pillow, but for odd margins.

    These it rounds down, torchvision to even halves, so its crop may lie one pixel further to the left or the top. On
    PyTorch's tensors it resizes by another program.
    """
    resample = {"bilinear": 2, "bicubic": 3}[interpolation]
    settings = {"size": {"shortest_edge": shortest_edge}, "crop_pct": crop_pct, "resample": resample}
    on_pillow = torch_libs.transformers.ConvNextImageProcessorPil(**settings)
    on_torch = torch_libs.transformers.ConvNextImageProcessor(**settings)
    found = parse_hf_config({}, on_torch.to_dict(), "config.json").transform
    assert found is not None and (found.side, found.interpolation) == (shortest_edge, interpolation)
    resize = Resize("eval-transform", found.side, found.shorter, interpolation)
    furthest, same, paths = 0, 0, paths[:150]

    def theirs(processor: Any, picture: Image.Image) -> np.ndarray:
        pixels = processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        return np.asarray(pixels).transpose(1, 2, 0).astype(int)

    for path, picture in zip(paths, pictures, strict=False):
        whole = shorter_side_to(picture, found.shorter, interpolation)
        left, top = ((length - shortest_edge) // 2 for length in whole.size)
        ours = np.asarray(whole.crop((left, top, left + shortest_edge, top + shortest_edge)), int)
        assert_equal(ours, theirs(on_pillow, picture), path)
        furthest = max(furthest, np.abs(ours - theirs(on_torch, picture)).max())
        if np.array_equal(ours, np.asarray(centre_crop(whole, shortest_edge))):
            assert_equal(resize(picture), ours, path)
            same += 1
    record_property("grey levels", int(furthest))
    record_property("of the same crop", float(same / len(paths)))
    assert furthest <= (1 if interpolation == "bilinear" else 2)
    # With 0.95 and 0.9 the shorter side has an odd margin in every picture.
    assert crop_pct != 0.875 or same > len(paths) // 3


# ---------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of classes whose names sort differently by different rules, with pictures at several depths."""
    root = tmp_path_factory.mktemp("nested")
    classes = ["a", "a-b", "B", "b", "Z [1]", "z 2", "Äpfel", "äpfel", "10", "9", "x.y", "_under", "(round)", "日本"]
    places = ["1.png", "10.png", "2.png", "B.PNG", "a.Jpg", "a b.png", "ä.png", "x[1].png"]
    deeper = ["a/1.png", "a-b/1.png", "a b/1.png", "a/b/1.png", "a/b-c/2.png", "a.png", "A/x.jpeg", "ü/[0].bmp"]
    for number, name in enumerate(classes):
        for place in places[: 3 + number % 6] + (deeper if number % 3 == 0 else []):
            path = root / name / place
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn(10 + len(place), 8 + number).save(path)
    return root


@pytest.mark.parametrize("photos", [None, "train", "test"] if PHOTOS else [None])
def test_folder_is_read_as_imagefolder_reads_it(photos: str | None, nested: Path, torch_libs: SimpleNamespace) -> None:
    """The classes, the files in their order, the labels and the pixels are the same."""
    root = Path(PHOTOS) / photos if PHOTOS and photos else nested
    transforms = torch_libs.torchvision.transforms
    transform = transforms.Compose([transforms.Resize(73), transforms.CenterCrop(64)])
    theirs = torch_libs.torchvision.datasets.ImageFolder(str(root), transform)
    ours = load_folder(root)
    assert ours.class_names == tuple(theirs.classes)
    assert list(ours.train.images.names) == [path for path, _ in theirs.samples]
    assert ours.train.labels.tolist() == theirs.targets
    images = resized(ours.train.images, Resize("eval-transform", 64, 73))
    batches = [np.arange(start, min(start + 50, len(images))) for start in range(0, len(images), 50)]
    read = np.concatenate(list(read_batches(images, batches)))
    for at, (picture, _) in enumerate(theirs):
        assert_equal(read[at], np.asarray(picture), Path(theirs.samples[at][0]))
