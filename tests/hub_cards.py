"""Runs, and what the model cards of their exports for the Hugging Face hub say."""

import contextlib
import functools
import io
import json
import shutil
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers import narrow_networks, summary_of, write_pictures_folder
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from cifar_jax import load_run
from cifar_jax.cli.main import main
from cifar_jax.export.write import export_run
from cifar_jax.runs.directory import CONFIG, SUMMARY


def pictures_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run on a folder of pictures called like a public data set, some of them held out; made once."""
    return _pictures_run(tmp_path_factory.getbasetemp() / "pictures")


@functools.cache
def _pictures_run(root: Path) -> Path:
    folder, out = root / "cifar10", root / "run"
    write_pictures_folder(folder / "train", {"cats": 24, "dogs": 20})
    write_pictures_folder(folder / "test", {"cats": 5, "dogs": 7}, seed=1)
    options = ["--val-fraction", "0.25", "--weights", "random-w16", "--image-size", "32", "--hidden", "8", "6"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        narrow_networks(patch)
        assert main(["train", "--dataset", str(folder), *options, "--epochs", "2", "--out", str(out)]) == 0
    return out


def edited(run: Path, tmp_path: Path, config: Iterable[Any] = (), dataset: Iterable[Any] = (), **summary: Any) -> Path:
    """Copies a run with other options and another summary; a field that is None is left out of the summary."""
    path = tmp_path / "edited"
    shutil.copytree(run, path)
    options = json.loads((path / CONFIG).read_text()) | dict(config)
    (path / CONFIG).write_text(json.dumps(options))
    fields = summary_of(path) | summary
    fields["dataset"] |= dict(dataset)
    (path / SUMMARY).write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return path


def card_of(run: Path, out: Path, **options: Any) -> ModelCard:
    """Exports a run, loaded with `options`, and reads its card."""
    export_run(load_run(run, **options), "hub", out)
    return ModelCard.load(out / "README.md")


def tables(card: ModelCard) -> list[list[str]]:
    """Returns the cells of a card's tables as they are shown, without the headers."""
    rows: list[list[str]] = []
    for token, content in pairwise(MarkdownIt("commonmark").enable("table").parse(card.text)):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "td_open":
            # A cell that held markup would have other children than text.
            assert {child.type for child in content.children or ()} <= {"text", "text_special"}
            rows[-1].append("".join(child.content for child in content.children or ()))
    return [row for row in rows if row]
