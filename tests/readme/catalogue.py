"""Which commands of the documents are not typed and why, which need data, and what holds after the others."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from readme.newcomer import Typed
from readme.supplies import ROOT

DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "weights" / "README.md",
]

IN_CI = "makes an environment of its own; .ci/run runs it"
LONG = "makes an environment of its own and takes long"
PLACEHOLDER = "a form to fill in"
NOT_TYPED = {
    "make demo": IN_CI,
    "make test": IN_CI,
    "make test-robustness": IN_CI,
    "make parity": IN_CI,
    "make parity-all": LONG,
    "make bench": LONG,
    "make torture": LONG,
    "make mutations": LONG,
    "make tpu-report": LONG,
    "make demo-weights": "takes two hours and CIFAR-100",
    "python -m tests.robustness.torture --kills 100": "`make torture`, which takes a quarter of an hour",
    "CIFAR_JAX_MUTATIONS=1000 python -m pytest tests/robustness/test_mutations.py": "`make mutations`, with fewer",
    "python -m benchmarks.stages": "measures for minutes",
    "CIFAR_JAX_DISTRIBUTED=1 srun python train.py": "needs SLURM",
    "python -m cifar_jax": "the name of the command; test_module_is_the_command types one",
    "cifar-jax COMMAND --help": PLACEHOLDER,
    "cifar-jax verify-weights FILE --against keras": "needs Keras; tests/parity has it",
    "cifar-jax export runs/pets --format keras --out pets.keras": "needs Keras; tests/parity has it",
    "python model.py photo.jpg": "needs PyTorch; tests/parity has it",
    "python -m benchmarks.exports RUN...": PLACEHOLDER,
    "make test-browser": IN_CI,
}
# Words of Python blocks that need what `make parity` installs; tests/parity/test_export.py runs them.
OF_PARITY = ("import keras", "from model import")

RUN_FILES = ("config.json", "metrics.jsonl", "summary.json", "samples.png", "curves.png", "predictions.png")
RUN_FILES += ("confusion.png", "checkpoints")
# Of `train`: what needs neither CIFAR-10 nor Keras's weights.
_NEEDS_NOTHING = re.compile(r"--preset demo|--help|runs/first/config\.json|--dataset pets --weights demo")


def is_train(text: str) -> bool:
    """Whether a command trains."""
    return bool(re.search(r"train\.py|(?:cifar-jax|cifar_jax) train", text)) and "--help" not in text


def needs_downloads(text: str) -> bool:
    """Whether a command needs what a newcomer does not have without a network."""
    return "features cifar10" in text or (is_train(text) and not _NEEDS_NOTHING.search(text))


def runs_in(directory: Path) -> set[Path]:
    """The run directories below one."""
    return {path.parent for path in directory.glob("runs/*/summary.json")}


def check_promises(text: str, typed: Typed, directory: Path, before: set[Path]) -> None:
    """What the documents say a command leaves is there.

    Args:
      text: of the command.
      typed: what came of it.
      directory: it was typed in.
      before: the runs that were there before it.
    """
    assert typed.code == 0 and "Traceback" not in typed.err, typed
    if is_train(text):
        (run,) = runs_in(directory) - before
        assert all((run / name).exists() for name in RUN_FILES), sorted(run.iterdir())
        assert json.loads((run / "summary.json").read_text())["status"] == "complete"
    if found := re.search(r"--out (\S+)", text):
        assert (directory / found[1]).exists()
    for pattern, holds in _PROMISES.items():
        if re.search(pattern, text):
            assert holds(typed, directory), (text, typed)


def _accuracy_again(typed: Typed, directory: Path) -> bool:
    summary = json.loads((directory / "runs" / "first" / "summary.json").read_text())
    return f"{100 * summary['val_accuracy']:.1f} % on " in typed.out


def _a_row_for_each_class(typed: Typed, directory: Path) -> bool:
    summary = json.loads((directory / "runs" / "first" / "summary.json").read_text())
    return set(summary["dataset"]["class_names"]) <= set(json.loads(typed.out.splitlines()[0])["probabilities"])


def _all_probabilities(typed: Typed, directory: Path) -> bool:
    written = typed.out or (directory / "predictions.csv").read_text(encoding="utf-8")
    (row, *_) = csv.DictReader(io.StringIO(written))
    return row["path"].endswith(".jpg") and len(row) == 4 + 10


def _pets_on_holiday(_: Typed, directory: Path) -> bool:
    rows = list(csv.DictReader(io.StringIO((directory / "holiday.csv").read_text(encoding="utf-8"))))
    return len(rows) == 3 and list(rows[0])[4:] == ["cats", "dogs"]


def _three_classes(typed: Typed, directory: Path) -> bool:
    summary = json.loads((directory / "runs" / "first" / "summary.json").read_text())
    return sum(name in typed.out for name in summary["dataset"]["class_names"]) == 3


def _data_set_features(_: Typed, directory: Path) -> bool:
    with np.load(directory / "features.npz") as file:
        return file["train_features"].shape == (80, 2048) and file["test_features"].shape == (20, 2048)


_PROMISES: dict[str, Callable[[Typed, Path], bool]] = {
    r"^pip install": lambda typed, _: True,
    r"--help": lambda typed, _: "--preset" in typed.out and "--resume" in typed.out,
    r" evaluate runs/first\s*(#|$)": _accuracy_again,
    r" evaluate runs/first --dataset": lambda typed, _: "% on 10,000 images" in typed.out,
    r" predict runs/first \S+\s*(#|$)": _three_classes,
    r" predict runs/first .*--json": _a_row_for_each_class,
    r" predict runs/first .*--csv": _all_probabilities,
    r" info pets": lambda typed, directory: "cats" in typed.out and (directory / "pets-contact-sheet.png").exists(),
    r" predict runs/pets": _pets_on_holiday,
    r" evaluate runs/pets": lambda typed, _: "% on 24 images" in typed.out,
    r" predict pets\.onnx holiday": lambda typed, _: len(typed.out.splitlines()) == 3 and "cats" in typed.out,
    r" predict pets\.onnx photo\.jpg": lambda typed, _: "cats" in typed.out,
    r" evaluate pets\.onnx": lambda typed, _: "% on " in typed.out,
    r" export .*--format (onnx|stablehlo)": lambda typed, _: "largest difference of probabilities" in typed.out,
    r" features cifar10": _data_set_features,
    r" features photo\.jpg": lambda _, directory: np.load(directory / "photo.npy").shape == (1, 512),
    r" verify-weights": lambda typed, _: "conv1_conv" in typed.out,
    r" convert model\.h5": lambda _, directory: (directory / "model.safetensors").stat().st_size > 9e7,
    r"^python examples/": lambda typed, directory: (directory / typed.out.split()[-1] / "summary.json").exists(),
    r" info$": lambda typed, _: "keras-resnet50" in typed.out and "cifar10" in typed.out,
    r" info weights": lambda typed, _: "keras-resnet50" in typed.out,
    r" info devices": lambda typed, _: "cpu" in typed.out or "gpu" in typed.out,
    r" info cache$": lambda typed, _: "features" in typed.out,
}
