"""Known files: found by their hash wherever they are, downloaded whole or not at all."""

import contextlib
import dataclasses
import hashlib
import json

import pytest
from helpers import files_below, full_disk, keras_tensors, write_keras_h5
from robustness.file_server import PAGE, by_path, sends, serving, whole

from cifar_jax.errors import RunError
from cifar_jax.models.preprocess import EvalTransform
from cifar_jax.pretrained import WeightsError, load_backbone, registry
from cifar_jax.pretrained.download import has_digest
from cifar_jax.pretrained.variants import VARIANTS

CONTENT = bytes(range(256)) * 400  # more than one chunk of the download
OTHER = CONTENT[::-1]
NAME = "keras-resnet50"


@pytest.fixture
def server():
    with serving(whole(CONTENT)) as server:
        yield server


@pytest.fixture
def entry(server):
    """The registry's entry for the one file that the server has."""
    return make_entry(server.url())


def make_entry(url, content=CONTENT, variant="keras"):
    digest = f"md5:{hashlib.md5(content).hexdigest()}"
    return registry.Entry(NAME, "weights.h5", url, digest, len(content), variant, "MIT", None, "", "For tests.")


def refused_fetch(entry, tmp_path):
    """Returns the one-line error message of a fetch."""
    with pytest.raises(WeightsError) as caught:
        registry.fetch(entry, str(tmp_path / "cache"))
    message = str(caught.value)
    assert "\n" not in message, message
    return message


def test_download_arrives_whole_and_once(tmp_path, server, entry, log):
    done = []

    @contextlib.contextmanager
    def progress(description, total):
        assert NAME in description and total == len(CONTENT)
        yield done.append

    path = registry.fetch(entry, str(tmp_path), progress)
    assert path.read_bytes() == CONTENT and path == registry.downloaded_to(entry, str(tmp_path))
    assert files_below(tmp_path) == ["weights", f"weights/{NAME}", f"weights/{NAME}/weights.h5"]
    (message,) = log.messages
    assert entry.url in message
    assert done[-1] == len(CONTENT) and done == sorted(done)
    assert registry.fetch(entry, str(tmp_path)) == path and len(server.asked) == 1


def test_failed_download_leaves_nothing_and_the_error_names_the_next_step(tmp_path, server, entry):
    server.answers = [whole(OTHER)]
    target = registry.downloaded_to(entry, str(tmp_path / "cache"))
    message = refused_fetch(entry, tmp_path)
    for part in (
        "(what came has another hash)",
        entry.url,
        entry.digest,
        str(target),
        "--weights or CIFAR_JAX_WEIGHTS",
    ):
        assert part in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("separator", [",", "\n"])
def test_mirrors_are_tried_first_and_in_order(tmp_path, server, entry, monkeypatch, separator):
    """A mirror holds a file under its entry's name or without it; a file with another hash is skipped."""
    bases = [str(tmp_path / "share"), server.url("one/"), server.url("two")]
    monkeypatch.setenv("CIFAR_JAX_MIRROR", separator.join(["", *bases, ""]))
    server.answers = [by_path({"/one/weights.h5": whole(OTHER), f"/two/{NAME}/weights.h5": whole(CONTENT)})]
    assert registry.fetch(entry, str(tmp_path / "cache")).read_bytes() == CONTENT
    assert server.asked == [f"/one/{NAME}/weights.h5", "/one/weights.h5", f"/two/{NAME}/weights.h5"]


def test_error_names_each_source(tmp_path, server, entry, monkeypatch):
    monkeypatch.setenv("CIFAR_JAX_MIRROR", f"{tmp_path}/share http://192.0.2.1 {server.url('m')}")
    server.answers = [by_path({"/m/weights.h5": sends(PAGE)})]
    message = refused_fetch(entry, tmp_path)
    for place, cause in {
        f"{tmp_path}/share/{NAME}/weights.h5": "No such file or directory",
        f"{tmp_path}/share/weights.h5": "No such file or directory",
        f"http://192.0.2.1/{NAME}/weights.h5": f"http://192.0.2.1/{NAME}/weights.h5 is not https",
        server.url(f"m/{NAME}/weights.h5"): "the server answered 404",
        server.url("m/weights.h5"): "received a web page instead of the file",
        entry.url: "the server answered 404",
    }.items():
        assert f"{place}: {cause}" in message


def test_cache_is_a_mirror(tmp_path, server, entry, monkeypatch):
    registry.fetch(entry, str(tmp_path / "shared"))
    server.asked.clear()
    monkeypatch.setenv("CIFAR_JAX_MIRROR", str(tmp_path / "shared" / "weights"))
    path = registry.fetch(entry, str(tmp_path / "mine"))
    assert path.read_bytes() == CONTENT and path.is_relative_to(tmp_path / "mine") and not server.asked


def test_unwritable_cache_is_reported(tmp_path, entry):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(RunError, match=rf"{NAME} cannot be written to {tmp_path}.*--cache-dir or CIFAR_JAX_CACHE"):
        registry.fetch(entry, str(tmp_path / "cache"))
    assert (tmp_path / "cache").read_text() == "a file"


def test_full_disk_is_reported(tmp_path, entry):
    with full_disk(at=70_000), pytest.raises(RunError, match=r"File too large\): make room"):
        registry.fetch(entry, str(tmp_path))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


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
def test_copy_is_found_by_its_hash(tmp_path, server, entry, monkeypatch, variable, value, place):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    monkeypatch.setenv(variable, str(tmp_path / value))
    assert registry.fetch(entry) == path
    assert not server.asked


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"x"])
def test_file_of_the_same_name_but_another_hash_is_not_used(tmp_path, server, entry, monkeypatch, content):
    server.answers = [sends(b"", 404)]
    places = [tmp_path / "kept" / "weights.h5", tmp_path / "keras" / "models" / "weights.h5"]
    for path in places:
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    monkeypatch.setenv("CIFAR_JAX_WEIGHTS", str(places[0]))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    message = refused_fetch(entry, tmp_path)
    assert all(f"{path} is another file (its size or hash differs)." in message for path in places), message
    assert all(path.read_bytes() == content for path in places)


def test_corrupt_download_in_the_cache_is_replaced(tmp_path, entry):
    path = registry.downloaded_to(entry, str(tmp_path))
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:100])
    assert registry.fetch(entry, str(tmp_path)).read_bytes() == CONTENT


def test_variable_that_names_a_missing_file_is_reported(tmp_path, server, entry, monkeypatch):
    server.answers = [sends(b"", 404)]
    monkeypatch.setenv("CIFAR_JAX_WEIGHTS", str(tmp_path / "nowhere.h5"))
    message = refused_fetch(entry, tmp_path)
    assert f"{tmp_path / 'nowhere.h5'} does not exist, though CIFAR_JAX_WEIGHTS names it" in message


@pytest.mark.usefixtures("narrow_resnet")
def test_hash_decides_the_variant(tmp_path, monkeypatch):
    """The tensor names of the two variants of 2016 are the same."""
    path = write_keras_h5(tmp_path / "mine.h5", keras_tensors(family="keras-2016"))
    known = {NAME: make_entry("http://127.0.0.1:1/", path.read_bytes(), variant="keras-2016-unpadded")}
    monkeypatch.setenv("CIFAR_JAX_WEIGHTS", str(path))
    for backbone in (load_backbone(NAME, known=known), load_backbone(path, known=known)):
        assert backbone.variant == "keras-2016-unpadded (by its hash)" and backbone.config.pool_padding == 0
        assert backbone.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.usefixtures("narrow_resnet")
def test_hash_decides_the_evaluation_transform(tmp_path):
    path = write_keras_h5(tmp_path / "mine.h5", keras_tensors())
    entry = make_entry("http://127.0.0.1:1/", path.read_bytes())
    stated = dataclasses.replace(entry, transform=EvalTransform(232, 224, "bicubic"))
    assert load_backbone(path, known={NAME: stated}).transform == stated.transform
    assert load_backbone(path, known={NAME: entry}).transform == load_backbone(path).transform == EvalTransform()


@pytest.mark.usefixtures("narrow_resnet")
def test_modified_copy_of_a_known_file_is_reported(tmp_path, log):
    path = write_keras_h5(tmp_path / "weights.h5", keras_tensors())
    entry = dataclasses.replace(registry.entries()[NAME], size=path.stat().st_size)
    assert load_backbone(path, known={NAME: entry}).variant == "keras (by its tensor names)"
    assert f"{path} has the size of {NAME} but not its checksum {entry.digest}" in log.messages[0]


@pytest.mark.parametrize("name", ["resnet50", "imagenet"])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(WeightsError, match=r"No file or known weights.*Did you mean keras-resnet50\?") as caught:
        load_backbone(name)
    assert all(known_name in str(caught.value) for known_name in [*registry.entries(), "random", "random-w16"])


def test_registry_is_complete():
    entries = registry.entries()
    table = json.loads((registry.weights_dir() / "registry.json").read_text())
    assert list(entries) == list(table) and NAME in entries
    for entry in entries.values():
        if entry.url is None:
            path = registry.weights_dir() / entry.file
            assert path.stat().st_size == entry.size and has_digest(path, entry.digest)
            assert entry.licence == "Apache-2.0"
            continue
        assert entry.url.startswith("https://") and entry.url.endswith(entry.file) and entry.variant in VARIANTS
        algorithm, _, value = entry.digest.partition(":")
        # Keras publishes MD5s; torchvision the start of a SHA-256, in the file's name.
        assert (algorithm, len(bytes.fromhex(value))) in {("md5", 16), ("sha256", 4)}
        assert algorithm == "md5" or entry.file.endswith(f"-{value}.pth")
        assert entry.size > 90e6 and entry.licence
    assert len({entry.digest for entry in entries.values()}) == len(entries)


def test_registry_states_the_transforms_of_torchvision_only():
    """tests/parity compares them with torchvision's own."""
    stated = {name: entry.transform for name, entry in registry.entries().items() if entry.transform}
    assert stated == {
        "torchvision-resnet50-v1": EvalTransform(256, 224, "bilinear"),
        "torchvision-resnet50-v2": EvalTransform(232, 224, "bilinear"),
    }


def test_tables_in_the_readme_are_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(registry.weights_dir())
    from make_tables import README, with_tables

    text = README.read_text(encoding="utf-8")
    assert text == with_tables(text), "PYTHONPATH=. python weights/make_tables.py writes them again"
    for entry in registry.entries().values():
        assert all(part in text for part in (entry.name, entry.digest, str(entry.size), entry.licence, entry.top1))
