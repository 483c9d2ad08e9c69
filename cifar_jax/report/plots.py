"""Figures: samples, curves, predictions and the confusion matrix of a training run; contact sheets of data sets.

Every `plot_*` function returns a new `matplotlib.figure.Figure` without pyplot and without changing matplotlib's global
settings; `save_figure` writes one to disk. Images are uint8 [n, height, width, 3], labels are class indices [n]. Font
sizes are in points, figure sizes in inches, other lengths in pixels at `DPI`.
"""

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from jaxtyping import Float, Integer, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator
from PIL import Image

from cifar_jax.files import replacing

DPI, SAMPLE_COLUMNS, PREDICTION_COLUMNS = 160, 10, 8
SHEET_SIDE, SHEET_GAP, SHEET_NAME = 128, 8, 32  # of a contact sheet; the last is a number of characters
TILE_NAME = 20  # characters of a class name above an image
SHEET_GREY = 235  # shows where an image ends
FONT, TEXT, SMALL = "DejaVu Sans", 8, 7  # a font that ships with matplotlib, so that figures look the same everywhere
INK, RIGHT, WRONG = "#222222", "#1b7837", "#b2182b"
TRAINING, VALIDATION = "#0072b2", "#d55e00"  # from Okabe and Ito's colour-blind safe palette
HISTORY_KEYS = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
STYLE: dict[str, Any] = {
    **{"font.family": FONT, "font.size": TEXT, "axes.titlesize": TEXT, "axes.linewidth": 0.6},
    **{"xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "axes.formatter.useoffset": False},
    **{f"{key}color": INK for key in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.")},
    "text.parse_math": False,  # a "$" in a class name is a dollar sign
}
Tile = tuple[UInt8[np.ndarray, "height width 3"], str, str]  # an image, the text above it, the text's colour


@contextmanager
def _paper_style() -> Iterator[None]:
    """Applies matplotlib's defaults and `STYLE`, so that the user's matplotlib settings do not change a figure."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def short(name: str, most: int = SHEET_NAME) -> str:
    """A class name, cut off where it would make a figure too wide."""
    return name if len(name) <= most else f"{name[: most - 3]}..."


def sample_rows(labels: Integer[np.ndarray, " n"]) -> Integer[np.ndarray, " m"]:
    """The rows that `plot_samples` shows: the first of every class, then the second of every class, and so on."""
    seen: defaultdict[int, Iterator[int]] = defaultdict(count)
    rank = np.array([next(seen[label]) for label in labels.tolist()])
    return np.lexsort((labels, rank))[: 2 * SAMPLE_COLUMNS]


@_paper_style()
def plot_samples(
    train_images: UInt8[np.ndarray, "train height width 3"],
    train_labels: Integer[np.ndarray, " train"],
    val_images: UInt8[np.ndarray, "val height width 3"],
    val_labels: Integer[np.ndarray, " val"],
    class_names: Sequence[str],
    val_name: str = "validation",
) -> Figure:
    """Draws up to two rows each of training and validation images, titled with their classes.

    The first image of every class comes first, in class order, then the second of every class, and so on.

    Raises:
      ValueError: if a split is empty or has the wrong shape, or a label has no name.
    """
    blocks: list[list[Tile]] = []
    for images, labels in ((train_images, train_labels), (val_images, val_labels)):
        _check_examples(images, labels, class_names)
        blocks.append([(images[i], short(class_names[labels[i]], TILE_NAME), INK) for i in sample_rows(labels)])
    figure, split = _draw_grid(blocks, SAMPLE_COLUMNS, side=96, left=36, top=0), len(blocks[0])
    for name, panels in (("training", figure.axes[:split]), (val_name, figure.axes[split:])):
        middle = (panels[0].get_position().y1 + panels[-1].get_position().y0) / 2
        figure.text(16 / figure.bbox.width, middle, name, rotation=90, ha="center", va="center")
    return figure


@_paper_style()
def plot_curves(history: Sequence[Mapping[str, float]], val_name: str = "validation") -> Figure:
    """Draws loss, and accuracy in percent, over the epochs, with the final values in the legends.

    Args:
      history: one mapping per epoch with `HISTORY_KEYS`; epochs increase, accuracies are fractions.
      val_name: name of the validation split in the legend.

    Raises:
      ValueError: if there is no epoch, a key is missing, or the epochs do not increase.
    """
    if missing := {key for row in history for key in HISTORY_KEYS if key not in row}:
        raise ValueError(f"The history lacks {', '.join(sorted(missing))}.")
    epochs = [row["epoch"] for row in history]
    if not epochs or sorted(set(epochs)) != epochs:
        raise ValueError("The history must have at least one epoch, and its epochs must increase.")
    figure = Figure(figsize=(6.8, 2.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})
    size = 4 if len(epochs) <= 30 else 2
    splits = (("train", "training", TRAINING, "o-"), ("val", val_name, VALIDATION, "s-"))
    measures = (("loss", "Loss", 1, "{:.3f}"), ("accuracy", "Accuracy (%)", 100, "{:.1f}%"))
    for panel, (measure, title, scale, form) in zip(panels, measures, strict=True):
        for split, name, colour, line in splits:
            values = [scale * row[f"{split}_{measure}"] for row in history]
            label = f"{name} {form.format(values[-1])}"
            panel.plot(epochs, values, line, color=colour, linewidth=1.2, markersize=size, label=label)
        panel.set(xlabel="Epoch", ylabel=title, xlim=(epochs[0] - 0.9, epochs[-1] + 0.9))
        panel.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        panel.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        columns = 2 if len(val_name) <= 12 else 1
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, borderpad=0)
    note = f"training: running mean over each epoch, as Keras reports it; {val_name}: after each epoch"
    figure.supxlabel(f"{note}; numbers: last epoch", fontsize=SMALL)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # saving must not change the layout
    return figure


@_paper_style()
def plot_predictions(
    images: UInt8[np.ndarray, "n height width 3"],
    labels: Integer[np.ndarray, " n"],
    probs: Float[np.ndarray, "n classes"],
    class_names: Sequence[str],
    split: str = "",
) -> Figure:
    """Draws images, each titled with its predicted class and that class's probability.

    Correct predictions are green and ticked; wrong ones are red and crossed, and name the true class. The title of the
    figure names the split.

    Raises:
      ValueError: if there is no image, shapes disagree, or a label has no name.
    """
    _check_examples(images, labels, class_names)
    if probs.shape != (len(images), len(class_names)):
        raise ValueError(f"probs must have shape {[len(images), len(class_names)]}, got {list(probs.shape)}.")
    tiles: list[Tile] = []
    names = [short(name, TILE_NAME) for name in class_names]
    for image, label, prob in zip(images, labels, probs, strict=True):
        predicted = prob.argmax()
        answer, truth = f"{names[predicted]} {prob[predicted]:.0%}", f"true: {names[label]}"
        right = predicted == label
        tiles.append((image, f"✓ {answer}" if right else f"✗ {answer}\n{truth}", RIGHT if right else WRONG))
    figure = _draw_grid([tiles], PREDICTION_COLUMNS, side=128, left=8, top=32)
    title = f"{sum(colour == RIGHT for _, _, colour in tiles)} of {len(tiles)} {_images_of(split)} right"
    figure.text(0.5, 1 - 20 / figure.bbox.height, title, ha="center", va="center")
    return figure


@_paper_style()
def plot_confusion(
    confusion: Integer[np.ndarray, "classes classes"], class_names: Sequence[str], split: str = ""
) -> Figure:
    """Draws a confusion matrix [true class, predicted class], shaded by share of the true class, and class accuracies.

    The title names the split. If the cells are too small, counts are left out and only some ticks labelled.

    Raises:
      ValueError: if the matrix does not match the names, has a negative count or is all zero.
    """
    classes = len(class_names)
    if confusion.shape != (classes, classes) or confusion.min(initial=0) < 0 or not confusion.any():
        raise ValueError(
            f"confusion must be {[classes, classes]} counts for {classes} class names, none negative and not all 0."
        )
    side, longest = min(max(66 * classes, 330), 726), ceil(max(map(_width, class_names)))
    left, top, step = longest + 60, 44, ceil(24 * classes / side)
    figure = Figure(((left + side + 320) / DPI, (top + side + ceil(0.72 * longest) + 70) / DPI), DPI)
    examples = confusion.sum(axis=1)
    shares = 100 * confusion / np.maximum(examples, 1)[:, None]
    matrix = _place_axes(figure, left, top, side, side)
    # The square root scale makes confusions of a few percent visible.
    shading = matrix.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    if _width(str(confusion.max())) < 0.9 * side / classes:
        _write_counts(matrix, confusion, shading.to_rgba(shares))
    labelled = range(0, classes, step)
    matrix.set_xticks(labelled, class_names[::step], rotation=45, ha="right", rotation_mode="anchor")
    matrix.set_yticks(labelled, class_names[::step])
    right, total = int(confusion.trace()), int(confusion.sum())
    title = f"Accuracy {right / total:.2%} ({right:,} of {total:,} {_images_of(split)})"
    matrix.set(xlabel="Predicted class", ylabel="True class", title=title)
    bars = _place_axes(figure, left + side + 18, top, 108, side)
    bars.barh(range(classes), shares.diagonal(), color="#6baed6", height=0.6)
    accuracies = [f"{shares[i, i]:.1f}" if examples[i] else "n/a" for i in labelled]
    bars.set_yticks(labelled, accuracies)
    bars.yaxis.tick_right()
    bars.set(xlim=(0, 100), ylim=matrix.get_ylim(), xlabel="Accuracy (%)")
    scale, ticks = _place_axes(figure, left + side + 210, top, 18, side), [0, 1, 5, 10, 25, 50, 75, 100]
    figure.colorbar(shading, cax=scale, label="Share of the true class (%)", ticks=ticks)
    return figure


@_paper_style()
def plot_contact_sheet(rows: Mapping[str, Sequence[UInt8[np.ndarray, "height width 3"]]]) -> Figure:
    """Draws images of any size in a row for each class, whose name is at the left; no image is cropped.

    Args:
      rows: images by class name.

    Raises:
      ValueError: if there are no images.
    """
    columns = max(map(len, rows.values()), default=0)
    if not columns:
        raise ValueError("A contact sheet needs at least one image.")
    pitch = SHEET_SIDE + SHEET_GAP
    names = list(map(short, rows))
    left = ceil(max(map(_width, names))) + 3 * SHEET_GAP
    width, height = columns * pitch - SHEET_GAP, len(rows) * pitch - SHEET_GAP
    sheet = np.full((height, width, 3), 255, np.uint8)
    for row, images in enumerate(rows.values()):
        for column, image in enumerate(images):
            top, start = row * pitch, column * pitch
            sheet[top : top + SHEET_SIDE, start : start + SHEET_SIDE] = _letterboxed(image, SHEET_SIDE)
    figure = Figure(((left + width + SHEET_GAP) / DPI, (height + 2 * SHEET_GAP) / DPI), DPI)
    panel = _place_axes(figure, left, SHEET_GAP, width, height)
    panel.imshow(sheet, interpolation="nearest", aspect="auto")
    panel.set_axis_off()
    for row, name in enumerate(names):
        middle = 1 - (SHEET_GAP + row * pitch + SHEET_SIDE / 2) / figure.bbox.height
        x = (left - SHEET_GAP) / figure.bbox.width
        figure.text(x, middle, name, ha="right", va="center", fontsize=SMALL)
    return figure


@_paper_style()
def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure atomically as a PNG; the same figure gives the same bytes.

    Raises:
      OSError: if it cannot be written; an existing file is then left as it was.
    """
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    with replacing(path) as temporary:
        temporary.write_bytes(png.getvalue())


def _check_examples(images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or len(images) == 0:
        raise ValueError(f"images must be non-empty uint8 [n, h, w, 3], got {images.dtype} {list(images.shape)}.")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must have shape [{len(images)}] for {len(images)} images, got {list(labels.shape)}.")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise ValueError(
            f"labels must be in 0..{len(class_names) - 1}, as there are {len(class_names)} class names, got "
            f"{labels.min()} to {labels.max()}."
        )


def _images_of(split: str) -> str:
    return f"{split} images".strip()


def _width(text: str) -> float:
    """Returns the width of the text's widest line at size `SMALL`."""
    font = FontProperties(family=FONT, size=SMALL)
    lines = (text_to_path.get_text_width_height_descent(line, font, False) for line in text.split("\n"))
    return max(float(width) for width, _, _ in lines) * DPI / 72


def _place_axes(figure: Figure, left: int, top: int, width: int, height: int) -> Axes:
    across, up = figure.bbox.width, figure.bbox.height
    return figure.add_axes((left / across, 1 - (top + height) / up, width / across, height / up))


def _shrunk(image: UInt8[np.ndarray, "height width 3"], side: int) -> UInt8[np.ndarray, "height width 3"]:
    """Reduces an image that is larger than a tile."""
    if max(image.shape) <= side:
        return image
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _letterboxed(image: UInt8[np.ndarray, "height width 3"], side: int) -> UInt8[np.ndarray, "side side 3"]:
    """Fits a whole image into a grey square: reduced, or enlarged by an integer factor."""
    small = _shrunk(image, side)
    factor = max(1, side // max(small.shape))
    shown = small.repeat(factor, axis=0).repeat(factor, axis=1)
    square = np.full((side, side, 3), SHEET_GREY, np.uint8)
    top, left = ((side - length) // 2 for length in shown.shape[:2])
    square[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
    return square


def _draw_grid(blocks: list[list[Tile]], columns: int, side: int, left: int, top: int) -> Figure:
    """Draws blocks of tiles in rows; images are enlarged to about `side` by an integer factor to keep them crisp."""
    blocks = [[(_shrunk(image, side), text, colour) for image, text, colour in block] for block in blocks]
    image, texts = blocks[0][0][0], [text for block in blocks for _, text, _ in block]
    height, width = (size * max(1, side // max(image.shape)) for size in image.shape[:2])
    across = ceil(max(width, *map(_width, texts))) + 10
    up = height + 19 * (max(text.count("\n") for text in texts) + 1) + 10
    rows = [ceil(len(block) / columns) for block in blocks]
    total_width = left + across * min(columns, max(map(len, blocks))) + 8
    figure = Figure((total_width / DPI, (top + up * sum(rows) + 16 * len(rows) - 8) / DPI), DPI)
    for block, row_count in zip(blocks, rows, strict=True):
        for i, (image, text, colour) in enumerate(block):
            x = left + across * (i % columns) + (across - width) // 2
            panel = _place_axes(figure, x, top + up * (i // columns + 1) - height, width, height)
            panel.imshow(image, interpolation="nearest", aspect="auto")
            panel.set_title(text, color=colour, fontsize=SMALL, pad=2)
            panel.set_axis_off()
        top += up * row_count + 16
    return figure


def _write_counts(matrix: Axes, counts: np.ndarray, colours: np.ndarray) -> None:
    for (true, predicted), number in np.ndenumerate(counts):
        luminance = np.dot(colours[true, predicted, :3], (0.2126, 0.7152, 0.0722))
        colour = "white" if luminance < 0.5 else INK
        matrix.text(predicted, true, str(number), color=colour, fontsize=SMALL, ha="center", va="center")
