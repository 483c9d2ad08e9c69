"""Facts about one data set, and a contact sheet of it."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cifar_jax.data.dataset import Splits
from cifar_jax.data.describe import class_warnings, original_sizes, range_words, shared_warning, split_words
from cifar_jax.data.load import TAKES, check_name, load_splits
from cifar_jax.data.pictures import Pictures
from cifar_jax.data.resize import choose_resize
from cifar_jax.data.sources.tfds import prepared_names
from cifar_jax.errors import UserError, did_you_mean
from cifar_jax.models.preprocess import EvalTransform
from cifar_jax.report.plots import SHEET_SIDE, plot_contact_sheet, save_figure

IMAGE_SIZE = 224  # of the network that the facts are about
NAMES = {"train": "training", "val": "validation", "test": "test"}
MOST_ROWS, SHOWN = 30, 5  # classes that are all listed, and how many of the largest and of the smallest otherwise
SHEET_CLASSES, SHEET_IMAGES = 10, 8


class About(NamedTuple):
    """Facts about a data set.

    Attributes:
      facts: JSON values by name, `classes` aside.
      counts: number of images by class and split.
      warnings: sentences on what may be wrong with it.
    """

    facts: dict[str, Any]
    counts: dict[str, dict[str, int]]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """The facts, the counts and the warnings as JSON values."""
        return self.facts | {"classes": self.counts, "warnings": self.warnings}

    def lines(self) -> dict[str, str]:
        """The facts in words, by name."""
        facts = self.facts
        return {
            "data": f"{facts['name']} {facts['version']}".strip(),
            "classes": f"{len(self.counts):,}",
            "images": split_words(facts["images"]),
            "sizes": facts["sizes"],
            f"at {IMAGE_SIZE} pixels": facts["resize"],
            **({"notes": "; ".join(facts["notes"])} if facts["notes"] else {}),
        }

    def table(self) -> list[dict[str, Any]]:
        """A row for each class, or of many classes for the largest and the smallest."""
        in_order: Iterable[tuple[str, dict[str, int]]] = self.counts.items()
        if len(self.counts) > MOST_ROWS:
            in_order = sorted(in_order, key=lambda item: -item[1]["training"])
        rows: list[dict[str, Any]] = [{"class": name, **counts} for name, counts in in_order]
        if len(rows) <= MOST_ROWS:
            return rows
        between = {"class": f"... {len(rows) - 2 * SHOWN:,} more", **dict.fromkeys(list(rows[0])[1:], "")}
        return [*rows[:SHOWN], between, *rows[-SHOWN:]]


def load(name: str, topics: tuple[str, ...], **options: Any) -> Splits:
    """Loads a data set that `info` was given the name of; `options` are those of `load_splits`.

    Raises:
      UserError: if there is no such topic or data set, or it cannot be loaded.
    """
    path, data_dir = os.path.expanduser(name), options["data_dir"]
    try:
        check_name(name, data_dir)
    except UserError as error:
        if os.path.isdir(path) or any(one.startswith(f"{name}/") for one in prepared_names(data_dir)):
            raise  # a data set that is not as it should be
        problem = f"There is no topic or data set {name!r}.{did_you_mean(name, [*topics, 'shapes', 'cifar10'])}"
        if os.path.isfile(path):
            problem = f"{name} is a file, but not an .npz file."
        raise UserError(f"{problem} info takes {', '.join(topics)}, or a data set: {TAKES}.") from error
    return load_splits(name, **options)


def describe(splits: Splits) -> About:
    """Collects the facts about a data set."""
    parts = {split: splits.parts[split] for split in NAMES if split in splits.parts}
    counts = {
        NAMES[split]: np.bincount(part.labels, minlength=len(splits.class_names)) for split, part in parts.items()
    }
    sizes = original_sizes(parts)
    facts = {
        "name": splits.name,
        "version": splits.version,
        "images": {name: int(by_class.sum()) for name, by_class in counts.items()},
        "sizes": range_words(sizes),
        "resize": choose_resize("auto", "auto", sizes, IMAGE_SIZE, EvalTransform()).words(IMAGE_SIZE),
        "notes": list(splits.notes),
    }
    by_class = {
        class_name: {name: int(found[label]) for name, found in counts.items()}
        for label, class_name in enumerate(splits.class_names)
    }
    shared = [shared_warning(splits.train, part, NAMES[split]) for split, part in parts.items() if split != "train"]
    warnings = class_warnings(np.asarray(splits.train.labels), splits.class_names)
    return About(facts, by_class, [*filter(None, shared), *warnings])


def write_contact_sheet(splits: Splits, path: Path, seed: int) -> None:
    """Writes a contact sheet of random training images of up to ten classes as a PNG, which replaces any file.

    Raises:
      ImageError: if a picture cannot be read.
      OSError: if the file cannot be written.
    """
    save_figure(plot_contact_sheet(dict(_sheet_rows(splits, seed))), path)


def _sheet_rows(splits: Splits, seed: int) -> Iterator[tuple[str, list[UInt8[np.ndarray, "h w 3"]]]]:
    """Yields names and images of random classes."""
    rng, labels = np.random.default_rng(seed), np.asarray(splits.train.labels)
    present = np.unique(labels)
    for label in np.sort(rng.permutation(present)[:SHEET_CLASSES]).tolist():
        rows = rng.permutation(np.flatnonzero(labels == label))[:SHEET_IMAGES]
        yield splits.class_names[label], [_pixels(splits.train.images, int(row)) for row in rows]


def _pixels(images: Any, row: int) -> UInt8[np.ndarray, "h w 3"]:
    """One whole image, reduced to the size of a tile."""
    if not isinstance(images, Pictures):
        return np.asarray(images[row])
    picture = images.read(int(images.rows[row]))
    picture.thumbnail((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(picture)
