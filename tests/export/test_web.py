"""Exported web pages, as text; tests/browser opens them in a browser."""

import base64
import gzip
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import FIELDS, tiny_run

from cifar_jax import Head, load_run
from cifar_jax.errors import UserError
from cifar_jax.export.trained_model import TrainedModel, trained_model
from cifar_jax.export.web import CDN, MODULE, ORT_PINS, ORT_VERSION, WASM, accuracy_words, read_ort_web, write_web
from cifar_jax.export.write import export_run

HOSTILE = ['<b>&"</script>', "\u2028", "<!--", "{{ 1 }}"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A tiny run, ten classes."""
    return trained_model(load_run(tiny_run(tmp_path_factory).path))


@pytest.fixture
def ort_web(tmp_path: Path) -> Path:
    """A directory that looks like onnxruntime-web of another version."""
    dist = tmp_path / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    (dist / MODULE).write_text("/*!\n * ONNX Runtime Web v9.8.7-dev.1\n */\nexport {};")
    (dist / WASM).write_bytes(b"\0asm" + bytes(1000))
    return dist


def written(model: TrainedModel, path: Path, ort_web: Path | None = None) -> str:
    write_web(model, path, ort_web)
    return path.read_text("utf-8")


def element(html: str, name: str) -> str:
    """The content of the script element of this id."""
    found = re.findall(rf'<script type="[a-z/]+" id="{name}">(.*?)</script>', html, re.DOTALL)
    assert len(found) == 1, (name, len(found))
    return str(found[0])


def test_holds_the_model_and_the_runtime(model: TrainedModel, ort_web: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    html = written(model, tmp_path / "page.html", ort_web)
    graph = onnx.load_from_string(base64.b64decode(element(html, "model"), validate=True))
    assert [one.name for one in graph.graph.input] == ["image"]
    for name, file in (("module", MODULE), ("wasm", WASM)):
        assert gzip.decompress(base64.b64decode(element(html, name))) == (ort_web / file).read_bytes()
    assert "onnxruntime-web 9.8.7-dev.1, built into this page" in html and "https://" not in policy(html)
    page = json.loads(element(html, "page"))
    assert page["class_names"] == model.class_names and page["resize"]["side"] == model.side
    # The same run gives the same page to the byte.
    assert written(model, tmp_path / "again.html", ort_web) == html


def test_fetches_what_is_not_built_in(model: TrainedModel, tmp_path: Path) -> None:
    html = written(model, tmp_path / "page.html")
    assert f"onnxruntime-web {ORT_VERSION}, fetched from cdn.jsdelivr.net when the page opens" in html
    assert f"connect-src {CDN};" in policy(html)
    runtime = json.loads(element(html, "page"))["runtime"]
    assert runtime["base"] == CDN
    assert {one["name"]: one["integrity"] for one in runtime["files"].values()} == ORT_PINS
    assert 'id="wasm"' not in html and html.count("(--ort-web DIR).") == 2
    assert len(html) - len(element(html, "model")) < 40_000


def policy(html: str) -> str:
    (found,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', html)
    return str(found).replace("&#39;", "'")


def test_only_its_own_script_and_style_may_run(model: TrainedModel, tmp_path: Path) -> None:
    html = written(model, tmp_path / "page.html")
    for kind, opening in (("script", '<script type="module">'), ("style", "<style>")):
        (content,) = re.findall(rf"{opening}(.*?)</{kind}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy(html)
    assert "default-src 'none'" in policy(html) and "unsafe-inline" not in policy(html)


def test_names_are_escaped(model: TrainedModel, tmp_path: Path) -> None:
    names = [*HOSTILE, *model.class_names[len(HOSTILE) :]]
    data = model.about["data"] | {"dataset": "a</title><script>"}
    hostile = replace(model, about=model.about | {"class_names": names, "data": data})
    plain, html = written(model, tmp_path / "plain.html"), written(hostile, tmp_path / "page.html")
    assert json.loads(element(html, "page"))["class_names"] == names
    assert not re.search(r"[<>&\u2028\u2029]", element(html, "page"))
    assert "<b>&amp;&#34;&lt;/script&gt;</b>" not in html and "&lt;b&gt;&amp;&#34;&lt;/script&gt;" in html
    for tag in ("<script", "</script", "<b>", "</title", "<!--"):
        assert html.count(tag) == plain.count(tag), tag
    assert written(replace(model, about=model.about | {"class_names": ["\udcff"] * 10}), tmp_path / "odd.html")


def test_many_classes_are_folded_away(model: TrainedModel, tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(1200)]
    html = written(replace(model, about=model.about | {"class_names": names}), tmp_path / "page.html")
    assert "All 1,200 classes" in html and html.count("<li>class ") == 1200 and html.count("<b>class ") == 3
    assert "<details>" not in written(model, tmp_path / "few.html")


def test_an_incomplete_run_says_so(model: TrainedModel, tmp_path: Path) -> None:
    summary = model.run.summary | {"status": "interrupted", "epochs": 3, "selected_epoch": 3}
    options = replace(model.run.config, optim=replace(model.run.config.optim, epochs=5))
    html = written(replace(model, run=replace(model.run, summary=summary, config=options)), tmp_path / "page.html")
    sentence = "Training was interrupted after 3 of 5 epochs; these are the weights of epoch 3."
    assert f'<dt>Incomplete</dt>\n<dd id="incomplete">{sentence}</dd>' in html
    assert "Incomplete" not in written(model, tmp_path / "complete.html")


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda dist: (dist / WASM).unlink(), f"has no onnxruntime-web ({WASM}: No such file or directory)"),
        (lambda dist: (dist / MODULE).unlink(), f"has no onnxruntime-web ({MODULE}: No such file or directory)"),
        (lambda dist: (dist / WASM).write_text("<html>"), f"{WASM} in --ort-web"),
        (lambda dist: (dist / MODULE).write_text("export {};"), f"{MODULE} in --ort-web"),
    ],
)
def test_refuses_another_directory(break_it, reason: str, model: TrainedModel, ort_web: Path, tmp_path: Path) -> None:
    break_it(ort_web)
    with pytest.raises(UserError, match=re.escape(f"npm install onnxruntime-web@{ORT_VERSION}")) as refused:
        write_web(model, tmp_path / "page.html", ort_web)
    assert reason in str(refused.value) and str(ort_web) in str(refused.value)
    assert not (tmp_path / "page.html").exists()


def test_refuses_a_function(model: TrainedModel, tmp_path: Path) -> None:
    of_head = replace(model, head=Head(model.head.init, lambda params, x, **_: x, "mine"))
    for changed, name in ((replace(model, backbone=FIELDS), "fields"), (of_head, "mine")):
        with pytest.raises(UserError, match=f"'{name}' is a function, which --format web cannot express"):
            write_web(changed, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_reads_the_package_or_its_dist(ort_web: Path) -> None:
    assert read_ort_web(ort_web) == read_ort_web(ort_web.parent)
    assert read_ort_web(ort_web).version == "9.8.7-dev.1"
    assert read_ort_web(ort_web).pins().keys() == ORT_PINS.keys()


def test_export_of_a_run(tmp_path_factory: pytest.TempPathFactory, ort_web: Path, tmp_path: Path) -> None:
    run, out = load_run(tiny_run(tmp_path_factory).path), tmp_path / "page.html"
    about = export_run(run, "web", out, ort_web=str(ort_web))
    assert about["runtime"] == "onnxruntime-web 9.8.7-dev.1, built into this page, which needs no network"
    assert out.read_text("utf-8").startswith("<!doctype html>")
    with pytest.raises(UserError, match=r"ends in \.html"):
        export_run(run, "web", tmp_path / "page.htm")
    with pytest.raises(UserError, match="--ort-web is for --format web"):
        export_run(run, "onnx", tmp_path / "model.onnx", ort_web=str(ort_web))


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ({"split": "test", "num": 10, "accuracy": None}, ""),
        ({"split": "test", "num": 10, "accuracy": 0.5}, "50.0 % of 10 test images"),
        (
            {"split": "held_out", "num": 2000, "accuracy": 0.5, "accuracy_interval_95": [0.25, 0.75]},
            "50.0 % of 2,000 held-out images, which chose the epoch (95 % interval 25.0 to 75.0 %)",
        ),
    ],
)
def test_accuracy_in_words(scores: dict, words: str) -> None:
    assert accuracy_words(scores) == words
