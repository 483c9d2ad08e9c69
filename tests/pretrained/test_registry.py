"""The known files: found by their hash wherever they may lie, downloaded whole or not at all."""

import contextlib
import dataclasses
import gc
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from helpers import files_below, keras_tensors, narrow_networks, write_keras_h5

from cifar_jax.files import sha256_of_file
from cifar_jax.pretrained import WeightsError, load_backbone, registry
from cifar_jax.pretrained.variants import VARIANTS

# pooch leaves it to the garbage collector to close a connection whose answer was an error.
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning", "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
)

CONTENT = bytes(range(256)) * 400  # more than one chunk of the download
NAME = "keras-resnet50"


class Answers(BaseHTTPRequestHandler):
    """Answers every request as the server's `answer` says, and counts them."""

    def do_GET(self):
        self.server.requests += 1
        status, headers, body = self.server.answer
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server():
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        server.requests, server.answer = 0, (200, {"Content-Length": str(len(CONTENT))}, CONTENT)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def entry(server, monkeypatch):
    """The registry holds one file, which the server has."""
    url = f"http://127.0.0.1:{server.server_port}/weights.h5"
    return known(monkeypatch, url)


def known(monkeypatch, url, content=CONTENT, variant="keras"):
    digest = f"md5:{hashlib.md5(content).hexdigest()}"
    entry = registry.Entry(NAME, "weights.h5", url, digest, len(content), variant, "MIT", "For tests.")
    monkeypatch.setattr(registry, "entries", lambda: {NAME: entry})
    return entry


def refusal(tmp_path):
    """Of a fetch: one sentence."""
    with pytest.raises(WeightsError) as caught:
        registry.fetch(NAME, str(tmp_path / "cache"))
    sentence = str(caught.value)
    assert "\n" not in sentence, sentence
    del caught
    gc.collect()  # see pytestmark
    return sentence


def test_a_download_lands_whole_and_once(tmp_path, server, entry):
    said, done = [], []

    @contextlib.contextmanager
    def progress(description, total):
        assert NAME in description and total == len(CONTENT)
        yield done.append

    path = registry.fetch(NAME, str(tmp_path), said.append, progress)
    assert path.read_bytes() == CONTENT and path == registry.downloaded_to(entry, str(tmp_path))
    assert files_below(tmp_path) == ["weights", f"weights/{NAME}", f"weights/{NAME}/weights.h5"]
    assert len(said) == 1 and entry.url in said[0]
    assert done[-1] == len(CONTENT) and done == sorted(done)
    assert registry.fetch(NAME, str(tmp_path), said.append) == path
    assert server.requests == 1 and len(said) == 1


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ((200, {"Content-Length": "3"}, b"abc"), "what came has another hash"),
        ((200, {}, b"<!DOCTYPE html><html>Sign in</html>"), "what came has another hash"),
        ((200, {}, b""), "what came has another hash"),
        ((404, {}, b"not here"), "the server answered 404"),
        ((503, {}, b""), "the server answered 503"),
        ((200, {"Content-Length": str(len(CONTENT))}, CONTENT[: len(CONTENT) // 2]), "the connection broke off"),
        ((302, {"Location": "/elsewhere"}, b""), "Exceeded 30 redirects"),
    ],
)
def test_a_bad_answer_leaves_nothing_and_is_explained(tmp_path, server, entry, answer, cause):
    server.answer = answer
    sentence = refusal(tmp_path)
    assert f"could not be downloaded ({cause}" in sentence
    target = registry.downloaded_to(entry, str(tmp_path / "cache"))
    assert all(part in sentence for part in (entry.url, entry.digest, str(target), "--weights", "CIFAR_JAX_WEIGHTS"))
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("changed", [False, True])
def test_the_start_of_a_hash_is_enough(tmp_path, server, entry, monkeypatch, changed):
    digest = f"sha256:{hashlib.sha256(CONTENT).hexdigest()[:8]}"
    monkeypatch.setattr(registry, "entries", lambda: {NAME: dataclasses.replace(entry, digest=digest)})
    if changed:
        server.answer = (200, {}, CONTENT[:-1] + b"x")
        assert "what came has another hash" in refusal(tmp_path)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    else:
        assert registry.fetch(NAME, str(tmp_path)).read_bytes() == CONTENT


def test_no_server_is_explained(tmp_path, monkeypatch):
    known(monkeypatch, "http://127.0.0.1:1/weights.h5")
    assert "could not be downloaded (no connection to the server)" in refusal(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_server_that_hangs_up_is_explained(tmp_path, server, entry, monkeypatch):
    monkeypatch.setattr(Answers, "do_GET", lambda self: self.connection.close())
    assert "could not be downloaded (no connection to the server)" in refusal(tmp_path)


def test_a_server_that_stalls_is_given_up(tmp_path, entry, monkeypatch):
    stalled = threading.Event()
    monkeypatch.setattr(Answers, "do_GET", lambda self: stalled.wait(5))
    monkeypatch.setattr(registry, "DOWNLOAD_TIMEOUT", 0.1)
    try:
        assert "could not be downloaded (the server did not answer in time)" in refusal(tmp_path)
    finally:
        stalled.set()


def test_a_cache_that_cannot_be_written_is_explained(tmp_path, entry):
    (tmp_path / "cache").write_text("a file")
    assert "could not be downloaded" in refusal(tmp_path) and (tmp_path / "cache").read_text() == "a file"


@pytest.mark.parametrize(
    ("variable", "value", "place"),
    [
        ("CIFAR_JAX_WEIGHTS", "kept/mine.h5", "kept/mine.h5"),
        ("CIFAR_JAX_WEIGHTS", "kept", "kept/weights.h5"),
        ("KERAS_HOME", "keras", "keras/models/weights.h5"),
        ("HOME", "home", "home/.keras/models/weights.h5"),
        ("TORCH_HOME", "torch", "torch/hub/checkpoints/weights.h5"),
        ("HOME", "home", "home/.cache/torch/hub/checkpoints/weights.h5"),
        ("CIFAR_JAX_CACHE", "cache", f"cache/weights/{NAME}/weights.h5"),
    ],
)
def test_a_copy_is_found_by_its_hash(tmp_path, server, entry, monkeypatch, variable, value, place):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    monkeypatch.setenv(variable, str(tmp_path / value))
    assert registry.fetch(NAME) == path
    assert server.requests == 0


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"x"])
def test_a_file_of_the_same_name_but_another_hash_is_not_used(tmp_path, server, entry, monkeypatch, content):
    server.answer = (404, {}, b"")
    places = [tmp_path / "kept" / "weights.h5", tmp_path / "keras" / "models" / "weights.h5"]
    for path in places:
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    monkeypatch.setenv("CIFAR_JAX_WEIGHTS", str(places[0]))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    sentence = refusal(tmp_path)
    assert all(f"{path} is another file (its size or hash differs)." in sentence for path in places), sentence
    assert all(path.read_bytes() == content for path in places)


def test_a_damaged_download_in_the_cache_is_replaced(tmp_path, entry):
    path = registry.downloaded_to(entry, str(tmp_path))
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:100])
    assert registry.fetch(NAME, str(tmp_path)).read_bytes() == CONTENT


def test_a_variable_that_names_nothing_is_mentioned(tmp_path, server, entry, monkeypatch):
    server.answer = (404, {}, b"")
    monkeypatch.setenv("CIFAR_JAX_WEIGHTS", str(tmp_path / "nowhere.h5"))
    assert f"{tmp_path / 'nowhere.h5'} does not exist, though CIFAR_JAX_WEIGHTS names it" in refusal(tmp_path)


def test_a_known_name_loads_as_its_entry_says(tmp_path, monkeypatch):
    """The hash decides the variant: nothing in the tensors' names tells the two of 2016 apart."""
    narrow_networks(monkeypatch)
    path = write_keras_h5(tmp_path / "mine.h5", keras_tensors(family="keras-2016"))
    known(monkeypatch, "http://127.0.0.1:1/", path.read_bytes(), variant="keras-2016-unpadded")
    monkeypatch.setenv("CIFAR_JAX_WEIGHTS", str(path))
    for backbone in (load_backbone(NAME), load_backbone(path)):
        assert backbone.variant == "keras-2016-unpadded (by its hash)" and backbone.config.pool_padding == 0
        assert backbone.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_unknown_name_lists_the_known_ones():
    for name in ("resnet50", "keras", "imagenet"):
        with pytest.raises(WeightsError, match="no known name") as caught:
            load_backbone(name)
        assert all(known_name in str(caught.value) for known_name in [*registry.entries(), "random", "random-w16"])
    with pytest.raises(WeightsError, match="no known name 'keras-resnet'"):
        registry.fetch("keras-resnet")


def test_the_registry_is_whole():
    entries = registry.entries()
    table = json.loads((registry.weights_dir() / "registry.json").read_text())
    assert list(entries) == list(table) and NAME in entries
    for entry in entries.values():
        if entry.url is None:
            assert entry.is_at(registry.weights_dir() / entry.file) and entry.licence == "Apache-2.0"
            continue
        assert entry.url.startswith("https://") and entry.url.endswith(entry.file) and entry.variant in VARIANTS
        algorithm, _, value = entry.digest.partition(":")
        # Keras publishes MD5s; torchvision the start of a SHA-256, in the file's name.
        assert (algorithm, len(bytes.fromhex(value))) in {("md5", 16), ("sha256", 4)}
        assert algorithm == "md5" or entry.file.endswith(f"-{value}.pth")
        assert entry.size > 90e6 and entry.licence
    assert len({entry.digest for entry in entries.values()}) == len(entries)


def test_a_damaged_copy_of_a_known_file_is_named(tmp_path, monkeypatch):
    narrow_networks(monkeypatch)
    path, said = write_keras_h5(tmp_path / "weights.h5", keras_tensors()), []
    content = {"size": path.stat().st_size, "digest": f"sha256:{sha256_of_file(path)[:8]}"}
    entry = registry.entries()[NAME]
    monkeypatch.setattr(registry, "entries", lambda: {NAME: dataclasses.replace(entry, **content)})
    assert load_backbone(path, say=said.append).variant == "keras (by its hash)" and not said
    monkeypatch.setattr(registry, "entries", lambda: {NAME: dataclasses.replace(entry, size=content["size"])})
    assert load_backbone(path, say=said.append).variant == "keras (by its tensor names)"
    assert f"{path} has the size of {NAME} and not its digest, {entry.digest}" in said[0]
