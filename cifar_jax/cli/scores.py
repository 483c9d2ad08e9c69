"""Scores of `evaluate` for a person."""

from collections.abc import Mapping
from typing import Any

from cifar_jax.cli.console import ConsoleReporter

_WORDS = {"test": "{} test images", "val": "{} validation images", "all": "all {} images"}
MANY = 10_000  # images from which on a hundredth of a percent is more than one of them


def print_scores(scores: Mapping[str, Any], reporter: ConsoleReporter) -> None:
    """Prints what `evaluate_run` returns, proportions in percent, and a table of the classes that have images."""
    num, counts = scores["num_test"], scores["test_class_count"]
    low, high = (percent(bound, num).removesuffix(" %") for bound in scores["test_accuracy_interval_95"])
    which = "model" if "model" in scores else "run"
    rows = {
        which: scores[which],
        "images": f"{_WORDS[scores['split']].format(f'{num:,}')} of {scores['dataset']}",
        "resize": scores["resize"],
        "accuracy": f"{percent(scores['test_accuracy'], num)} on {num:,} images, 95 % interval {low} to {high} %",
        "loss": f"{scores['test_loss']:.4g}",
    }
    if absent := [name for name, count in counts.items() if not count]:
        rows["no images of"] = ", ".join(absent)
    reporter.header(rows)
    reporter.out.print()
    reporter.table(
        [
            {"class": name, "accuracy": percent(accuracy, counts[name]), "images": f"{counts[name]:,}"}
            for name, accuracy in scores["test_class_accuracy"].items()
            if counts[name]
        ]
    )


def percent(proportion: float, num: int) -> str:
    """Formats a proportion of `num` images in percent, with as many decimals as it has meaning."""
    return f"{100 * proportion:.{2 if num >= MANY else 1}f} %"
