"""onnxruntime-web from a server: run if it is the right one, refused in words if it is another."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from cifar_jax.export.trained_model import TrainedModel
from cifar_jax.export.web import MODULE, ORT_PINS, ORT_VERSION, WASM, read_ort_web

pytestmark = pytest.mark.browser


class Handler(SimpleHTTPRequestHandler):
    """Serves files to pages of any origin, as a CDN does, and quietly."""

    def end_headers(self) -> None:
        self.send_header("Access-Control-Allow-Origin", "*")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def cdn(ort_web: str, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory with the files of onnxruntime-web, and the address at which it is served."""
    directory = tmp_path / "served"
    directory.mkdir()
    for name in ORT_PINS:
        (directory / name).write_bytes((Path(ort_web) / name).read_bytes())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(directory)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield directory, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (80, 60), (30, 120, 200)).save(path)
    return path


def test_pins(ort_web: str) -> None:
    """The checksums in the code are those of the npm package of the version in the code."""
    found = read_ort_web(ort_web)
    assert (found.version, found.pins()) == (ORT_VERSION, ORT_PINS)


def test_fetched(
    cdn: tuple[Path, str], shapes_model: TrainedModel, make_page: Callable[..., Any], picture: Path
) -> None:
    _, address = cdn
    built_in = make_page(shapes_model).give(picture)[0]
    page = make_page(shapes_model, ort_web=None, cdn=address)
    (answer,) = page.give(picture)
    assert answer.probabilities == built_in.probabilities
    assert sorted(url for url in page.requests() if url.startswith("http")) == sorted(
        address + name for name in ORT_PINS
    )
    about = f"onnxruntime-web {ORT_VERSION}, fetched from 127.0.0.1:"
    assert about in page.one("#runtime").text and page.console() == []


@pytest.mark.parametrize("name", [MODULE, WASM])
def test_altered(
    name: str, cdn: tuple[Path, str], shapes_model: TrainedModel, make_page: Callable[..., Any], picture: Path
) -> None:
    directory, address = cdn
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    page = make_page(shapes_model, ort_web=None, cdn=address).loaded()
    host = urlsplit(address).netloc
    assert page.one("#failure").text == (
        f"{name} from {host} is not the file that this page was made with (checksum mismatch), so it is not run. "
        "Export the page again with the runtime built in (--ort-web DIR)."
    )
    assert page.give(picture)[0].error == "Not classified, as the model cannot be run; the reason is above."


@pytest.mark.parametrize("absent", ["file", "server"])
def test_unreachable(
    absent: str, cdn: tuple[Path, str], shapes_model: TrainedModel, make_page: Callable[..., Any]
) -> None:
    directory, address = cdn
    (directory / WASM).unlink()
    page = make_page(shapes_model, ort_web=None, cdn=address if absent == "file" else "http://127.0.0.1:9/").loaded()
    failure = page.one("#failure").text
    assert "cannot be reached, from which this page fetches what runs the model (ort" in failure
    assert "Connect to the internet and load the page again" in failure and failure.endswith("(--ort-web DIR).")
