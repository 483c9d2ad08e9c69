"""The text and the metadata of a model card: they say of a run what its options and its summary say."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import summary_of
from hub_cards import card_of, edited, tables
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from cifar_jax import load_run
from cifar_jax.export.write import export_run
from cifar_jax.models.preprocess import CAFFE
from cifar_jax.pretrained import registry

# The identifiers of https://huggingface.co/docs/hub/repositories-licenses that may be needed.
LICENSES = {"apache-2.0", "bsd-3-clause", "mit"}


def text_of(card):
    return " ".join(card.text.split())


def test_the_table_has_the_scores_of_each_class(run_path, tmp_path):
    summary, rows = summary_of(run_path), tables(card_of(run_path, tmp_path / "hub"))
    assert [row[0] for row in rows] == list(summary["val_classes"])
    for row, trained, scores in zip(
        rows, summary["dataset"]["train_class_counts"], summary["val_classes"].values(), strict=True
    ):
        figures = [scores[name] for name in ("precision", "recall", "f1")]
        assert row[1:3] == [f"{trained:,}", f"{scores['support']:,}"]
        assert row[3:] == ["-" if value is None else f"{100 * value:.1f} %" for value in figures]


def test_a_run_with_held_out_images_reports_the_test_images(pictures, tmp_path):
    card, summary = card_of(pictures, tmp_path / "hub"), summary_of(pictures)
    (result,) = card.data.eval_results
    assert summary["val_split"] == "held_out" and (summary["num_val"], summary["num_test"]) == (11, 12)
    assert result.metric_value == summary["test_accuracy"] and result.dataset_split == "test"
    low, high = summary["test_accuracy_interval_95"]
    text = text_of(card)
    assert f"Accuracy: **{100 * summary['test_accuracy']:.1f} %** on 12 test images, with a 95 % interval of" in text
    assert f"{100 * low:.1f} % to {100 * high:.1f} %" in text
    assert f"Epoch {summary['selected_epoch']} of 2 was chosen for its accuracy on 11 other images" in text
    assert "**held-out images**: 11, 25 % of the training images, to choose the epoch" in text
    assert [row[1:3] for row in tables(card)] == [["18", "5"], ["15", "7"]]
    assert (tmp_path / "hub" / "test_confusion.png").read_bytes() == (pictures / "test_confusion.png").read_bytes()
    assert "val_" not in card.content


def test_a_folder_is_no_data_set_of_the_hub_whatever_its_name_is(pictures, tmp_path):
    card = card_of(pictures, tmp_path / "hub")
    assert card.data.datasets is None and "uoft-cs" not in card.content
    assert (card.data.eval_results[0].dataset_type, card.data.eval_results[0].dataset_name) == (
        "imagefolder",
        "cifar10",
    )
    text = text_of(card)
    assert "**data set**: cifar10, a folder of pictures" in text
    assert "**test images**: 12, those of the data set" in text
    assert "shorter side is resized to 37 pixels (bilinear, with antialiasing), and the centre of 32x32" in text
    assert "dense layers of 8 and 6 units with ReLU, a dense layer of 2 units and softmax" in text


def test_a_share_of_the_images_to_test_on_is_said_to_be_one(pictures, tmp_path):
    path = edited(pictures, tmp_path, {"test_fraction": 0.2}, num_train=33, num_val=11, num_test=11)
    assert "**test images**: 11, 20 % of all images" in card_of(path, tmp_path / "hub").text


@pytest.mark.parametrize(("name", "hub_id"), [("cifar10", "uoft-cs/cifar10"), ("cifar100", "uoft-cs/cifar100")])
def test_public_data_sets_have_their_names_on_the_hub(run_path, tmp_path, name, hub_id):
    path = edited(run_path, tmp_path, {"dataset": name}, {"name": name, "version": "3.0.2"})
    card = card_of(path, tmp_path / "hub")
    validate_repo_id(hub_id)
    assert card.data.datasets == [hub_id] and card.data.eval_results[0].dataset_type == hub_id
    assert f"[{hub_id}](https://huggingface.co/datasets/{hub_id})" in card.text


@pytest.mark.parametrize("weights", [*registry.entries(), "v1", "imagenet"])
def test_the_license_is_that_of_the_weights(run_path, tmp_path, weights):
    card = card_of(edited(run_path, tmp_path, {"weights": weights}), tmp_path / "hub")
    known = registry.entries()[registry.ALIASES.get(weights, weights)]
    assert card.data.license == known.licence.lower() and card.data.license in LICENSES
    assert f"**licence**: {known.licence}" in card.text and "Fill in" not in card.text
    assert f"`{known.licence.lower()}`, is the licence of the backbone's weights" in card.text
    assert "license" not in card.text.replace("`license`", "")
    assert (known.url or "part of cifar-jax") in card.text
    assert ("Its backbone was pretrained on ImageNet: " in card.text) == bool(known.url)


@pytest.mark.parametrize(
    ("weights", "parts", "says"),
    [
        ("random-w16", {}, "It was trained from random weights, so the licence is yours to choose."),
        ("/models/own.safetensors", {}, "is not known to cifar-jax: look where you got them."),
        # A backbone passed to `train` is not the one that the option names.
        ("keras-resnet50", {"backbone": "Backbone"}, "is not known to cifar-jax: look where you got them."),
    ],
)
def test_an_unknown_license_is_for_the_user_to_fill_in(run_path, tmp_path, weights, parts, says):
    card = card_of(edited(run_path, tmp_path, {"weights": weights}, parts=parts), tmp_path / "hub")
    assert card.data.license == "unknown" and card.data.base_model is None
    assert "**Fill in `license` at the top of this file before you publish" in card.text and says in card.text
    unknown = "On which images its backbone was pretrained is not known to cifar-jax"
    assert (unknown in card.text) == (not weights.startswith("random")) and "pretrained on ImageNet" not in card.text


def test_the_card_says_what_the_backbone_was_pretrained_on(run_path, tmp_path):
    variant = "torch-like; pretrained on cifar100_subset 1.0.0"
    about = summary_of(run_path)["backbone"] | {"variant": variant}
    card = card_of(edited(run_path, tmp_path, {"weights": "demo"}, backbone=about), tmp_path / "hub")
    assert "Its backbone was pretrained on cifar100_subset 1.0.0: " in card.text


OF_FOLDERS = "where the training images come from, and the right to use them and to publish what was trained on them."


def test_what_only_the_publisher_knows_is_left_to_complete(run_path, pictures, tmp_path):
    mark = "> **To be completed by the publisher**: "
    use = f"## Intended use\n\n{mark}which pictures the model is meant for"
    shapes, folder = card_of(run_path, tmp_path / "shapes").text, card_of(pictures, tmp_path / "folder").text
    assert use in shapes and shapes.count(mark) == 1  # of images that cifar-jax draws, no more is to be known
    assert "`predictions.png` shows images of the data set.\n" in shapes
    assert use in folder and f"{mark}{OF_FOLDERS}\n" in folder and folder.count(mark) == 2
    assert "`test_predictions.png` shows images of the data set: delete it, and the lines above" in folder
    public = card_of(edited(run_path, tmp_path, {"dataset": "cifar10"}, {"name": "cifar10"}), tmp_path / "public").text
    assert f"{mark}the terms of the training images" in public and OF_FOLDERS not in public
    for text in (shapes, folder, public):
        assert "cifar-jax, a codebase for transfer learning in JAX" in text


def test_weights_of_the_hubs_cache_name_the_base_model(run_path, tmp_path):
    weights = "/home/me/.cache/huggingface/hub/models--microsoft--resnet-50/snapshots/34c2/model.safetensors"
    card = card_of(edited(run_path, tmp_path, {"weights": weights}), tmp_path / "hub")
    validate_repo_id(card.data.base_model)
    assert card.data.base_model == "microsoft/resnet-50" and "/home/me" not in card.content
    assert "the pretrained weights microsoft/resnet-50" in card.text


def test_classes_of_a_large_set_are_folded_away(run_path, tmp_path):
    summary = summary_of(run_path)
    assert "<details>" not in card_of(run_path, tmp_path / "few").text
    many = [f"class {label}" for label in range(25)]
    run = load_run(run_path)
    (first, last), rng = run.head_params, np.random.default_rng(0)
    last = {"kernel": rng.normal(size=(8, 25)).astype(np.float32), "bias": np.zeros(25, np.float32)}
    scores = dict.fromkeys(many, next(iter(summary["val_classes"].values())))
    dataset = summary["dataset"] | {"class_names": many, "train_class_counts": [3] * 25}
    changed = {"dataset": dataset, "val_classes": scores}
    run = replace(run, head_params=(first, last), class_names=tuple(many), summary=summary | changed)
    export_run(run, "hub", tmp_path / "many")
    card = ModelCard.load(tmp_path / "many" / "README.md")
    assert [row[0] for row in tables(card)] == many and "<details>" in card.text
    assert "classifies pictures into 25 classes. " in card.text


@pytest.mark.parametrize(
    ("options", "parts", "says"),
    [
        ({"mode": "live"}, {}, ["Only its head was trained", "**SHA-256**", "with the frozen backbone in every step"]),
        (
            {"mode": "finetune"},
            {},
            ["All its layers were trained", "**trained layers**: all\n", "SHA-256 after training"],
        ),
        (
            {"mode": "finetune", "freeze_stages": 2, "bn_statistics": "frozen"},
            {},
            [
                "JAX, from random weights, which the stem and the first 2 stages keep.",
                "**BatchNorm**: the pretrained statistics",
            ],
        ),
        (
            {
                "mode": "live",
                "momentum": 0.9,
                "nesterov": True,
                "weight_decay": 1e-4,
                "label_smoothing": 0.1,
                "augment": ["flip"],
            },
            {},
            [
                "**optimizer**: SGD, momentum 0.9 (Nesterov)\n",
                "**weight decay**: 0.0001, of kernels",
                "**loss**: cross-entropy, label smoothing 0.1\n",
                "**augmentation**: flip\n",
            ],
        ),
        ({"schedule": "cosine", "warmup_epochs": 0.5}, {}, ["with cosine decay to zero after 0.5 epochs of warmup"]),
        (
            {},
            {"tx": "lion", "loss_fn": "focal_loss", "augment": "mixup"},
            ["a function, lion\n", "a function, focal_loss\n", "a function, mixup\n"],
        ),
    ],
)
def test_the_training_is_told_by_its_options(run_path, tmp_path, options, parts, says):
    text = card_of(edited(run_path, tmp_path, options, parts=parts), tmp_path / "hub").text
    for part in says:
        assert part in text
    assert ("**learning rate**" in text) == ("tx" not in parts)


def test_a_learning_rate_that_was_lowered_is_told_with_its_epoch(run_path, tmp_path):
    rates = [
        {"from_epoch": 1, "from_step": 1, "learning_rate": 0.01},
        {"from_epoch": 2, "from_step": 1, "learning_rate": 0.001, "backbone_learning_rate": 1e-5},
    ]
    card = card_of(edited(run_path, tmp_path, {"schedule": "constant"}, learning_rates=rates), tmp_path / "hub")
    assert "**learning rate**: 0.01; from epoch 2 0.001, of the backbone 1e-05\n" in card.text


def test_a_network_that_takes_bgr_is_described_as_the_exported_one_that_takes_rgb(run_path, tmp_path):
    run = load_run(run_path)
    export_run(replace(run, backbone=run.backbone.replace(preprocessing=CAFFE)), "hub", tmp_path / "hub")
    text = ModelCard.load(tmp_path / "hub" / "README.md").text
    assert "The mean of each channel is subtracted: 123.68, 116.779, 103.939.\n" in text
    assert "divided by" not in text.partition("## Preprocessing")[2].partition("## Training")[0]


@pytest.mark.parametrize("status", ["interrupted", "diverged", "failed"])
def test_an_incomplete_run_says_so(run_path, tmp_path, status):
    gone = dict.fromkeys(("accuracy_interval_95", "balanced_accuracy", "class_accuracy", "classes", "confusion"))
    lost = {f"val_{name}": None for name in gone}
    path = edited(run_path, tmp_path, {"epochs": 5}, status=status, val_accuracy=0.25, **lost)
    card = card_of(path, tmp_path / "hub", allow_incomplete=True)
    verb = {"interrupted": "was interrupted", "diverged": "diverged", "failed": "failed"}[status]
    assert (
        f"> **The run is incomplete.** Training {verb} after 2 of 5 epochs; these are the weights of epoch 2."
        in card.text
    )
    assert "Accuracy: **25.0 %** on 20 test images.\n" in card.text
    assert card.data.eval_results[0].metric_value == 0.25
    assert {len(row) for row in tables(card)} == {2}


def test_an_incomplete_run_with_held_out_images_says_what_they_were_for(pictures, tmp_path):
    lost = {name: None for name in summary_of(pictures) if name.startswith("test_")}
    path = edited(pictures, tmp_path, status="interrupted", **lost)
    card = card_of(path, tmp_path / "hub", allow_incomplete=True)
    (result,) = card.data.eval_results
    assert result.metric_value == summary_of(pictures)["val_accuracy"] and result.dataset_split == "validation"
    assert "on 11 held-out images" in card.text and "These images chose the epoch" in card.text


def test_a_run_without_a_score_has_none(run_path, tmp_path):
    lost = {name: None for name in summary_of(run_path) if name.startswith("val_") and name != "val_split"}
    card = card_of(edited(run_path, tmp_path, status="failed", **lost), tmp_path / "hub", allow_incomplete=True)
    assert card.data.eval_results is None and "The run has no score." in card.text
