"""The registry of known weights files, and the local and remote locations of their copies."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_jax.errors import RunError, WeightsError
from cifar_jax.files import cache_root
from cifar_jax.models.preprocess import EvalTransform
from cifar_jax.pretrained.download import NotDownloaded, download, has_digest

# (description, total) -> a context manager whose value is called with the number of bytes done so far
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

# Names used by the libraries that publish the weights.
ALIASES = {
    **dict.fromkeys(("imagenet", "keras"), "keras-resnet50"),
    **dict.fromkeys(("imagenet1k_v1", "v1"), "torchvision-resnet50-v1"),
    **dict.fromkeys(("imagenet1k_v2", "v2", "torchvision", "pytorch", "default"), "torchvision-resnet50-v2"),
}


@dataclass(frozen=True)
class Entry:
    """A known weights file.

    Attributes:
      name: name of the entry, for `--weights`.
      file: name of the file.
      url: URL at which it is published; None if it is included in this project.
      digest: `md5:HEX` or `sha256:HEX`, as published; HEX may be a prefix.
      size: size in bytes.
      variant: the network variant of the weights.
      licence: licence of the weights.
      transform: the publisher's evaluation transform of photos; None if none is stated, which makes it the default.
      top1: ImageNet validation accuracy in percent as stated by the publisher; not measured here.
      about: a human-readable sentence.
    """

    name: str
    file: str
    url: str | None
    digest: str
    size: int
    variant: str
    licence: str
    transform: EvalTransform | None
    top1: str
    about: str


def weights_dir() -> Path:
    """The `weights` directory: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "weights"
    return inside if inside.is_dir() else package.parent / "weights"


def entries() -> dict[str, Entry]:
    """All known files by name, from weights/registry.json."""
    table = json.loads((weights_dir() / "registry.json").read_text(encoding="utf-8"))
    return {name: Entry(name, **fields | {"transform": _transform(fields)}) for name, fields in table.items()}


def _transform(fields: Mapping[str, Any]) -> EvalTransform | None:
    return None if fields["transform"] is None else EvalTransform(**fields["transform"])


def entry_of_file(path: Path, known: Mapping[str, Entry]) -> tuple[Entry | None, str]:
    """Looks a file up among known ones by size and hash.

    Returns:
      Its entry or None, and an error message if it has the size of a known file but another hash.
    """
    size = path.stat().st_size
    same_size = [entry for entry in known.values() if entry.size == size]
    for entry in same_size:
        if has_digest(path, entry.digest):
            return entry, ""
    if not same_size:
        return None, ""
    return None, (
        f"Checksum mismatch: {path} has the size of {same_size[0].name} but not its checksum {same_size[0].digest}; "
        "its weights were modified, or it is corrupt."
    )


def places(entry: Entry, cache_dir: str | None = None) -> Iterator[Path]:
    """Yields possible paths of a copy: in the project, $CIFAR_JAX_WEIGHTS (file or directory), and known caches.

    These are this project's cache, Keras's and PyTorch's.
    """
    if entry.url is None:
        yield weights_dir() / entry.file
    if named := os.environ.get("CIFAR_JAX_WEIGHTS"):
        given = Path(os.path.expanduser(named))
        yield given / entry.file if given.is_dir() else given
    yield downloaded_to(entry, cache_dir)
    yield Path(os.path.expanduser(os.environ.get("KERAS_HOME") or "~/.keras")) / "models" / entry.file
    torch_home = os.environ.get("TORCH_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch")
    yield Path(os.path.expanduser(torch_home)) / "hub" / "checkpoints" / entry.file


def downloaded_to(entry: Entry, cache_dir: str | None = None) -> Path:
    """The path of a download in the cache: one directory per entry, as different files share a name."""
    return cache_root(cache_dir) / "weights" / entry.name / entry.file


def find_local(entry: Entry, cache_dir: str | None = None) -> tuple[Path | None, list[str]]:
    """Searches for a local copy with the right hash.

    Returns:
      Its path or None, and a note on each file that was rejected.
    """
    notes: list[str] = []
    if (named := os.environ.get("CIFAR_JAX_WEIGHTS")) and not os.path.exists(os.path.expanduser(named)):
        notes.append(f"{named} does not exist, though CIFAR_JAX_WEIGHTS names it")
    for path in places(entry, cache_dir):
        if not os.path.isfile(path):
            continue
        try:
            if path.stat().st_size == entry.size and has_digest(path, entry.digest):
                return path, notes
            notes.append(f"{path} is another file (its size or hash differs)")
        except OSError as error:
            notes.append(f"{path} cannot be read ({error.strerror})")
    return None, notes


def sources(entry: Entry) -> list[str]:
    """The sources of a download, in order: each mirror of $CIFAR_JAX_MIRROR, then the published URL.

    A mirror may hold the file as MIRROR/NAME/FILE, like the cache, or as MIRROR/FILE. Two entries share such a name, so
    the file is accepted only if its size and hash match.
    """
    mirrors = filter(None, re.split(r"[,\s]+", os.environ.get("CIFAR_JAX_MIRROR", "")))
    copies = [
        f"{mirror.rstrip('/')}/{path}" for mirror in mirrors for path in (f"{entry.name}/{entry.file}", entry.file)
    ]
    return [*copies, *([entry.url] if entry.url else [])]


def fetch(entry: Entry, cache_dir: str | None = None, progress: Progress | None = None) -> Path:
    """Returns a local copy of a known file, downloading it if necessary; its hash is checked either way.

    Args:
      entry: the file.
      cache_dir: directory of downloads; if None, $CIFAR_JAX_CACHE, or else ~/.cache/cifar_jax.
      progress: makes the progress bar of a download.

    Raises:
      WeightsError: if the file is not on this machine and cannot be downloaded. The message lists each source that was
        tried, the URL, the hash and the path for a manual download.
      RunError: if the download cannot be written.
    """
    found, notes = find_local(entry, cache_dir)
    if found is not None:
        return found
    also = "".join(f" {note}." for note in notes)
    if entry.url is None:
        raise WeightsError(
            f"The weights {entry.name} come with this project, and {weights_dir() / entry.file} is missing or "
            f"incomplete: install it again.{also}"
        )
    target = downloaded_to(entry, cache_dir)
    try:
        with progress(f"Downloading {entry.name}", entry.size) if progress else nullcontext(lambda done: None) as bar:
            download(sources(entry), target, entry.size, entry.digest, bar=bar)
    except NotDownloaded as error:
        why = error.causes[entry.url] if list(error.causes) == [entry.url] else error
        raise WeightsError(
            f"The weights {entry.name} are not on this machine and could not be downloaded ({why}): get {entry.url} "
            f"({entry.digest}) on a machine with a network and put it at {target}, or name it with --weights or "
            f"CIFAR_JAX_WEIGHTS. --weights demo needs no download.{also}"
        ) from error
    except OSError as error:
        raise RunError(
            f"The weights {entry.name} cannot be written to {target} ({error.strerror or error}): make room, or name "
            "another place with --cache-dir or CIFAR_JAX_CACHE."
        ) from error
    return target
