"""Tests of the figures: their content, that nothing is cut off or overlaps, and how they are saved."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from helpers import ROOT
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


def draw_samples() -> Figure:
    """Draw samples of ten classes."""
    return plots.plot_samples(make_images(90), make_labels(90), make_images(80), make_labels(80), NAMES)


def draw_predictions() -> Figure:
    """Draw a full grid of predictions."""
    return plots.plot_predictions(make_images(40), make_labels(40), make_probs(40), NAMES)


FIGURES: dict[str, Callable[[], Figure]] = {
    "samples": draw_samples,
    "samples of one image": lambda: plots.plot_samples(
        make_images(1), np.array([1]), make_images(1), np.array([1]), NAMES
    ),
    "curves of 1 epoch": lambda: plots.plot_curves(make_history(1)),
    "curves of 4 epochs": lambda: plots.plot_curves(make_history(4), "test"),
    "curves of 90 epochs": lambda: plots.plot_curves(make_history(90)),
    "curves with a long name": lambda: plots.plot_curves(make_history(4), "the CIFAR-10 test split"),
    "predictions": draw_predictions,
    "one prediction": lambda: plots.plot_predictions(
        make_images(1), np.array([0]), np.eye(10, dtype=np.float32)[[1]], NAMES
    ),
    "predictions with long names": lambda: plots.plot_predictions(
        make_images(9), make_labels(9), make_probs(9), [f"an elaborate $name$ for a {name}" for name in NAMES]
    ),
    "confusion of 1 class": lambda: plots.plot_confusion(np.array([[3]]), ["all"]),
    "confusion of 2 classes": lambda: plots.plot_confusion(make_confusion(2), ["circle", "square"]),
    "confusion of 10 classes": lambda: plots.plot_confusion(make_confusion(10), NAMES),
    "confusion of 20 classes": lambda: plots.plot_confusion(make_confusion(20), NAMES + NAMES),
    "confusion of 100 classes": lambda: plots.plot_confusion(
        make_confusion(100), [f"{name} number {i}" for i in range(10) for name in NAMES]
    ),
}
all_figures = pytest.mark.parametrize("name", FIGURES)
quick_figures = pytest.mark.parametrize(
    "name", ["samples of one image", "curves of 4 epochs", "one prediction", "confusion of 2 classes"]
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder of the test's own, as other fixtures write to `tmp_path`."""
    folder = tmp_path / "figures"
    folder.mkdir()
    return folder


def render(figure: Figure) -> UInt8[np.ndarray, "height width 4"]:
    """Rasterises a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())


def texts_of(figure: Figure) -> list[str]:
    """Return the titles of all panels in the order of drawing."""
    return [axes.get_title() for axes in figure.axes]


@cache
def rendered(name: str) -> Figure:
    """Draws one of `FIGURES`, which fixes its layout."""
    figure = FIGURES[name]()
    render(figure)
    return figure


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


def assert_only_the_old_figure(directory: Path) -> None:
    """Fails if the directory contains anything but the unchanged old figure."""
    assert [path.name for path in directory.iterdir()] == ["figure.png"]
    assert (directory / "figure.png").read_bytes() == b"old"


@all_figures
def test_nothing_is_cut_off(name: str) -> None:
    """Every mark and text lies inside the picture."""
    figure = rendered(name)
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


@all_figures
def test_texts_do_not_overlap(name: str) -> None:
    """Titles, axis labels and the labels of visible ticks keep clear of each other."""
    figure = rendered(name)
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [axes.title, *axes.texts]
        texts += [text for text in shown_labels(axes) if axes.axison and text.get_rotation() in (0, 90)]
    assert_apart(texts)


@quick_figures
def test_same_figure_gives_same_bytes(name: str, folder: Path) -> None:
    """Saving again, drawing again and the user's own settings do not change a byte."""
    figure = FIGURES[name]()
    plots.save_figure(figure, folder / "first.png")
    plots.save_figure(figure, folder / "again.png")
    with matplotlib.rc_context():
        matplotlib.rcParams.update({"font.size": 20, "font.family": "serif", "axes.grid": True})
        matplotlib.rcParams.update({"savefig.bbox": "tight", "savefig.facecolor": "black", "figure.dpi": 50})
        plots.save_figure(FIGURES[name](), folder / "configured.png")
    assert len({path.read_bytes() for path in folder.iterdir()}) == 1


@quick_figures
def test_global_settings_are_unchanged(name: str, folder: Path) -> None:
    """Drawing and saving leave matplotlib's settings alone."""
    # Reading the backend would select one, which the test below checks.
    before = {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
    plots.save_figure(FIGURES[name](), folder / "figure.png")
    assert {key: matplotlib.rcParams[key] for key in before} == before


def test_pyplot_is_not_imported(folder: Path) -> None:
    """Importing, drawing and saving do not import pyplot, which selects a backend for the whole program."""
    code = """
import sys, numpy as np
from cifar_jax.report import plots
plots.save_figure(plots.plot_confusion(np.eye(2, dtype=int), ["circle", "square"]), sys.argv[1])
sys.exit("matplotlib.pyplot" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(folder / "figure.png")]
    subprocess.run(command, check=True, cwd=ROOT)


@pytest.mark.parametrize("size", [(32, 32), (28, 20), (150, 200)])
def test_images_are_enlarged_by_whole_pixels(size: tuple[int, int]) -> None:
    """Each pixel of an image becomes a square of its exact colour."""
    images = make_images(12, *size)
    zoom = max(1, 128 // max(size))
    figure = plots.plot_predictions(images, make_labels(12), make_probs(12), NAMES, columns=5)
    pixels = render(figure)[::-1, :, :3]
    for axes, image in zip(figure.axes, images, strict=True):
        x0, y0, x1, y1 = np.round(axes.get_window_extent().extents).astype(int)
        enlarged = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
        np.testing.assert_array_equal(pixels[y0:y1, x0:x1][::-1], enlarged)


def test_samples_are_ordered_class_by_class() -> None:
    """A row holds the first image of every class, the next row the second of every class."""
    train_labels = np.array([2, 2, 0, 1, 0, 2, 1, 0, 1], np.int32)
    val_labels = np.array([1, 1, 0, 1], np.int32)
    train, val = make_images(9), make_images(4)[:, ::-1]
    names = ["a", "b", "c"]
    figure = plots.plot_samples(train, train_labels, val, val_labels, names, columns=3, val_name="test")
    assert texts_of(figure) == ["a", "b", "c", "a", "b", "c", "a", "b", "b", "b"]
    expected = [*train[[2, 3, 0, 4, 6, 1]], *val[[2, 0, 1, 3]]]
    for axes, image in zip(figure.axes, expected, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), image)
    assert [text.get_text() for text in figure.texts] == ["training", "test"]
    tops = [round(axes.get_position().y1, 6) for axes in figure.axes]
    assert tops == sorted(tops, reverse=True) and [tops.count(top) for top in sorted(set(tops))] == [
        1,
        3,
        3,
        3,
    ]


def test_samples_fill_two_rows_of_many_classes() -> None:
    """With more classes than cells, each class is seen at most once."""
    labels = np.repeat(np.arange(100), 3)
    names = [f"class {i}" for i in range(100)]
    figure = plots.plot_samples(make_images(300), labels, make_images(300), labels, names, columns=7)
    assert texts_of(figure) == 2 * names[:14]


@pytest.mark.parametrize("epochs", [1, 4, 90])
def test_curves_plot_the_history(epochs: int) -> None:
    """The lines are losses and percentages over epochs, and the legend shows the last values."""
    history = make_history(epochs)
    figure = plots.plot_curves(history, "test")
    expected = {"Loss": ("loss", 1, "{:.3f}"), "Accuracy (%)": ("accuracy", 100, "{:.1f}%")}
    assert [axes.get_ylabel() for axes in figure.axes] == list(expected)
    for axes, (key, scale, form) in zip(figure.axes, expected.values(), strict=True):
        lines = axes.get_lines()
        for line, split, name in zip(lines, ("train", "val"), ("training", "test"), strict=True):
            values = [scale * row[f"{split}_{key}"] for row in history]
            np.testing.assert_array_equal(line.get_xdata(), np.arange(1, epochs + 1))
            np.testing.assert_allclose(np.asarray(line.get_ydata(), float), np.asarray(values))
            assert line.get_label() == f"{name} {form.format(values[-1])}"
        legend = axes.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == [line.get_label() for line in lines]
        assert lines[0].get_color() != lines[1].get_color() and lines[0].get_marker() != lines[1].get_marker()
    assert "running mean over each epoch" in figure.get_supxlabel()


@pytest.mark.parametrize(("epochs", "first"), [(1, 1), (2, 1), (4, 1), (90, 1), (1, 7), (5, 31)])
def test_epoch_ticks_are_epochs(epochs: int, first: int) -> None:
    """The visible ticks are whole numbers of epochs that were run."""
    history = [{**row, "epoch": row["epoch"] + first - 1} for row in make_history(epochs)]
    for axes in plots.plot_curves(history).axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks and set(ticks) <= {row["epoch"] for row in history}
        assert len(ticks) >= min(epochs, 4)


def test_diverged_history_is_drawn(folder: Path) -> None:
    """Losses that are not finite leave a gap, and the legend says so."""
    history = make_history(4)
    history[-1].update(train_loss=np.nan, val_loss=np.inf)
    figure = plots.plot_curves(history)
    plots.save_figure(figure, folder / "figure.png")
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["training nan", "validation inf"]


def test_predictions_mark_right_and_wrong() -> None:
    """Correct predictions are green and ticked, wrong ones red and crossed with the true class."""
    probs = np.array([[0.1, 0.9, 0], [0.25, 0.5, 0.25], [0.004, 0, 0.996]], np.float32)
    figure = plots.plot_predictions(make_images(3), np.array([1, 0, 2]), probs, ["cat", "dog", "emu"])
    assert texts_of(figure) == ["✓ dog 90%", "✗ dog 50%\ntrue: cat", "✓ emu 100%"]
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


def test_predictions_match_their_arrays() -> None:
    """Every tile of a full grid shows its own image, class, confidence and colour."""
    images, labels, probs = make_images(40), make_labels(40), make_probs(40)
    figure = plots.plot_predictions(images, labels, probs, NAMES, rows=4, columns=8)
    right = probs.argmax(axis=1) == labels
    assert len(figure.axes) == 32 and 0 < right[:32].sum() < 32
    for i, axes in enumerate(figure.axes):
        np.testing.assert_array_equal(axes.images[0].get_array(), images[i])
        assert axes.get_title().split("\n")[0][2:] == f"{NAMES[probs[i].argmax()]} {probs[i].max():.0%}"
        assert ("true: " in axes.get_title()) == (not right[i])
        assert same_color(axes.title.get_color(), plots.RIGHT if right[i] else plots.WRONG)
    assert figure.texts[0].get_text() == f"{right[:32].sum()} of 32 images right"


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": make_images(0), "train_labels": make_labels(0)}, "non-empty uint8"),
        ({"val_images": make_images(0), "val_labels": make_labels(0)}, "non-empty uint8"),
        ({"train_images": make_images(3).astype(np.float32)}, "got float32"),
        ({"val_images": make_images(3)[0]}, r"\[32, 32, 3\]"),
        ({"val_labels": make_labels(2)}, "3 images"),
        ({"train_labels": np.array([0, 10, 1])}, r"in 0\.\.9, as there are 10 class names, got 0 to 10"),
        ({"train_labels": np.array([0, -1, 1])}, "got -1 to 1"),
        ({"columns": 0}, "at least one row and one column"),
    ],
)
def test_samples_reject_inconsistent_arguments(change: dict[str, object], message: str) -> None:
    """Invalid arguments raise ValueError with the reason."""
    arguments: dict[str, object] = {"train_images": make_images(3), "train_labels": make_labels(3)}
    arguments |= {"val_images": make_images(3), "val_labels": make_labels(3), "class_names": NAMES}
    with pytest.raises(ValueError, match=message):
        plots.plot_samples(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": make_images(0), "labels": make_labels(0), "probs": make_probs(0)}, "non-empty uint8"),
        ({"labels": make_labels(2)}, "3 images"),
        ({"probs": make_probs(2)}, r"must have shape \[3, 10\], got \[2, 10\]"),
        ({"probs": make_probs(3, classes=9)}, r"must have shape \[3, 10\], got \[3, 9\]"),
        ({"rows": 0}, "at least one row"),
        ({"rows": -1, "columns": 1}, "at least one row"),
        ({"rows": -1, "columns": -1}, "at least one row"),
    ],
)
def test_predictions_reject_inconsistent_arguments(change: dict[str, object], message: str) -> None:
    """Invalid arguments raise ValueError with the reason."""
    arguments: dict[str, object] = {
        "images": make_images(3),
        "labels": make_labels(3),
        "probs": make_probs(3),
    }
    with pytest.raises(ValueError, match=message):
        plots.plot_predictions(**(arguments | {"class_names": NAMES} | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([], "at least one epoch"),
        ([{"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "val_accuracy": 0.5}], "lacks train_accuracy"),
        (2 * make_history(2), "must increase"),
    ],
)
def test_curves_reject_an_invalid_history(history: list[dict[str, float]], message: str) -> None:
    """An empty, incomplete or unordered history raises ValueError."""
    with pytest.raises(ValueError, match=message):
        plots.plot_curves(history)


@pytest.mark.parametrize(
    "confusion",
    [
        np.ones((2, 3), int),
        np.ones((3, 3), int),
        np.ones(4, int),
        np.zeros((2, 2), int),
        np.array([[1, -1], [0, 1]]),
    ],
)
def test_confusion_rejects_invalid_matrices(confusion: Int[np.ndarray, "..."]) -> None:
    """A matrix of the wrong shape or without valid counts raises ValueError."""
    with pytest.raises(ValueError, match=r"must be .* counts"):
        plots.plot_confusion(confusion, ["circle", "square"])


def test_save_writes_a_plain_png(folder: Path) -> None:
    """The file is a PNG of the requested size without a software tag, and replaces an old one."""
    path = folder / "figure.png"
    path.write_bytes(b"old")
    plots.save_figure(plots.plot_curves(make_history(2)), str(path), dpi=80)
    assert list(folder.iterdir()) == [path]
    with Image.open(path) as image:
        image.load()
        assert (image.format, image.size) == ("PNG", (round(6.8 * 80), round(2.6 * 80)))
        assert "Software" not in image.info


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_save_leaves_nothing_behind_when_writing_fails(
    step: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk or a failed rename leaves only the old file."""

    def fail(*_: object) -> None:
        assert any(path.name.startswith(".figure.png.") for path in folder.iterdir())
        raise OSError("No space left on device")

    (folder / "figure.png").write_bytes(b"old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space"):
        plots.save_figure(plots.plot_curves(make_history(1)), folder / "figure.png")
    assert_only_the_old_figure(folder)


def test_save_keeps_the_old_file_when_drawing_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure that fails to draw leaves only the old file, even if it fails half way."""

    def fail(_: Figure, file: object, **__: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise RuntimeError("drawing failed")

    (folder / "figure.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(RuntimeError, match="drawing failed"):
        plots.save_figure(Figure(), folder / "figure.png")
    assert_only_the_old_figure(folder)


def test_save_fails_in_missing_and_read_only_directories(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing or read-only directory is an error, and the old file stays."""
    figure = plots.plot_curves(make_history(1))
    with pytest.raises(FileNotFoundError):
        plots.save_figure(figure, folder / "missing" / "figure.png")
    assert not list(folder.iterdir())

    def forbid(*_: object, **__: object) -> None:
        raise PermissionError("not writable")

    (folder / "figure.png").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", forbid)  # file permissions do not stop root, the user of test containers
        with pytest.raises(PermissionError):
            plots.save_figure(figure, folder / "figure.png")
    assert_only_the_old_figure(folder)


def test_save_flushes_before_it_replaces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole image is flushed to disk, in the same directory, before it replaces the old one."""
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor: int) -> None:
        steps.append(f"fsync {os.fstat(descriptor).st_size}")
        fsync(descriptor)

    def watch_replace(source: Path, target: Path) -> None:
        steps.append(f"replace {source.stat().st_size}")
        assert source.parent == target.parent
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    # Seven bytes stay in Python's buffer until it is flushed.
    monkeypatch.setattr(Figure, "savefig", lambda _, file, **__: file.write(b"picture"))
    plots.save_figure(Figure(), folder / "figure.png")
    assert steps == ["fsync 7", "replace 7"]
    assert (folder / "figure.png").read_bytes() == b"picture"
