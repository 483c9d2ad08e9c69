"""A folder of pictures as a data set: one folder a class, in all or in each of `train`, `test` and `val`."""

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cifar_jax.data.dataset import Dataset, Splits
from cifar_jax.data.pictures import DIGEST_BYTES, Pictures, content_digest
from cifar_jax.data.pipeline import num_threads
from cifar_jax.data.sources.images import SUFFIXES, ImageError, decode, read_bytes, upright_size
from cifar_jax.errors import UserError, some_of

# Names of folders that hold a split, in any case.
SPLITS = {
    "train": ("train", "training", "training_set"),
    "test": ("test", "testing", "test_set"),
    "val": ("val", "valid", "validation", "validation_set"),
}
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
LAYOUT = "a folder for each class, as ROOT/CLASS/*.jpg or ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg"

logger = logging.getLogger(__name__)


class Listing(NamedTuple):
    """Picture files of a split by class, and how many other files there were."""

    root: Path
    files: dict[str, list[str]]
    ignored: int


def is_divided_by_class(root: Path) -> bool:
    """Whether a folder has no pictures directly in it, but several folders, or one of training images."""
    folders = _folders(root)
    is_split = any(SPLIT_OF.get(entry.name.lower()) == "train" and _folders(Path(entry.path)) for entry in folders)
    return (len(folders) > 1 or is_split) and not _has_pictures(root)


def list_folder(root: Path, min_classes: int = 2) -> dict[str, Listing]:
    """Lists the pictures of a folder by split, without opening any; see `load_folder`."""
    listings = {split: _list_classes(path) for split, path in _split_dirs(root).items()}
    train = listings["train"]
    for split, listing in listings.items():
        _check_classes(split, listing, train)
    for name in train.files:
        if name != name.encode(errors="replace").decode():  # figures could not show it
            raise UserError(f"The name of the folder {name!a} in {train.root} is not readable text; rename it.")
    if len(train.files) < min_classes:
        only = train.root / next(iter(train.files))
        meant = f" Did you mean --dataset {only}?" if len(_folders(only)) >= min_classes else ""
        raise UserError(
            f"{train.root} has a single class, {only.name!r}: there is nothing to tell apart.{meant} --dataset takes "
            f"{LAYOUT}."
        )
    return listings


def load_folder(root: Path, skip_unreadable: bool = False, min_classes: int = 2) -> Splits:
    """Lists and fingerprints a folder of pictures. Pixels are read later, when they are asked for.

    Classes are the sorted names of the folders; pictures at any depth below belong to them, in the order of
    torchvision's `ImageFolder`. Links to files are followed, links to folders are not. Hidden files and files without
    the extension of a picture are ignored and counted.

    Args:
      root: `ROOT/CLASS/...`, or `ROOT/{train,test,val}/CLASS/...`; see `SPLITS` for other names of the splits.
      skip_unreadable: whether to leave out files that cannot be decoded, which are then all decoded once here.
      min_classes: 1 to allow a single class, which nothing can be trained on.

    Returns:
      The splits that there are; without a folder of test images `test` is empty.

    Raises:
      UserError: if the folder is laid out otherwise, has a class without pictures or a single class, has other classes
        in another split than in the training images, or a file is no picture.
    """
    listings = list_folder(root, min_classes)
    class_names = tuple(sorted(listings["train"].files))
    labels = {name: label for label, name in enumerate(class_names)}
    parts, skipped = {}, list[str]()
    for split, listing in listings.items():
        if missing := sorted(set(class_names) - set(listing.files)):
            logger.warning(f"{listing.root} has no pictures of {some_of(missing)}.")
        files = [(path, labels[name]) for name in sorted(listing.files) for path in listing.files[name]]
        parts[split], unreadable = fingerprinted(files, skip_unreadable)
        skipped += unreadable
        if empty := [class_names[label] for label in range(len(class_names)) if _lost(label, files, parts[split])]:
            raise UserError(f"No picture of {some_of(empty)} in {listing.root} can be read.")
    ignored = sum(listing.ignored for listing in listings.values())
    notes = []
    if ignored:
        notes.append(f"{ignored:,} other {'file' if ignored == 1 else 'files'} ignored")
    if skipped:
        notes.append(f"{len(skipped):,} unreadable {'file' if len(skipped) == 1 else 'files'} skipped")
        logger.warning(f"Skipped {len(skipped):,} files that cannot be read: {some_of(skipped)}.")
    empty_part = parts["train"].take(slice(0, 0))
    name = root.resolve().name or str(root)
    return Splits(
        parts["train"],
        parts.get("test", empty_part),
        class_names,
        name,
        "",
        parts.get("val"),
        tuple(notes),
        tuple(skipped),
    )


def _lost(label: int, files: Sequence[tuple[str, int]], part: Dataset) -> bool:
    return any(of == label for _, of in files) and not (part.labels == label).any()


def _split_dirs(root: Path) -> dict[str, Path]:
    """The folder of each split; the root itself as `train` if it holds the classes."""
    found: dict[str, Path] = {}
    for entry in _folders(root):
        split = SPLIT_OF.get(entry.name.lower())
        # A class may be called `train`: a split has folders of its own and no pictures beside them.
        if split and _folders(Path(entry.path)) and not _has_pictures(Path(entry.path)):
            if split in found:
                raise UserError(f"{root} has two folders of {split} images, {found[split].name} and {entry.name}.")
            found[split] = Path(entry.path)
    if "train" in found:
        if others := [entry.name for entry in _folders(root) if Path(entry.path) not in found.values()]:
            logger.info(
                f"{root} is divided into {', '.join(p.name for p in found.values())}; ignoring {some_of(others)}."
            )
        return dict(sorted(found.items(), key=lambda item: list(SPLITS).index(item[0])))
    if found:
        names = ", ".join(path.name for path in found.values())
        raise UserError(f"{root} has {names} but no folder `train`; add one, or name the folder that has the classes.")
    return {"train": root}


def _folders(root: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in _entries(root) if entry.is_dir(follow_symlinks=False) and entry.name[0] != "."]


def _entries(root: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{root} cannot be read ({error.strerror}); check the folder and its permissions.") from error


def _is_picture(entry: os.DirEntry[str]) -> bool:
    # No link to a folder, no pipe, which would be waited for; a broken link is a picture that cannot be read.
    # A link that leads to itself is an error to DirEntry, and not to os.path.
    is_file = os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()
    is_file = is_file or (entry.is_symlink() and not os.path.exists(entry.path))
    return is_file and entry.name[0] != "." and entry.name.lower().endswith(SUFFIXES)


def _has_pictures(root: Path) -> bool:
    return any(_is_picture(entry) for entry in _entries(root))


def _list_classes(root: Path) -> Listing:
    files: dict[str, list[str]] = {}
    ignored = 0
    for entry in _entries(root):
        if entry.is_dir(follow_symlinks=False) and entry.name[0] != ".":
            found, others = [], 0
            for directory, name, is_picture in walk(entry.path):
                if is_picture:
                    found.append((directory, name))
                else:
                    others += 1
            files[entry.name] = [os.path.join(*pair) for pair in sorted(found)]
            ignored += others
        else:
            ignored += 1
    if not files:
        pictures = " It has pictures, but no folders." if _has_pictures(root) else ""
        raise UserError(f"{root} has no folders of pictures.{pictures} --dataset takes {LAYOUT}.")
    return Listing(root, files, ignored)


def walk(directory: str) -> Iterator[tuple[str, str, bool]]:
    """Yields directory and name of every file below a directory, and whether it has a picture's name.

    Links to files are followed, links to folders are not; hidden folders are left out.

    Raises:
      UserError: if a directory cannot be read.
    """
    for entry in _entries(directory):
        if entry.is_dir(follow_symlinks=False) and entry.name[0] != ".":
            yield from walk(entry.path)
        else:
            yield directory, entry.name, _is_picture(entry)


def _check_classes(split: str, listing: Listing, train: Listing) -> None:
    path, class_names = listing.root, sorted(train.files)
    if empty := [name for name, files in listing.files.items() if not files]:
        few = f"class {empty[0]!r} has" if len(empty) == 1 else f"classes {some_of(empty)} have"
        raise UserError(f"The {few} no pictures in {path}; add some, or remove the folder.")
    if split == "train":
        return
    if unknown := sorted(set(listing.files) - set(class_names)):
        raise UserError(
            f"{path} has pictures of {some_of(unknown)}, but {train.root} has none; the {split} images must have the "
            "classes of the training images."
        )


def fingerprinted(files: Sequence[tuple[str, int]], skip_unreadable: bool) -> tuple[Dataset, list[str]]:
    """Reads digest and size of each file, several at a time. Returns the examples, and the files that were skipped.

    Args:
      files: paths, each with its label.
      skip_unreadable: whether to leave out files that cannot be decoded, which are then all decoded once here.

    Raises:
      UserError: for a file that is no picture, unless it is skipped.
    """

    def look(path: str) -> tuple[bytes, tuple[int, int]] | ImageError:
        try:
            content = read_bytes(path)
            size = decode(content, path).size if skip_unreadable else upright_size(content, path)
            return content_digest(content), size
        except ImageError as error:
            return error

    with ThreadPoolExecutor(num_threads()) as pool:
        looked = list(pool.map(look, [path for path, _ in files]))
    errors = [one for one in looked if isinstance(one, ImageError)]
    if errors and not skip_unreadable:
        more = f" {len(errors) - 1:,} more files cannot be read either." if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more} --skip-unreadable leaves such files out.")
    kept = [
        (path, label, *found)
        for (path, label), found in zip(files, looked, strict=True)
        if not isinstance(found, ImageError)
    ]
    names = [path for path, *_ in kept]
    digests = np.frombuffer(b"".join(digest for _, _, digest, _ in kept), np.uint8).reshape(-1, DIGEST_BYTES)
    sizes = np.array([size for *_, size in kept], np.int32).reshape(-1, 2)
    labels = np.array([label for _, label, *_ in kept], np.int32)

    def read(row: int) -> Image.Image:
        content = read_bytes(names[row])
        if content_digest(content) != digests[row].tobytes():
            changed = "has changed since the data set was listed"
            raise ImageError(names[row], changed, "leave the pictures alone during a run, and start again")
        try:
            return decode(content, names[row])
        except ImageError as error:  # beyond its header, which was read before
            advice = "replace it, or leave it out with --skip-unreadable, in a new run"
            raise ImageError(names[row], error.reason, advice) from error

    rows = np.arange(len(names))
    skipped = [path for (path, _), found in zip(files, looked, strict=True) if isinstance(found, ImageError)]
    return Dataset(Pictures(read, names, digests, sizes, rows), labels), skipped
