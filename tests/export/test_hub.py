"""The export for the Hugging Face hub: huggingface_hub reads the card offline, and it says what the run says."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers import summary_of
from hub_cards import card_of, edited, tables
from huggingface_hub import InferenceClient, ModelCard, ModelCardData, metadata_eval_result, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from markdown_it import MarkdownIt
from PIL import Image

from cifar_jax import Head, load_run
from cifar_jax.errors import UserError
from cifar_jax.export.pytorch import write_pytorch
from cifar_jax.export.trained_model import trained_model
from cifar_jax.export.write import export_run
from cifar_jax.pretrained import registry

EVIL = (
    *("a|b", "<script>alert(1)</script>", "two\nlines", "🐈 & 犬", "`code`", "*bold* _x_", "[link](http://x.org)"),
    *("a\\|b\\", "$$x$$ ~~y~~", "---"),
)
READ = """
import json, os, socket, sys
def refuse(*_, **__):
    raise OSError("no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from huggingface_hub import ModelCard
card = ModelCard.load(sys.argv[1])
assert "cifar_jax" not in sys.modules
print(json.dumps(card.data.to_dict()))
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Forbids connections, as cards are to be written and read without any."""

    def refuse(*_, **__):
        raise AssertionError("a connection")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def exported(run_path, tmp_path_factory):
    """The directory of a run on synthetic images, and what is said of it."""
    path = tmp_path_factory.mktemp("hub") / "model"
    return path, export_run(load_run(run_path), "hub", path)


def test_the_card_is_read_by_the_hubs_library_offline_in_a_process_without_this_package(exported, run_path):
    path, _ = exported
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-I", "-c", READ, path / "README.md"], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    data, summary = json.loads(found.stdout), summary_of(run_path)
    assert data["library_name"] == "pytorch" and data["pipeline_tag"] == "image-classification"
    assert data["metrics"] == ["accuracy"] and {"image-classification", "jax"} <= set(data["tags"])
    (index,) = data["model-index"]
    (result,) = index["results"]
    (metric,) = result["metrics"]
    assert metric["value"] == summary["val_accuracy"] and metric["verified"] is False
    low, high = summary["val_accuracy_interval_95"]
    assert metric["name"] == f"Accuracy (95 % interval {low:.4f} to {high:.4f}, 20 images, a random subset)"
    assert result["dataset"] == {"name": "shapes", "type": "custom", "split": "test"}


def test_the_metadata_are_what_the_hubs_library_itself_writes(exported):
    path, _ = exported
    card, metadata = ModelCard.load(path / "README.md"), metadata_load(path / "README.md")
    assert ModelCardData(**metadata).to_dict() == card.data.to_dict() == metadata
    assert (path / "README.md").read_text(encoding="utf-8") == str(card)
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert results == card.data.eval_results and len(results) == 1
    assert eval_results_to_model_index(name, results) == metadata["model-index"]
    (result,) = results
    assert metadata_eval_result(
        model_pretty_name=name,
        task_pretty_name=result.task_name,
        task_id=metadata["pipeline_tag"],
        metrics_pretty_name=result.metric_name,
        metrics_id=metadata["metrics"][0],
        metrics_value=result.metric_value,
        dataset_pretty_name=result.dataset_name,
        dataset_id=result.dataset_type,
        dataset_split=result.dataset_split,
    ) == {"model-index": metadata["model-index"]}
    assert hasattr(InferenceClient, metadata["pipeline_tag"].replace("-", "_"))


def test_the_model_is_that_of_the_pytorch_format(exported, run_path, tmp_path):
    path, said = exported
    write_pytorch(trained_model(load_run(run_path)), tmp_path)
    same = sorted(file.name for file in tmp_path.iterdir())
    assert same == ["config.json", "model.py", "model.safetensors"]
    for name in same:
        assert (path / name).read_bytes() == (tmp_path / name).read_bytes()
    assert said["card"] == "README.md, licence: unknown"
    assert said["figures"].endswith("predictions.png (this one shows images of the data set)")
    assert said["publish"].startswith("run `hf upload USER/NAME .` in the directory")


def test_the_figures_that_the_card_shows_are_there(exported):
    path, _ = exported
    shown = re.findall(r"!\[.*?\]\((.*?)\)", (path / "README.md").read_text(encoding="utf-8"))
    assert shown == ["curves.png", "confusion.png", "predictions.png"]
    for name in shown:
        Image.open(path / name).verify()
    files = {file.name for file in path.iterdir()}
    assert files == {*shown, "README.md", "SHA256SUMS", "config.json", "model.py", "model.safetensors"}


def test_a_run_without_figures_has_a_card_without_them(run_path, tmp_path):
    path = edited(run_path, tmp_path)
    for figure in path.glob("*.png"):
        figure.unlink()
    assert "![" not in card_of(path, tmp_path / "hub").text


def test_the_directory_names_no_path_of_this_machine(exported, run_path, pictures, tmp_path):
    card_of(pictures, tmp_path / "hub")
    for directory, run in ((exported[0], run_path), (tmp_path / "hub", pictures)):
        for file in directory.iterdir():
            content = file.read_bytes()
            for place in (run.parent, directory.parent, registry.weights_dir().parent, os.environ["HOME"]):
                assert str(place).encode() not in content, (file, place)


def test_special_characters_in_names_are_shown_as_they_are(run_path, tmp_path):
    summary = summary_of(run_path)
    scores = dict(zip(EVIL, summary["val_classes"].values(), strict=True))
    title = 'it\'s: "x"\n---\n# |<b> \udcff'
    path = edited(run_path, tmp_path, dataset={"class_names": EVIL, "name": title}, val_classes=scores)
    card = card_of(path, tmp_path / "hub")
    assert [row[0] for row in tables(card)] == [" ".join(name.split()) for name in EVIL]
    assert {len(row) for row in tables(card)} == {6}
    assert card.data.eval_results[0].dataset_name == 'it\'s: "x" --- # |<b> ?'
    assert card.data.license == "unknown"
    page = MarkdownIt("commonmark").enable("table").render(card.text)
    assert page.count("<h1>") == 1 and "<script" not in page and "<b>" not in page and "x.org&quot;" not in page
    assert "$$" not in card.text


def test_a_directory_that_was_exported_is_replaced_and_no_other(run_path, tmp_path):
    run, out = load_run(run_path), tmp_path / "hub"
    export_run(run, "hub", out)
    with pytest.raises(UserError, match="already exists"):
        export_run(run, "hub", out)
    export_run(run, "hub", out, overwrite=True)
    card = (out / "README.md").read_text(encoding="utf-8")
    (out / "README.md").write_text(f"{card}\nTaken by myself.\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"has changed since it was exported \(README\.md\)"):
        export_run(run, "hub", out, overwrite=True)
    assert "Taken by myself." in (out / "README.md").read_text(encoding="utf-8")


def test_without_the_hubs_library_it_says_what_to_install(run_path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"--format hub needs the package huggingface_hub.*cifar-jax\[hub\]"):
        export_run(load_run(run_path), "hub", tmp_path / "hub")
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_is_a_function_is_refused(run_path, tmp_path):
    run = load_run(run_path)
    with pytest.raises(UserError, match="--format hub cannot express"):
        export_run(replace(run, head=Head(run.head.init, lambda params, x, **_: x, "own")), "hub", tmp_path / "hub")
    assert list(tmp_path.iterdir()) == []
