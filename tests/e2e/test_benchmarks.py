"""The benchmarks run, what they compare is the same work, and docs/benchmarks.md shows the figures that are kept."""

import json
import math
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from benchmarks import tables
from benchmarks.processes import ROOT, run_command
from benchmarks.sections import SECTIONS, agreement
from benchmarks.worker import Worker, interleaved

ABOUT = {"device": "cpu (a machine)", "gpu": None, "memory_gb": 8, "date": "2026-01-01", "commit": "abc"}
ABOUT |= {"packages": {"jax": "0.10", "numpy": "2"}}


def section(unit: str, ours: list[float], theirs: list[float]) -> dict:
    rows = [
        {"name": "ours", "values": ours, "ours": None, "note": "", "difference": None},
        {"name": "a peer", "values": theirs, "ours": "ours", "note": "8 at a time", "difference": 1e-6},
        {"name": "another", "values": [], "ours": "ours", "note": "not measured: it is not there", "difference": None},
    ]
    return {"title": "Backbone", "about": "features", "unit": unit, "rows": rows}


def test_page_shows_what_is_kept():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert page.count(tables.BEGIN) == page.count(tables.END) == 1
    assert tables.in_page(page, tables.markdown(tables.read_results())) == page, "run python -m benchmarks.tables"


def test_what_is_kept_was_measured_often_enough_and_of_the_same_work():
    for result in tables.read_results():
        for kept in result["sections"].values():
            names = {row["name"] for row in kept["rows"]}
            for row in kept["rows"]:
                compared = row["ours"] is not None or any(other["ours"] == row["name"] for other in kept["rows"])
                assert not row["values"] or not compared or len(row["values"]) >= 5, row["name"]
                assert row["ours"] in {None, *names} and (row["values"] or row["note"])
                assert (row["difference"] or 0) <= (5e-2 if "bfloat16" in row["name"] else 1e-4), row["name"]


def test_more_images_a_second_and_fewer_seconds_are_faster_round_by_round():
    assert tables.speed_ratios([40, 30], [20, 60], "images/s") == [2, 0.5]
    assert tables.speed_ratios([2, 3], [4, 1.5], "s") == [2, 0.5]
    with pytest.raises(ValueError, match="zip"):
        tables.speed_ratios([2], [4, 1.5], "s")


def test_table_has_median_spread_and_what_could_not_be_measured():
    lines = tables.table(section("images/s", [30, 40, 44], [20, 10, 11])).splitlines()
    assert lines[2:] == [
        "| | images/s | cifar_jax is as fast |",
        "|---|---|---|",
        "| ours | 40.0 (30.0 to 44.0) |  |",
        "| a peer (8 at a time) | 11.0 (10.0 to 20.0) | 4x (1.5 to 4) |",
        "| another (not measured: it is not there) | - |  |",
    ]


def test_a_section_measured_again_takes_the_place_of_the_old_one_alone(tmp_path):
    path = tmp_path / "results" / "machine.json"
    tables.write_results(path, "backbone", section("images/s", [1.0], [1.0]), ABOUT)
    tables.write_results(path, "job", section("s", [5.0], [15.0]), ABOUT)
    tables.write_results(path, "backbone", section("images/s", [2.0], [1.0]), ABOUT | {"date": "2026-02-02"})
    (result,) = tables.read_results(path.parent)
    text = tables.markdown([result])
    assert "| 2x |" in text and "| 3x |" in text and "| 1x |" not in text
    assert text.count("Measured on cpu (a machine), 8 GB; jax 0.10;") == 2
    assert text.index("2026-02-02") < text.index("2026-01-01, commit abc")


def test_peers_take_turns():
    calls = []
    timed = {name: partial(lambda name: calls.append(name) or float(len(calls)), name) for name in "ab"}
    assert interleaved(timed, 2) == {"a": [1, 3], "b": [2, 4]} and calls == list("abab")


def test_other_work_is_not_compared():
    features = np.linspace(0, 10, 8, dtype=np.float32).reshape(4, 2)
    results = {"ours": lambda *_: features, "a peer": lambda *_: features + np.float32(9e-4)}
    ours = {"ours": None, "a peer": "ours"}
    assert agreement(results, ours) == {"a peer": pytest.approx(9e-5, rel=1e-2)}
    for wrong in (features + np.float32(1.1e-3), features * np.nan):
        with pytest.raises(RuntimeError, match="what a peer computes differs from ours by"):
            agreement(results | {"a peer": lambda *_, wrong=wrong: wrong}, ours)


def test_a_worker_is_another_process_with_its_own_environment_and_hands_errors_back():
    with Worker(partial, os.getenv, environment={"CIFAR_JAX_BENCHMARK": "here"}) as worker:
        assert worker("CIFAR_JAX_BENCHMARK") == "here" and os.getenv("CIFAR_JAX_BENCHMARK") is None
        assert 0 <= worker.seconds("CIFAR_JAX_BENCHMARK") < 1
        with pytest.raises(TypeError, match="str expected"):
            worker(1)
    with pytest.raises(ZeroDivisionError):
        Worker(divmod, 1, 0, environment={})


def test_a_command_is_measured_from_its_start_to_its_end(tmp_path):
    usage = run_command(["-c", "import time; held = b'x' * 300_000_000; time.sleep(0.2)"], {}, tmp_path / "log")
    assert 0.2 < usage.seconds < 10 and usage.peak_gb > 0.3
    with pytest.raises(RuntimeError, match=r"(?s)exit code 3:.*broken"):
        run_command(["-c", "import sys; print('broken'); sys.exit(3)"], {}, tmp_path / "log")


def test_all_sections_run(tmp_path):
    out = tmp_path / "quick.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--dataset", "shapes", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = json.loads(out.read_text())["sections"]
    assert list(kept) == [name for name in SECTIONS if name != "gpu"]
    for name, one in kept.items():
        assert done.stdout.count(f"**{one['title']}**") == 1
        assert all(math.isfinite(value) and value > 0 for row in one["rows"] for value in row["values"]), name
        assert one["measured"]["packages"]["jax"] and one["measured"]["device"].startswith("cpu")
