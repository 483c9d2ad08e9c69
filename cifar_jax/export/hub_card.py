"""The model card of a run for the Hugging Face hub: metadata for its pages, and a text for people."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cifar_jax.errors import extra_missing
from cifar_jax.export import card_facts
from cifar_jax.export.card_facts import count, percent
from cifar_jax.export.trained_model import TrainedModel
from cifar_jax.models.resnet import network_name

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = "hub_card.md"
# Identifiers of the hub: https://huggingface.co/docs/hub/repositories-licenses
LICENSES = {"Apache-2.0": "apache-2.0", "BSD-3-Clause": "bsd-3-clause", "MIT": "mit"}
UNKNOWN = "unknown"
TAGS = ("image-classification", "resnet", "transfer-learning", "jax", "pytorch", "cifar-jax")
FEW = 20  # classes that are named in a sentence, and whose table is shown at once
# What means something in Markdown, in a table or in HTML, or to the hub's formulas, wherever it stands.
SPECIAL = re.compile(r"[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])")


class Figure(NamedTuple):
    """A figure of the card: its file beside the card, the caption, and whether it shows images of the data set."""

    file: str
    caption: str
    shows_images: bool = False


def model_card(model: TrainedModel, figures: Sequence[Figure]) -> "ModelCard":
    """Writes the card of a classifier.

    Raises:
      UserError: if the package huggingface_hub is not installed, or the backbone is a function.
    """
    try:
        from huggingface_hub import ModelCard
    except ImportError:
        raise extra_missing("--format hub", "huggingface_hub", "hub") from None
    from jinja2 import Environment, PackageLoader, StrictUndefined  # not above: it takes a while

    environment = Environment(
        loader=PackageLoader("cifar_jax.export"),
        undefined=StrictUndefined,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "count": count}
    text = environment.get_template(TEMPLATE).render(context_of(model), figures=figures)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()  # around what was left out
    return ModelCard(f"---\n{metadata_of(model).to_yaml()}\n---\n\n{text}\n")


def metadata_of(model: TrainedModel) -> "ModelCardData":
    """The fields at the top of a card, which the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    scores, hub_id = model.about["scores"], card_facts.hub_id_of(model)
    name, network = cleaned(model.run.summary["dataset"]["name"]), network_name(model.resnet("hub").config)
    results = []
    if scores["accuracy"] is not None:
        measured = f"{count(scores['num'])} images" + ", a random subset" * card_facts.is_subset(model)
        if interval := scores["accuracy_interval_95"]:
            measured = f"95 % interval {interval[0]:.4f} to {interval[1]:.4f}, {measured}"
        result = EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            # Required: a folder of pictures has the name of the hub's loader of such folders.
            dataset_type=hub_id or ("imagefolder" if model.about["data"]["kind"] == "folder" else "custom"),
            dataset_name=name,
            dataset_split="test" if scores["split"] == "test" else "validation",
            metric_type="accuracy",
            metric_name=f"Accuracy ({measured})",
            metric_value=scores["accuracy"],
            verified=False,
        )
        results.append(result)
    return ModelCardData(
        license=license_of(model),
        library_name="pytorch",  # else the hub takes config.json for that of transformers
        pipeline_tag="image-classification",
        tags=list(TAGS),
        datasets=[hub_id] if hub_id else None,
        metrics=["accuracy"],
        base_model=card_facts.base_model_of(model),
        model_name=re.sub(r"[^\w.]+", "-", f"{network} {name}").strip("-"),
        eval_results=results or None,
    )


def license_of(model: TrainedModel) -> str:
    """The hub's identifier of the licence of the backbone's weights; `unknown` if it is not known."""
    return LICENSES.get(model.about["backbone"]["licence"], UNKNOWN)


def context_of(model: TrainedModel) -> dict[str, Any]:
    """What the template says of a classifier: text, numbers, and lists of them."""
    summary, scores, names = model.run.summary, model.about["scores"], model.class_names
    part = "test" if "test_accuracy" in summary else "val"
    by_class = summary.get(f"{part}_classes") or {}
    none = dict.fromkeys(("precision", "recall", "f1", "support"))
    trained = summary["dataset"].get("train_class_counts") or [None] * len(names)
    rows = [
        {"name": name, "train": number} | none | by_class.get(name, {})
        for name, number in zip(names, trained, strict=True)
    ]
    return {
        "about": model.about,
        "summary": summary,
        "incomplete": card_facts.incomplete(model),
        "scores": scores,
        "network": network_name(model.resnet("hub").config),
        "rows": rows,
        "by_class": bool(by_class),
        "is_long": len(names) > FEW,
        "names": "" if len(names) > FEW else f": {', '.join(names)}",
        "origin": card_facts.origin(model),
        "split": scores["split"].replace("_", "-"),
        "balanced": summary.get(f"{part}_balanced_accuracy"),
        "selection": card_facts.selection(model),
        "data": card_facts.data(model),
        "side": model.side,
        "resized": card_facts.resized(model),
        "inside": card_facts.inside(model),
        "training": card_facts.training(model),
        "backbone": card_facts.backbone(model),
        "license": license_of(model),
        "is_random": card_facts.is_random(model),
        "pretrained_on": card_facts.pretrained_on(model),
        "versions": ", ".join(f"{name} {version}" for name, version in summary.get("packages", {}).items()),
    }


def plain(value: Any) -> Any:
    """Escapes text so that Markdown shows it as it is, on one line and in one cell of a table; leaves other values."""
    if not isinstance(value, str):
        return value
    return SPECIAL.sub(lambda match: f"&#{ord(match[0])};", cleaned(value))


def cleaned(text: str) -> str:
    """Replaces line breaks and control characters by spaces, and what UTF-8 cannot express by question marks."""
    printable = "".join(" " if ord(char) < 32 or 127 <= ord(char) < 160 else char for char in text)
    return " ".join(printable.encode(errors="replace").decode().split())
