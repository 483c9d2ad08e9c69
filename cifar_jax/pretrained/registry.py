"""The known weights files: what they are, where copies of them lie, here and elsewhere."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from cifar_jax.errors import RunError, WeightsError, no_such
from cifar_jax.files import cache_root
from cifar_jax.pretrained.download import NotDownloaded, download, has_digest

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

# What the libraries that publish the weights call them.
ALIASES = {
    **dict.fromkeys(("imagenet", "keras"), "keras-resnet50"),
    **dict.fromkeys(("imagenet1k_v1", "v1"), "torchvision-resnet50-v1"),
    **dict.fromkeys(("imagenet1k_v2", "v2", "torchvision", "pytorch", "default"), "torchvision-resnet50-v2"),
}


def no_progress(description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A bar that nobody sees: (description, total) -> a context whose value is called with how many are done."""
    return nullcontext(lambda done: None)


@dataclass(frozen=True)
class Entry:
    """A known weights file.

    Attributes:
      name: as `--weights` takes it.
      file: name of the file.
      url: where it is published; None for one that comes with this project.
      digest: `md5:HEX` or `sha256:HEX`, as its publisher gives it; HEX may be the start of it.
      size: in bytes.
      variant: how it is run.
      licence: of the weights.
      resize: how its publisher brought images to the network's size when measuring it. Here they are upsampled.
      top1: percent of the ImageNet validation images, as its publisher states; nothing of it was measured here.
      about: a sentence for people.
    """

    name: str
    file: str
    url: str | None
    digest: str
    size: int
    variant: str
    licence: str
    resize: str
    top1: str
    about: str

    def is_at(self, path: Path) -> bool:
        """Whether a file is this one, by size and hash."""
        return path.stat().st_size == self.size and has_digest(path, self.digest)


def weights_dir() -> Path:
    """The `weights` directory: inside the package once installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "weights"
    return inside if inside.is_dir() else package.parent / "weights"


def entries() -> dict[str, Entry]:
    """All known files by name, from weights/registry.json."""
    table = json.loads((weights_dir() / "registry.json").read_text(encoding="utf-8"))
    return {name: Entry(name, **fields) for name, fields in table.items()}


def entries_of_size(path: Path) -> list[Entry]:
    """The registry's entries for files of a file's size."""
    size = path.stat().st_size
    return [entry for entry in entries().values() if entry.size == size]


def entry_of_file(path: Path) -> Entry | None:
    """The registry's entry for a file, by size and hash, or None."""
    return next((entry for entry in entries_of_size(path) if has_digest(path, entry.digest)), None)


def places(entry: Entry, cache_dir: str | None = None) -> Iterator[Path]:
    """Where a copy may lie: with the project, $CIFAR_JAX_WEIGHTS (file or directory), our cache, Keras's, PyTorch's."""
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
    """Where a download is kept: by entry, as files of different content share a name."""
    return cache_root(cache_dir) / "weights" / entry.name / entry.file


def find_local(entry: Entry, cache_dir: str | None = None) -> tuple[Path | None, list[str]]:
    """Looks for a copy with the right hash.

    Returns:
      Its path or None, and a note on each file that was there but is another.
    """
    notes: list[str] = []
    if (named := os.environ.get("CIFAR_JAX_WEIGHTS")) and not os.path.exists(os.path.expanduser(named)):
        notes.append(f"{named} does not exist, though CIFAR_JAX_WEIGHTS names it")
    for path in places(entry, cache_dir):
        if not os.path.isfile(path):
            continue
        try:
            if entry.is_at(path):
                return path, notes
            notes.append(f"{path} is another file (its size or hash differs)")
        except OSError as error:
            notes.append(f"{path} cannot be read ({error.strerror})")
    return None, notes


def sources(entry: Entry) -> list[str]:
    """Where a download may come from, in order: each mirror of $CIFAR_JAX_MIRROR, then where the file is published.

    In a mirror it may lie as MIRROR/NAME/FILE, as in our cache, or as MIRROR/FILE: two files share that name, and it is
    taken where the size and the hash are right.
    """
    mirrors = filter(None, re.split(r"[,\s]+", os.environ.get("CIFAR_JAX_MIRROR", "")))
    copies = [
        f"{mirror.rstrip('/')}/{path}" for mirror in mirrors for path in (f"{entry.name}/{entry.file}", entry.file)
    ]
    return [*copies, *([entry.url] if entry.url else [])]


def fetch(name: str, cache_dir: str | None = None, progress: Progress = no_progress) -> Path:
    """A local copy of a known file, downloaded if there is none, its hash checked either way.

    Args:
      name: of the registry's entry.
      cache_dir: where downloads are kept; else $CIFAR_JAX_CACHE, else ~/.cache/cifar_jax.
      progress: makes the bar that shows a download.

    Raises:
      WeightsError: when the name is not known, or the file is not here and cannot be downloaded, with each place that
        was tried, the URL, the hash and where to put it.
      RunError: when what is downloaded cannot be written.
    """
    entry = entries().get(name)
    if entry is None:
        raise WeightsError(no_such("known weights file", name, entries(), ALIASES))
    found, notes = find_local(entry, cache_dir)
    if found is not None:
        return found
    also = "".join(f" {note}." for note in notes)
    if entry.url is None:
        raise WeightsError(
            f"The weights {name} come with this project, and {weights_dir() / entry.file} is not there whole: install "
            f"it again.{also}"
        )
    target = downloaded_to(entry, cache_dir)
    try:
        with progress(f"Downloading {name}", entry.size) as bar:
            download(sources(entry), target, entry.size, entry.digest, bar=bar)
    except NotDownloaded as error:
        why = error.causes[entry.url] if list(error.causes) == [entry.url] else error
        raise WeightsError(
            f"The weights {name} are not on this machine and could not be downloaded ({why}): get {entry.url} "
            f"({entry.digest}) on a machine with a network and put it at {target}, or name it with --weights or "
            f"CIFAR_JAX_WEIGHTS.{also}"
        ) from error
    except OSError as error:
        raise RunError(
            f"The weights {name} cannot be written to {target} ({error.strerror or error}): make room, or name another "
            f"place with --cache-dir or CIFAR_JAX_CACHE."
        ) from error
    return target
