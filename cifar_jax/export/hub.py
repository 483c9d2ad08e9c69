"""Export for the Hugging Face hub: the PyTorch model, a model card and the figures of the run, ready to be uploaded."""

import shutil
from pathlib import Path

from cifar_jax.export.hub_card import Figure, license_of, model_card
from cifar_jax.export.pytorch import write_pytorch
from cifar_jax.export.trained_model import TrainedModel

CARD = "README.md"


def write_hub(model: TrainedModel, directory: Path) -> dict[str, str]:
    """Writes a classifier into an empty directory. Returns what is worth saying about it.

    Beside the files of `write_pytorch` there are the card, README.md, and the figures of the run that it shows.

    Raises:
      UserError: if a package is not installed, or the backbone or the head is a function.
    """
    figures = figures_of(model)
    card = model_card(model, figures)  # first, as it names this format in what it refuses
    described = write_pytorch(model, directory)
    card.save(directory / CARD)
    for figure in figures:
        shutil.copyfile(model.run.path / figure.file, directory / figure.file)
    named = ", ".join(figure.file for figure in figures)
    shows = any(figure.shows_images for figure in figures)
    return described | {
        "card": f"{CARD}, licence: {license_of(model)}",
        "figures": (named or "none") + " (this one shows images of the data set)" * shows,
        "publish": "run `hf upload USER/NAME .` in the directory, once you have completed the card",
    }


def figures_of(model: TrainedModel) -> list[Figure]:
    """The figures that a run has of its training and of the images that it was scored on."""
    summary = model.run.summary
    scored = model.about["scores"]["split"].replace("_", "-")
    watched = summary.get("val_split", "test").replace("_", "-")
    prefix = "test_" if "test_accuracy" in summary else ""
    figures = (
        Figure("curves.png", f"Loss and accuracy of training and {watched} images by epoch"),
        Figure(f"{prefix}confusion.png", f"Confusion matrix of the {scored} images"),
        Figure(f"{prefix}predictions.png", f"Some {scored} images and the predictions of the model", True),
    )
    return [figure for figure in figures if (model.run.path / figure.file).is_file()]
