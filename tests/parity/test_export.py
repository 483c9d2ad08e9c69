"""Exports loaded by Keras on two backends and by PyTorch, in processes of their own that lack this project.

They give the probabilities of the run, for every kind of network.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import ROOT, TESTS, files_below
from readme.catalogue import OF_PARITY
from readme.documents import blocks
from untrained_runs import CLASSES, KERAS_LIKE, TORCH_LIKE, drawn_images, drawn_run, run_with

from cifar_jax import load_backbone
from cifar_jax.data import Splits
from cifar_jax.data.resize import Resize
from cifar_jax.data.sources.images import read_image
from cifar_jax.errors import RunError, WeightsError
from cifar_jax.export.write import export_run
from cifar_jax.models.resnet import ResNetConfig
from cifar_jax.pretrained.names.keras import FAMILIES
from cifar_jax.runs.reader import Run
from parity.kinds_of_photo import PHOTOS

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

TOLERANCE = 1e-5
ENDINGS = {"keras": ".keras", "pytorch": ""}
CONSUMERS = {"jax": "keras", "tensorflow": "keras", "torch": "pytorch"}  # format by what reads it
# A network of each kind: stride, biases, epsilon, padding of the pool; upsampled and not; heads of one layer and three.
RUNS = {
    "keras-upsampled": lambda: drawn_run(KERAS_LIKE, 32, upsampled=True, hidden=(16, 8)),
    "keras-unpadded": lambda: drawn_run(replace(KERAS_LIKE, bn_epsilon=1e-3, pool_padding=0), 64),
    "keras-2016-upsampled": lambda: drawn_run(replace(KERAS_LIKE, bn_epsilon=1e-3), 32, upsampled=True),
    "torch-upsampled": lambda: drawn_run(TORCH_LIKE, 32, upsampled=True),
    "torch-unpadded": lambda: drawn_run(replace(TORCH_LIKE, pool_padding=0, stage_sizes=(1, 1, 1)), 64, hidden=(16, 8)),
    "transformers-odd": lambda: drawn_run(replace(TORCH_LIKE, stride_in_1x1=True), 45),
}

KERAS = """
import json, sys, zipfile
import keras, numpy as np
assert keras.backend.backend() == sys.argv[1]
found = {}
for name in sys.argv[3:]:
    model = keras.saving.load_model(f"{name}.keras")
    images = np.load(f"{name}.npy")
    found[name] = model.predict(images, verbose=0)
    assert np.array_equal(found[name], model.predict(images.astype(np.float32), verbose=0))
    assert np.abs(found[name][:4] - np.asarray(model(images[:4]))).max() < 1e-5
    assert model.input_shape == (None, *images.shape[1:]) and model.get_layer("image")
np.savez(sys.argv[2], **found)
assert "cifar_jax" not in sys.modules
"""

TORCH = """
import importlib.util, runpy, sys, warnings
from pathlib import Path
import numpy as np
warnings.simplefilter("ignore")
import torch
sys.path.insert(0, sys.argv[1])
from parity.torch_networks import declare_operators
library = declare_operators(torch)
found = {}
for name in sys.argv[3:]:
    spec = importlib.util.spec_from_file_location("model", f"{name}/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.load()
    assert not model.training
    images = torch.from_numpy(np.load(f"{name}.npy")).permute(0, 3, 1, 2)
    with torch.inference_mode():
        found[name] = model(images).numpy()
        assert torch.equal(model(images.float()), model(images))
        assert torch.allclose(model.logits(images).softmax(-1), model(images))
        assert model.features(images).shape == (len(images), model.config["head"][0])
        side = images.shape[-1]
        for run in (model, model.logits, model.features):
            for wrong in (images.repeat(1, 1, 2, 2), images[:, :1], images[0]):
                try:
                    run(wrong)
                except ValueError as error:
                    assert str(error) == f"images must be [N, 3, {side}, {side}], got {list(wrong.shape)}", error
                else:
                    raise AssertionError(wrong.shape)
    for path in Path().glob("photo.*"):
        found[f"{name} {path}"] = module.read_photo(path, model.config["resize"]).permute(1, 2, 0).numpy()
np.savez(sys.argv[2], **found)
sys.argv = ["model.py", *sorted(map(str, Path().glob("photo.*")))]
runpy.run_path(f"{name}/model.py", run_name="__main__")
assert "cifar_jax" not in sys.modules
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, quick_compile: None) -> Iterator[Path]:
    """A directory for exports; skips the tests where a library is missing."""
    for name in ("keras", "torch", "torchvision"):
        if not any((Path(entry) / name).is_dir() for entry in sys.path):
            pytest.skip(f"{name} is not installed; `make parity` installs it")
    directory = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_HOME", str(directory / "home"))
        yield directory


def export(run: Run, name: str, work: Path, forms: tuple[str, ...] = ("keras", "pytorch")) -> None:
    """Exports a run as `name`, in each form."""
    for form in forms:
        about = export_run(run, form, work / f"{name}{ENDINGS[form]}")
        assert form == "pytorch" or about["checked"].startswith("largest difference of probabilities ")


def read_by(consumer: str, work: Path, names: list[str]) -> tuple[dict[str, np.ndarray], str]:
    """Runs exports on the images in `NAME.npy`; returns the results by name, and what was printed."""
    program, first = (KERAS, consumer) if CONSUMERS[consumer] == "keras" else (TORCH, str(TESTS))
    out = work / f"{consumer}.npz"
    environment = os.environ | {"KERAS_BACKEND": consumer, "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-I", "-c", program, first, str(out), *names]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(out) as found:
        return dict(found), done.stdout


def probabilities_of(run: Run, images: np.ndarray) -> np.ndarray:
    """Probabilities as the run gives them."""
    return np.concatenate([values for _, values in run.probabilities(images)])


@pytest.fixture(scope="module")
def runs(work: Path) -> dict[str, Run]:
    """The runs, exported, with their images, and photos of odd sizes beside them, one of each kind."""
    made = {name: make() for name, make in RUNS.items()}
    for name, run in made.items():
        np.save(work / f"{name}.npy", drawn_images(9, run.resize.side))
        export(run, name, work)
    for kind, save in PHOTOS.items():
        save(work / f"photo.{kind}")
    return made


@pytest.fixture(scope="module")
def results(runs: dict[str, Run], work: Path) -> dict[str, tuple[dict[str, np.ndarray], str]]:
    """Results of all runs by consumer."""
    return {consumer: read_by(consumer, work, list(runs)) for consumer in CONSUMERS}


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("name", RUNS)
def test_probabilities_are_those_of_the_run(name, consumer, runs, results, work, record_property):
    expected = probabilities_of(runs[name], np.load(work / f"{name}.npy"))
    assert expected.std(axis=0).mean() > 0.01  # the network tells images apart
    found = results[consumer][0][name]
    assert found.dtype == np.float32 and found.shape == (9, len(CLASSES))
    difference = float(np.abs(found - expected).max())
    record_property("probabilities", difference)
    assert difference <= TOLERANCE


def test_python_of_the_documents_runs_as_it_stands(runs, work):
    """On exports of the names that docs/export.md gives them."""
    pets = drawn_run(TORCH_LIKE, 64)
    export_run(pets, "keras", work / "pets.keras")
    export_run(pets, "pytorch", work / "pets-pytorch")
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    programs = [block.text for block in blocks(page) if any(word in block.text for word in OF_PARITY)]
    assert len(programs) == 2
    declared = f"import sys; sys.path.insert(0, {str(TESTS)!r})\nimport torch\n"
    declared += "from parity.torch_networks import declare_operators\nlibrary = declare_operators(torch)\n"
    shown = "\nassert probabilities.shape == (1, 3)\nassert 'cifar_jax' not in sys.modules\n"
    environment = os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    for text in programs:
        program = (declared if "from model" in text else "import sys\n") + text + shown
        done = subprocess.run(
            [sys.executable, "-I", "-W", "ignore", "-c", program],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kind", PHOTOS)
def test_pytorch_reads_photos_as_the_run_does(kind, runs, results, work):
    for name, run in runs.items():
        expected = read_image(work / f"photo.{kind}", run.resize)
        assert expected.std() > 10  # neither black nor white
        np.testing.assert_array_equal(results["torch"][0][f"{name} photo.{kind}"], expected)


def test_pytorch_prints_the_top_classes_of_photos(runs, results, work):
    paths = sorted(work.glob("photo.*"))
    predicted = list(runs.values())[-1].predict(paths)
    for line, path, name in zip(results["torch"][1].splitlines(), paths, predicted.class_names, strict=True):
        assert line.startswith(f"{path.name}  {name} ") and line.count("%") == 3


def test_pytorch_says_what_it_is_given_and_what_it_cannot_read(runs, work, tmp_path):
    declared = f"import sys; sys.path.insert(0, {str(TESTS)!r})\nimport runpy, torch\n"
    declared += "from parity.torch_networks import declare_operators\nlibrary = declare_operators(torch)\n"
    program = declared + f"runpy.run_path({str(work / 'torch-unpadded' / 'model.py')!r}, run_name='__main__')"

    def run(*photos: str) -> tuple[int, str, str]:
        command = [sys.executable, "-I", "-W", "ignore", "-c", program, *photos]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    status, out, error = run()
    assert (status, out) == (2, "") and error.startswith("usage: ") and "PHOTO" in error
    (tmp_path / "notes.txt").write_text("no photo")
    (tmp_path / "cut.png").write_bytes((work / "photo.png").read_bytes()[:500])
    shutil.copy(work / "photo.png", tmp_path)
    status, out, error = run("missing.jpg", "notes.txt", "cut.png", "photo.png")
    missing, unknown, cut = error.splitlines()
    assert status == 1 and missing == "missing.jpg cannot be read as a photo: No such file or directory"
    assert unknown.startswith("notes.txt cannot be read") and cut.startswith("cut.png cannot be read")
    assert out.startswith("photo.png  ") and out.count("\n") == 1


@pytest.mark.parametrize("name", RUNS)
def test_keras_file_has_the_names_of_keras_applications_and_the_facts(name, runs, work):
    with zipfile.ZipFile(work / f"{name}.keras") as file:
        about = json.loads(file.read("cifar_jax.json"))
        layers = json.loads(file.read("config.json"))["config"]["layers"]
    run = runs[name]
    config = run.backbone.config
    kinds = {layer["config"]["name"]: layer["class_name"] for layer in layers}
    wanted = {path.partition("/")[0] for path in FAMILIES["keras"].name_map(config.stage_sizes).values()}
    assert wanted <= kinds.keys() and not any("Lambda" in kind for kind in kinds.values())
    assert next(iter(kinds)) == "image" and list(kinds)[-1] == "probabilities"
    assert {layer["module"] for layer in layers} == {"keras.layers"}  # no custom objects
    assert about["class_names"] == list(CLASSES) and about["resize"] == run.resize.to_json()
    assert about["network"] == json.loads(json.dumps(asdict(config))) and about["preprocessing"]["channels"] == "rgb"
    epsilons = {layer["config"]["epsilon"] for layer in layers if layer["class_name"] == "BatchNormalization"}
    assert epsilons == {config.bn_epsilon}


def test_file_that_differs_from_the_run_is_not_kept(runs, work, tmp_path):
    run = runs["torch-unpadded"]
    no_numbers = jax.tree.map(lambda leaf: leaf * np.nan, run.head_params)
    with pytest.raises(RunError, match=r"probabilities by up to .*; nothing was kept\. Please report this\.$"):
        export_run(replace(run, head_params=no_numbers), "keras", tmp_path / "model.keras")
    assert files_below(tmp_path) == []


def test_command_shows_no_logs_and_no_bars(runs, tmp_path):
    """TensorFlow and Keras say nothing in a process where neither is imported yet, as on the command line."""
    program = (
        "import sys; from untrained_runs import *; from cifar_jax.export.write import export_run; "
        f"export_run(drawn_run(TORCH_LIKE, 32), 'keras', {str(tmp_path / 'model.keras')!r}); print('done')"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KERAS_BACKEND", "TF_"))}
    environment |= {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_labels_of_cifar10_are_those_of_the_run(work: Path, cifar10: Splits, record_property):
    """A thousand test images, upsampled to 64, through the demo backbone."""
    images, name = np.ascontiguousarray(cifar10.test.images[:1000]), "cifar10"
    run = run_with(load_backbone("demo").replace(image_size=64), Resize("upsample", 32), (32,), cifar10.class_names)
    np.save(work / f"{name}.npy", images)
    export(run, name, work)
    expected = probabilities_of(run, images)
    assert len(np.unique(expected.argmax(axis=1))) > 2
    for consumer in CONSUMERS:
        found = read_by(consumer, work, [name])[0][name]
        np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))
        record_property(consumer, float(np.abs(found - expected).max()))
        assert np.abs(found - expected).max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("stride_in_1x1", [True, False], ids=["keras", "torch"])
def test_resnet50_at_224_pixels(stride_in_1x1, work: Path, record_property):
    config = ResNetConfig() if stride_in_1x1 else replace(ResNetConfig(), stride_in_1x1=False, conv_bias=False)
    run, name = drawn_run(config, 224, hidden=(64,), num=2), f"resnet50-{stride_in_1x1}"
    images = drawn_images(4, 224)[2:]
    np.save(work / f"{name}.npy", images)
    export(run, name, work)
    expected = probabilities_of(run, images)
    for consumer in CONSUMERS:
        difference = float(np.abs(read_by(consumer, work, [name])[0][name] - expected).max())
        record_property(consumer, difference)
        assert difference <= TOLERANCE
    if stride_in_1x1:  # its first kernel is not in the order of Keras's own networks, so it is no file of weights
        with pytest.raises(WeightsError, match="unexpected tensors: dense1/bias"):
            load_backbone(work / f"{name}.keras")
