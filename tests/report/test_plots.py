"""Tests of the figures: their content, that nothing is cut off or overlaps, and how they are saved."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from helpers import ROOT, full_disk
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from cifar_jax.report import plots

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def make_images(count: int, height: int = 32, width: int = 32) -> UInt8[np.ndarray, "n height width 3"]:
    """Draws noise, different in each image."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def make_labels(count: int, classes: int = 10) -> Int[np.ndarray, " n"]:
    """Draws class indices."""
    return np.random.default_rng(1).integers(0, classes, count, dtype=np.int32)


def make_probs(count: int, classes: int = 10) -> Float[np.ndarray, "n classes"]:
    """Draws probabilities that sum to one."""
    return np.random.default_rng(2).dirichlet(np.full(classes, 0.3), count).astype(np.float32)


def make_history(epochs: int) -> list[dict[str, float]]:
    """Returns distinct falling losses and rising accuracies."""
    return [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "train_accuracy": 0.9 - 0.5 / epoch,
            "val_loss": 0.1 + 1 / epoch,
            "val_accuracy": 0.8 - 0.4 / epoch,
        }
        for epoch in range(1, epochs + 1)
    ]


def make_confusion(classes: int, examples: int = 10_000) -> Int[np.ndarray, "classes classes"]:
    """Draws a confusion matrix in which nine in ten predictions are right."""
    rng = np.random.default_rng(3)
    true = rng.integers(0, classes, examples)
    predicted = np.where(rng.random(examples) < 0.9, true, rng.integers(0, classes, examples))
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (true, predicted), 1)
    return confusion


FIGURES: dict[str, Callable[[], Figure]] = {
    "samples": lambda: plots.plot_samples(make_images(90), make_labels(90), make_images(80), make_labels(80), NAMES),
    "samples of one image": lambda: plots.plot_samples(
        make_images(1), np.array([1]), make_images(1), np.array([1]), NAMES
    ),
    "curves of 1 epoch": lambda: plots.plot_curves(make_history(1)),
    "curves of 90 epochs with a long name": lambda: plots.plot_curves(make_history(90), "the CIFAR-10 test split"),
    "predictions": lambda: plots.plot_predictions(make_images(32), make_labels(32), make_probs(32), NAMES),
    "predictions with long names": lambda: plots.plot_predictions(
        make_images(9), make_labels(9), make_probs(9), [f"an elaborate $name$ for a {name}" for name in NAMES]
    ),
    "confusion of 2 classes": lambda: plots.plot_confusion(make_confusion(2), ["circle", "square"]),
    "confusion of 10 classes": lambda: plots.plot_confusion(make_confusion(10), NAMES),
    "confusion of 100 classes": lambda: plots.plot_confusion(
        make_confusion(100), [f"{name} number {i}" for i in range(10) for name in NAMES]
    ),
}


def render(figure: Figure) -> UInt8[np.ndarray, "height width 4"]:
    """Rasterises a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())


def shown_labels(axes: Axes) -> list[Text]:
    """Return the labels of both axes and of those ticks that lie within the limits."""
    labels: list[Text] = []
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        ticks = [tick for tick in axis.get_major_ticks() if min(limits) <= tick.get_loc() <= max(limits)]
        labels += [axis.label, *(text for tick in ticks for text in (tick.label1, tick.label2))]
    return [text for text in labels if text.get_visible()]


def accuracy_bars(figure: Figure) -> tuple[Axes, list[float]]:
    """Return the panel of accuracies and the lengths of its bars."""
    axes = next(axes for axes in figure.axes if axes.get_xlabel() == "Accuracy (%)")
    return axes, [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)]


def assert_apart(texts: Sequence[Text]) -> None:
    """Fail if the boxes of two texts overlap."""
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    for i, box in enumerate(boxes):
        assert box.count_overlaps(boxes[i + 1 :]) == 0, texts[i]


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off_and_texts_do_not_overlap(name: str) -> None:
    figure = FIGURES[name]()
    render(figure)
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [axes.title, *axes.texts]
        texts += [text for text in shown_labels(axes) if axes.axison and text.get_rotation() in (0, 90)]
    assert_apart(texts)


@pytest.mark.parametrize("name", ["samples of one image", "curves of 1 epoch", "confusion of 2 classes"])
def test_same_figure_gives_same_bytes_whatever_the_users_settings_are(name: str, tmp_path: Path) -> None:
    plots.save_figure(FIGURES[name](), tmp_path / "first.png")
    with matplotlib.rc_context():
        matplotlib.rcParams.update({"font.size": 20, "font.family": "serif", "axes.grid": True})
        matplotlib.rcParams.update({"savefig.bbox": "tight", "savefig.facecolor": "black", "figure.dpi": 50})
        # Reading the backend would select one, which the test below checks.
        before = {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
        plots.save_figure(FIGURES[name](), tmp_path / "configured.png")
        assert {key: matplotlib.rcParams[key] for key in before} == before
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "configured.png").read_bytes()


def test_pyplot_is_not_imported(tmp_path: Path) -> None:
    """Importing, drawing and saving do not import pyplot, which selects a backend for the whole program."""
    code = """
import sys, pathlib, numpy as np
from cifar_jax.report import plots
plots.save_figure(plots.plot_confusion(np.eye(2, dtype=int), ["circle", "square"]), pathlib.Path(sys.argv[1]))
sys.exit("matplotlib.pyplot" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "figure.png")]
    subprocess.run(command, check=True, cwd=ROOT)


@pytest.mark.parametrize("size", [(32, 32), (28, 20), (128, 100)])
def test_images_are_enlarged_by_whole_pixels(size: tuple[int, int]) -> None:
    """Each pixel of an image becomes a square of its exact colour."""
    images = make_images(12, *size)
    zoom = max(1, 128 // max(size))
    figure = plots.plot_predictions(images, make_labels(12), make_probs(12), NAMES)
    pixels = render(figure)[::-1, :, :3]
    for axes, image in zip(figure.axes, images, strict=True):
        x0, y0, x1, y1 = np.round(axes.get_window_extent().extents).astype(int)
        enlarged = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
        np.testing.assert_array_equal(pixels[y0:y1, x0:x1][::-1], enlarged)


def test_large_images_are_shrunk_to_a_tile() -> None:
    figure = plots.plot_predictions(make_images(12, 300, 400), make_labels(12), make_probs(12), NAMES)
    extents = np.array([axes.get_window_extent().size for axes in figure.axes])
    np.testing.assert_allclose(extents, np.broadcast_to((128, 96), extents.shape), atol=1)


def test_samples_are_ordered_class_by_class() -> None:
    """The first image of every class comes first, then the second of every class, in at most two rows."""
    train_labels = np.array([2, 2, 0, 1, 0, 2, 1, 0, 1], np.int32)
    train, val = make_images(9), make_images(30)[:, ::-1]
    figure = plots.plot_samples(train, train_labels, val, np.arange(30), [*"abc", *map(str, range(27))], "test")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [*"abcabcabc", *"abc", *map(str, range(17))]
    expected = [*train[[2, 3, 0, 4, 6, 1, 7, 8, 5]], *val[:20]]
    for axes, image in zip(figure.axes, expected, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), image)
    assert [text.get_text() for text in figure.texts] == ["training", "test"]
    tops = [round(axes.get_position().y1, 6) for axes in figure.axes]
    assert tops == sorted(tops, reverse=True) and [tops.count(top) for top in dict.fromkeys(tops)] == [9, 10, 10]


@pytest.mark.parametrize(("epochs", "first"), [(1, 1), (4, 1), (90, 1), (5, 31)])
def test_curves_plot_the_history(epochs: int, first: int) -> None:
    """Lines are losses and percentages over whole epochs, and the legend shows the last values."""
    history = [{**row, "epoch": row["epoch"] + first - 1} for row in make_history(epochs)]
    figure = plots.plot_curves(history, "test")
    expected = {"Loss": ("loss", 1, "{:.3f}"), "Accuracy (%)": ("accuracy", 100, "{:.1f}%")}
    assert [axes.get_ylabel() for axes in figure.axes] == list(expected)
    for axes, (key, scale, form) in zip(figure.axes, expected.values(), strict=True):
        lines, legend = axes.get_lines(), axes.get_legend()
        for line, split, name in zip(lines, ("train", "val"), ("training", "test"), strict=True):
            values = [scale * row[f"{split}_{key}"] for row in history]
            np.testing.assert_array_equal(line.get_xdata(), np.arange(first, first + epochs))
            np.testing.assert_allclose(np.asarray(line.get_ydata(), float), np.asarray(values))
            assert line.get_label() == f"{name} {form.format(values[-1])}"
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == [line.get_label() for line in lines]
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert len(ticks) >= min(epochs, 4) and set(ticks) <= {row["epoch"] for row in history}


def test_diverged_history_is_drawn(tmp_path: Path) -> None:
    """Losses that are not finite leave a gap, and the legend says so."""
    history = make_history(4)
    history[-1].update(train_loss=np.nan, val_loss=np.inf)
    figure = plots.plot_curves(history)
    plots.save_figure(figure, tmp_path / "figure.png")
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["training nan", "validation inf"]


def test_predictions_mark_right_and_wrong() -> None:
    """Correct predictions are green and ticked, wrong ones red and crossed with the true class."""
    probs = np.array([[0.1, 0.9, 0], [0.25, 0.5, 0.25], [0.004, 0, 0.996]], np.float32)
    figure = plots.plot_predictions(make_images(3), np.array([1, 0, 2]), probs, ["cat", "dog", "emu"])
    assert [axes.get_title() for axes in figure.axes] == ["✓ dog 90%", "✗ dog 50%\ntrue: cat", "✓ emu 100%"]
    for axes, colour in zip(figure.axes, (plots.RIGHT, plots.WRONG, plots.RIGHT), strict=True):
        assert same_color(axes.title.get_color(), colour)
    assert [text.get_text() for text in figure.texts] == ["2 of 3 images right"]
    green, red = (matplotlib.colors.to_rgb(colour) for colour in (plots.RIGHT, plots.WRONG))
    assert max(green) == green[1] and max(red) == red[0]


def test_names_are_not_parsed_as_formulas() -> None:
    """Dollars in class names are drawn as dollars."""
    names = ["$10 notes", "$20 notes"]
    predictions = plots.plot_predictions(make_images(2), np.array([0, 1]), np.eye(2, dtype=np.float32), names)
    confusion = plots.plot_confusion(np.eye(2, dtype=int), names)
    matrix = next(axes for axes in confusion.axes if axes.images)
    named = [*(axes.title for axes in predictions.axes), *matrix.get_xticklabels(), *matrix.get_yticklabels()]
    assert len(named) == 6
    assert not any(text.get_parse_math() for text in named)


def test_confusion_shows_counts() -> None:
    """Cells show the counts, with true classes as rows, and the axes the classes and accuracies."""
    confusion = np.array([[90, 10, 0], [5, 15, 0], [0, 0, 0]])
    figure = plots.plot_confusion(confusion, ["cat", "dog", "emu"])
    matrix = next(axes for axes in figure.axes if axes.images)
    written = {text.get_position(): text.get_text() for text in matrix.texts}
    assert written == {(column, row): str(confusion[row, column]) for row in range(3) for column in range(3)}
    assert matrix.get_title() == "Accuracy 87.50% (105 of 120 images)"
    shares = np.asarray(matrix.images[0].get_array())
    np.testing.assert_allclose(shares, [[90, 10, 0], [25, 75, 0], [0, 0, 0]])
    for labels in (matrix.get_xticklabels(), matrix.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["cat", "dog", "emu"]
    bars, lengths = accuracy_bars(figure)
    assert [label.get_text() for label in bars.get_yticklabels()] == ["90.0", "75.0", "n/a"]
    assert lengths == [90, 75, 0]
    assert bars.get_ylim() == matrix.get_ylim()


def test_counts_contrast_with_their_cells() -> None:
    """Numbers are light on dark cells and dark on light ones, whatever the share."""
    shares = np.arange(0, 101, 10)
    confusion = np.zeros((11, 11), int)
    confusion[:, 0], confusion[:, 1] = shares, 100 - shares
    figure = plots.plot_confusion(confusion, [str(share) for share in shares])
    matrix = next(axes for axes in figure.axes if axes.images)
    shading = matrix.images[0]
    colours = shading.to_rgba(np.asarray(shading.get_array()))
    for text in matrix.texts:
        column, row = map(int, text.get_position())
        cell = np.mean(colours[row, column, :3])
        ink = np.mean(matplotlib.colors.to_rgb(text.get_color()))
        assert abs(cell - ink) > 0.3, text


def test_many_classes_drop_counts_and_thin_ticks() -> None:
    """With 100 classes no counts are written and few ticks labelled, but each class has its bar."""
    names = [f"class {i}" for i in range(100)]
    confusion = make_confusion(100)
    figure = plots.plot_confusion(confusion, names)
    matrix = next(axes for axes in figure.axes if axes.images)
    assert not matrix.texts
    shown = [label.get_text() for label in matrix.get_yticklabels()]
    assert 10 <= len(shown) <= 40
    assert shown == [names[int(tick)] for tick in matrix.get_yticks()]
    np.testing.assert_allclose(accuracy_bars(figure)[1], 100 * confusion.diagonal() / confusion.sum(axis=1))


def test_a_contact_sheet_shows_whole_images_of_any_size() -> None:
    red, blue = ([np.full((*size, 3), 0, np.uint8)] for size in ((300, 100), (10, 20)))
    red[0][..., 0], blue[0][..., 2] = 255, 255
    long = "a name of a class that is longer than it should be"
    figure = plots.plot_contact_sheet({"red": 2 * red, long: blue})
    assert [text.get_text() for text in figure.texts] == ["red", "a name of a class that is lon..."]
    sheet = np.asarray(figure.axes[0].images[0].get_array())
    assert sheet.shape == (128 + 8 + 128, 128 + 8 + 128, 3)
    # Reduced to 128 pixels in height, and enlarged six times, in the middle of their squares.
    rows, columns = np.nonzero((sheet[:128, :128] == [255, 0, 0]).all(axis=2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 127, 42, 84)
    rows, columns = np.nonzero((sheet[136:, :128] == [0, 0, 255]).all(axis=2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (34, 93, 4, 123)
    assert (sheet[136:, 128:] == 255).all()
    with pytest.raises(ValueError, match="at least one image"):
        plots.plot_contact_sheet({})


SAMPLES = {"train_images": make_images(3), "train_labels": make_labels(3), "class_names": NAMES}
SAMPLES |= {"val_images": make_images(3), "val_labels": make_labels(3)}
PREDICTIONS = {"images": make_images(3), "labels": make_labels(3), "probs": make_probs(3), "class_names": NAMES}
CONFUSION = {"confusion": np.eye(2, dtype=int), "class_names": ["circle", "square"]}


@pytest.mark.parametrize(
    ("plot", "arguments", "message"),
    [
        (plots.plot_samples, SAMPLES | {"train_images": make_images(0), "train_labels": make_labels(0)}, "non-empty"),
        (plots.plot_samples, SAMPLES | {"train_images": make_images(3).astype(np.float32)}, "got float32"),
        (plots.plot_samples, SAMPLES | {"val_images": make_images(3)[0]}, r"\[32, 32, 3\]"),
        (plots.plot_samples, SAMPLES | {"val_labels": make_labels(2)}, "3 images"),
        (plots.plot_samples, SAMPLES | {"train_labels": np.array([0, 10, 1])}, "10 class names, got 0 to 10"),
        (plots.plot_predictions, PREDICTIONS | {"probs": make_probs(3, 9)}, r"shape \[3, 10\], got \[3, 9\]"),
        (plots.plot_curves, {"history": []}, "at least one epoch"),
        (plots.plot_curves, {"history": [{"epoch": 1, "train_loss": 1.0}]}, "lacks train_accuracy"),
        (plots.plot_curves, {"history": 2 * make_history(2)}, "must increase"),
        (plots.plot_confusion, CONFUSION | {"confusion": np.ones((3, 3), int)}, "counts"),
        (plots.plot_confusion, CONFUSION | {"confusion": np.zeros((2, 2), int)}, "counts"),
    ],
)
def test_inconsistent_arguments_are_refused(
    plot: Callable[..., Figure], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plot(**arguments)


def test_save_replaces_the_file_by_a_plain_png(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")
    plots.save_figure(plots.plot_curves(make_history(2)), path)
    assert [file.name for file in tmp_path.glob("*figure.png*")] == ["figure.png"]
    with Image.open(path) as image:
        image.load()
        assert (image.format, image.size) == ("PNG", (round(6.8 * plots.DPI), round(2.6 * plots.DPI)))
        assert "Software" not in image.info


def test_a_full_disk_leaves_the_old_figure(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")
    with full_disk(at=1000), pytest.raises(OSError, match="too large"):
        plots.save_figure(plots.plot_curves(make_history(1)), path)
    assert [file.name for file in tmp_path.glob("*figure.png*")] == ["figure.png"] and path.read_bytes() == b"old"
