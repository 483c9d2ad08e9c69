"""Tables of the kept figures in Markdown; `python -m benchmarks.tables` puts them into docs/benchmarks.md."""

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- benchmarks: made by `python -m benchmarks.tables` from benchmarks/results -->"
NAMED = ("jax", "keras", "tensorflow-cpu", "torch", "onnxruntime")
END = "<!-- benchmarks: end -->"


def read_results(directory: Path = RESULTS) -> list[dict[str, Any]]:
    """What was kept, a machine a file; what a compiler estimates is none of it."""
    kept = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json")))
    return [result for result in kept if "sections" in result]


def write_results(path: Path, name: str, section: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Puts a section into a file of results, in the place of what the file had of it."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"sections": {}}
    kept["sections"][name] = {**section, "measured": dict(about)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The tables of all machines; sections measured together share the line that says on what."""
    parts = []
    for result in results:
        for measured, sections in itertools.groupby(result["sections"].values(), lambda section: section["measured"]):
            parts += [table(section) for section in sections] + [where(measured)]
    return "\n\n".join(parts)


def where(measured: Mapping[str, Any]) -> str:
    """What figures were measured on, with what, and when."""
    packages = ", ".join(f"{name} {measured['packages'][name]}" for name in NAMED if name in measured["packages"])
    machine = f"{measured['device']}, {measured['memory_gb']} GB" + (f", {measured['gpu']}" if measured["gpu"] else "")
    commit = f", commit {measured['commit']}" if measured["commit"] else ""
    return f"Measured on {machine}; {packages}; {measured['date']}{commit}."


def table(section: Mapping[str, Any]) -> str:
    """One section: medians with their spread, and how many times as fast ours is."""
    rows, unit = section["rows"], section["unit"]
    values = {row["name"]: row["values"] for row in rows}
    compared = any(row["ours"] for row in rows)
    lines = [f"**{section['title']}**: {section['about']}.", ""]
    lines += [f"| | {unit} | cifar_jax is as fast |", "|---|---|---|"] if compared else [f"| | {unit} |", "|---|---|"]
    for row in rows:
        cells = [f"{row['name']} ({row['note']})" if row["note"] else row["name"], spread(row["values"])]
        if compared:
            ratios = speed_ratios(values[row["ours"]], row["values"], unit) if row["ours"] and row["values"] else []
            cells.append(spread(ratios, "x") if ratios else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_ratios(ours: Sequence[float], theirs: Sequence[float], unit: str) -> list[float]:
    """How many times as fast ours is, round by round."""
    pairs = zip(ours, theirs, strict=True)
    return [a / b if unit == "images/s" else b / a for a, b in pairs]


def spread(values: Sequence[float], suffix: str = "") -> str:
    """Median, and in brackets the least and the most."""
    if not values:
        return "-"
    middle = f"{digits(statistics.median(values))}{suffix}"
    return middle if len(values) == 1 else f"{middle} ({digits(min(values))} to {digits(max(values))})"


def digits(value: float) -> str:
    """Three digits, and all of those in front of the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def in_page(text: str, tables: str) -> str:
    """A page with the tables between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def update_page() -> None:
    """Puts the tables of all that is kept into docs/benchmarks.md."""
    PAGE.write_text(in_page(PAGE.read_text(encoding="utf-8"), markdown(read_results())), encoding="utf-8")


if __name__ == "__main__":
    update_page()
