"""Export to a web page: one HTML file that says what a photo shows, without a server and without sending it anywhere.

The page has the model as ONNX. onnxruntime-web, which runs it, is built into the page from a copy of that package, or
fetched from a CDN when the page opens, of the version and with the checksums below.
"""

import base64
import gzip
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cifar_jax.errors import UserError
from cifar_jax.export.card_facts import incomplete
from cifar_jax.export.onnx_file import onnx_bytes
from cifar_jax.export.trained_model import TrainedModel
from cifar_jax.models.resnet import network_name

# `print(read_ort_web("node_modules/onnxruntime-web/dist").pins())` after `npm install onnxruntime-web@VERSION` gives
# the values for another version. The module has the JavaScript of the runtime and the glue of the WebAssembly.
ORT_VERSION = "1.30.0"
MODULE, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
ORT_PINS = {
    MODULE: "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    WASM: "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
}
CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{ORT_VERSION}/dist/"

FEW = 12  # classes that a sentence may list
TEMPLATES = Environment(
    loader=PackageLoader("cifar_jax.export"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


class OrtWeb(NamedTuple):
    """A copy of onnxruntime-web.

    Attributes:
      version: its version.
      files: contents of its files that a page needs, by name.
    """

    version: str
    files: Mapping[str, bytes]

    def pins(self) -> dict[str, str]:
        """Checksums of the files, as a browser's `fetch` takes them."""
        return {name: f"sha384-{_digest('sha384', content)}" for name, content in self.files.items()}


def read_ort_web(directory: str | Path) -> OrtWeb:
    """Reads a copy of onnxruntime-web: the directory `dist` of the npm package, or the package's own.

    Raises:
      UserError: if it is not such a directory.
    """
    path = Path(directory).expanduser()
    path = path / "dist" if (path / "dist").is_dir() else path
    advice = (
        f"install it with `npm install onnxruntime-web@{ORT_VERSION}` and name node_modules/onnxruntime-web/dist, or "
        "leave --ort-web out for a page that fetches it."
    )
    try:
        files = {name: (path / name).read_bytes() for name in ORT_PINS}
    except OSError as error:
        reason = f"{Path(error.filename).name}: {error.strerror}"
        raise UserError(f"--ort-web {directory} has no onnxruntime-web ({reason}); {advice}") from error
    version = re.search(rb"ONNX Runtime Web v([\w.+-]+)", files[MODULE][:1000])
    if version is None or not files[WASM].startswith(b"\0asm"):
        name = MODULE if version is None else WASM
        raise UserError(f"{name} in --ort-web {directory} is not that of onnxruntime-web; {advice}")
    return OrtWeb(version[1].decode(), files)


def write_web(model: TrainedModel, path: Path, ort_web: str | Path | None = None, cdn: str = CDN) -> dict[str, str]:
    """Writes a classifier as a web page. Returns what is worth saying about it.

    Args:
      model: the classifier.
      path: the file to write.
      ort_web: a copy of onnxruntime-web to build into the page, see `read_ort_web`; if None, the page fetches it.
      cdn: address that the page fetches it from, with the files of `ORT_PINS` below it; they are run only if they have
        those checksums.

    Raises:
      UserError: if `ort_web` is not such a copy, the package onnx is not installed, or the backbone or the head is a
        function.
    """
    network = _network_words(model)  # first, as it names this format in what it refuses, not the ONNX inside
    runtime = None if ort_web is None else read_ort_web(ort_web)
    content, _ = onnx_bytes(model)
    page = page_of(model, content, network, runtime, cdn)
    html = page.encode("utf-8", "replace")  # names of folders may be no Unicode
    path.write_bytes(html)
    rest = (len(html) - 4 * -(-len(content) // 3)) / 1e6  # base64 makes four characters of three bytes
    return {"runtime": _runtime_words(runtime, cdn), "page": f"{rest:,.2f} MB without the model; open it in a browser"}


def page_of(model: TrainedModel, content: bytes, network: str, runtime: OrtWeb | None, cdn: str) -> str:
    """Returns the HTML of a page that runs the ONNX model `content`, described as `network`; see `write_web`."""
    about, templates = model.about, TEMPLATES.loader
    assert templates is not None
    source = {name: templates.get_source(TEMPLATES, name)[0] for name in ("web.css", "resize.js", "web.js")}
    script, style = source["resize.js"] + source["web.js"], source["web.css"]
    ids = {"module": MODULE, "wasm": WASM}
    page = {
        "class_names": model.class_names,
        "resize": {"side": model.side, "shorter": 0, "interpolation": "bilinear"} | model.resize.to_json(),
        "runtime": {
            "base": None if runtime else cdn,
            "files": {id_: {"id": id_, "name": name, "integrity": ORT_PINS[name]} for id_, name in ids.items()},
        },
    }
    built_in = (
        {id_: _base64(gzip.compress(runtime.files[name], mtime=0)) for id_, name in ids.items()} if runtime else {}
    )
    return TEMPLATES.get_template("web.html").render(
        policy=_policy(script, style, None if runtime else cdn),
        style=Markup(style),
        script=Markup(script),
        page=page,
        built_in=built_in,
        model=_base64(content),
        class_names=model.class_names,
        few=len(model.class_names) <= FEW,
        side=model.side,
        data_set=about["data"]["dataset"],
        incomplete=incomplete(model),
        accuracy=accuracy_words(about["scores"]),
        network=network,
        input=_input_words(model),
        runtime=_runtime_words(runtime, cdn),
        version=about["cifar_jax"],
        run_sha256=about["run_sha256"],
    )


def accuracy_words(scores: Mapping[str, Any]) -> str:
    """Describes the accuracy of a run with its interval; empty if it was not measured."""
    if scores.get("accuracy") is None:
        return ""
    images = "test images" if scores["split"] == "test" else "held-out images, which chose the epoch"
    found = f"{100 * scores['accuracy']:.1f} % of {scores['num']:,} {images}"
    if not scores.get("accuracy_interval_95"):
        return found
    low, high = (100 * bound for bound in scores["accuracy_interval_95"])
    return f"{found} (95 % interval {low:.1f} to {high:.1f} %)"


def _network_words(model: TrainedModel) -> str:
    backbone, network = model.about["backbone"], network_name(model.resnet("web").config)
    layers = len(model.dense_layers("web"))
    head = "one dense layer" if layers == 1 else f"{layers} dense layers"
    licence = f" ({backbone['licence']})" if backbone["licence"] else ""
    trained = "all layers were" if backbone["trained_layers"] == "all" else "only the head was"
    return (
        f"{network}, weights {backbone['weights']}{licence}, and a head of {head}; {trained} trained on these classes"
    )


def _input_words(model: TrainedModel) -> str:
    side, shorter = model.side, model.resize.shorter
    if model.resize.method == "eval-transform":
        return f"The centre of the picture, {side} by {side} pixels, after its shorter side is resized to {shorter}"
    return f"The largest centred square of the picture, reduced to {side} by {side} pixels"


def _runtime_words(runtime: OrtWeb | None, cdn: str) -> str:
    if runtime is not None:
        return f"onnxruntime-web {runtime.version}, built into this page, which needs no network"
    host = urlsplit(cdn).netloc
    return f"onnxruntime-web {ORT_VERSION}, fetched from {host} when the page opens and verified by checksum"


def _policy(script: str, style: str, cdn: str | None) -> str:
    """The Content-Security-Policy of a page: it runs what is in it, and connects to nothing but the CDN."""
    rules = {
        "default-src": "'none'",
        "script-src": f"'sha256-{_digest('sha256', script.encode())}' blob: 'wasm-unsafe-eval'",
        "style-src": f"'sha256-{_digest('sha256', style.encode())}'",
        "img-src": "blob: data:",
        "connect-src": cdn or "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _digest(algorithm: str, content: bytes) -> str:
    return base64.b64encode(hashlib.new(algorithm, content).digest()).decode()


def _base64(content: bytes) -> Markup:
    return Markup(base64.b64encode(content).decode())
