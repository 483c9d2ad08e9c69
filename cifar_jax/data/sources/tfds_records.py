"""Examples of a prepared TFDS set, read once: small images as arrays, others packed for random access.

TFRecord files are read with TensorFlow. ArrayRecord files are not, and pictures in them need no packing.
"""

import contextlib
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, UInt8
from PIL import Image

from cifar_jax.data.pictures import DIGEST_BYTES, Pictures, content_digest
from cifar_jax.data.sources.images import ImageError, decode, upright_size
from cifar_jax.data.sources.tfds_contents import ADVICE, Contents, describe, has_random_access, refusing_corrupt
from cifar_jax.data.sources.tfds_library import cause, quiet_tensorflow, quiet_tfds
from cifar_jax.errors import UserError

BATCH = 32  # records that TensorFlow hands over at a time
RENEW = "prepare the data set again"

logger = logging.getLogger(__name__)

Record = tuple[bytes, list[int]]  # an encoded picture and its labels, -1 where one is unknown


def read_set(source: Path, check: Callable[[Contents], object], packed: Path) -> tuple[Contents, dict[str, Any]]:
    """Reads all examples of a prepared set once.

    Args:
      source: directory of the set.
      check: called with what the set contains before its examples are read; may raise UserError.
      packed: file that the encoded pictures are written to, as an array, if they have to be packed.

    Returns:
      What the set contains, and by `{split}_{name}`: `labels`, int32 [n, labels]; of pixels `images`, uint8
      [n, h, w, 3]; of pictures `sizes`, int32 [n, 2], and `digests`, uint8 [n, 16]; of packed ones `ends`, int64 [n],
      the end of each in the file, which is `content`.

    Raises:
      UserError: if the set is corrupt, or consists of other things than images and classes, or there is no room.
    """
    with quiet_tfds(source) as tfds, refusing_corrupt(source):
        builder = tfds.builder_from_directory(source)
        contents, random = describe(tfds, builder.info, source), has_random_access(builder.info)
    check(contents)
    if contents.kind == "packed":
        logger.info(f"Packing the pictures of {source} into the cache, once.")
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        tfds = stack.enter_context(quiet_tfds(source) if random else quiet_tensorflow(source))
        write = stack.enter_context(_writing(packed)) if contents.kind == "packed" else None
        for split, name in contents.splits.items():
            count = builder.info.splits[name].num_examples
            records = _records(tfds, builder, name, contents, source)
            if contents.kind == "pixels":
                read = _read_pixels(records, count, contents, f"{name} images of {source}")
            else:
                read = _read_encoded(records, write, f"{name} images of {source}")
            _check_labels(read["labels"], count, contents, f"The {name} split in {source}")
            found |= {f"{split}_{key}": values for key, values in read.items()}
    return contents, found | ({"content": packed} if write else {})


def _records(tfds: Any, builder: Any, split: str, contents: Contents, source: Path) -> Iterator[Record]:
    """Yields the examples of a split in the order on disk, with pictures as they are encoded there."""
    keys = [contents.image, *contents.labels]
    encoded = {contents.image: tfds.decode.SkipDecoding()}
    with refusing_corrupt(source):
        if has_random_access(builder.info):
            read = _random_access(tfds, builder, split, keys, encoded)
            for row in range(builder.info.splits[split].num_examples):
                example = read(row)
                yield example[contents.image], [int(example[key]) for key in contents.labels]
            return
        # Files are read one after the other, so that the order is always the order on disk.
        config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        decoders = tfds.decode.PartialDecoding(dict.fromkeys(keys, True), decoders=encoded)
        examples = builder.as_dataset(split=split, shuffle_files=False, read_config=config, decoders=decoders)
        for batch in examples.batch(BATCH).prefetch(2).as_numpy_iterator():
            columns = [batch[key].tolist() for key in contents.labels]
            yield from zip(batch[contents.image], map(list, zip(*columns, strict=True)), strict=True)


def _random_access(
    tfds: Any, builder: Any, split: str, keys: Sequence[str], decoders: Mapping[str, Any]
) -> Callable[[int], Mapping[str, Any]]:
    """A function `row -> features` of a split in ArrayRecord files."""
    data = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    features = tfds.features.FeaturesDict({key: builder.info.features[key] for key in keys})
    return lambda row: features.deserialize_example_np(data[row], decoders=decoders)


def _read_pixels(records: Iterable[Record], count: int, contents: Contents, what: str) -> dict[str, np.ndarray]:
    images = np.empty((count, *contents.side, 3), np.uint8)
    labels = array("i")
    for row, (content, found) in enumerate(records):
        pixels = np.asarray(_intact(decode, content, row, what))
        if pixels.shape != images.shape[1:]:
            height, width = contents.side
            raise UserError(
                f"Image {row} of the {what} has {pixels.shape[1]}x{pixels.shape[0]} pixels instead of "
                f"{width}x{height}; {ADVICE}."
            )
        if row < count:
            images[row] = pixels
        labels.extend(found)
    return {"images": images, "labels": _rows(labels, np.int32, len(contents.labels))}


def _read_encoded(records: Iterable[Record], write: Callable[[bytes], int] | None, what: str) -> dict[str, np.ndarray]:
    labels, sizes, ends, digests, num_labels = array("i"), array("i"), array("q"), bytearray(), 1
    for row, (content, found) in enumerate(records):
        sizes.extend(_intact(upright_size, content, row, what))
        digests += content_digest(content)
        labels.extend(found)
        num_labels = len(found)
        if write:
            ends.append(write(content))
    read = {
        "labels": _rows(labels, np.int32, num_labels),
        "sizes": _rows(sizes, np.int32, 2),
        "digests": _rows(digests, np.uint8, DIGEST_BYTES),
    }
    return read | ({"ends": np.array(ends, np.int64)} if write else {})


def _rows(values: Any, dtype: Any, columns: int) -> np.ndarray:
    return np.array(values, dtype).reshape(-1, columns)


def _intact(read: Callable[[bytes, str], Any], content: bytes, row: int, what: str) -> Any:
    try:
        return read(content, "")
    except ImageError as error:
        raise ImageError(_name(what, row), error.reason, RENEW) from error


def _check_labels(labels: Int32[np.ndarray, "n k"], count: int, contents: Contents, what: str) -> None:
    if len(labels) != count:
        raise UserError(f"{what} has {len(labels)} examples, but its dataset_info.json lists {count}; {ADVICE}.")
    for column, names in zip(labels.T, contents.labels.values(), strict=True):
        if column.min() < -1 or column.max() >= len(names):
            raise UserError(
                f"{what} has labels in {column.min()}..{column.max()}, outside 0..{len(names) - 1}; prepare it again."
            )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Callable[[bytes], int]]:
    """Writes a file of an array of bytes. Yields a function that appends some and returns their end in the array."""
    total = 0

    def write(content: bytes) -> int:
        nonlocal total
        file.write(content)
        total += len(content)
        return total

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            _write_header(file, 0)
            yield write
            file.seek(0)
            _write_header(file, total)  # as long as before: NumPy leaves room for the digits of the first axis
    except OSError as error:
        raise UserError(
            f"The pictures cannot be packed into {path.parent.parent} ({error.strerror}); make room, or name another "
            "--cache-dir."
        ) from error


def _write_header(file: Any, total: int) -> None:
    about = {"descr": "|u1", "fortran_order": False, "shape": (total,)}
    np.lib.format.write_array_header_1_0(file, about)


class _Names(Sequence[str]):
    """Names of pictures by their rows in a split, made when they are asked for."""

    def __init__(self, what: str, rows: Int[np.ndarray, "n"]) -> None:
        self._what, self._rows = what, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        rows = self._rows[index]
        return _Names(self._what, rows) if isinstance(rows, np.ndarray) else _name(self._what, int(rows))


def _name(what: str, row: int) -> str:
    return f"Image {row} of the {what}"


def pictures_of(source: Path, contents: Contents, arrays: Mapping[str, np.ndarray]) -> dict[str, Pictures]:
    """Makes the pictures of each split from what `read_set` returned, without TensorFlow.

    Raises:
      UserError: if the set is corrupt.
    """
    found = {}
    readers = _packed(contents, arrays) if contents.kind == "packed" else _in_files(source, contents)
    for split, encoded in readers.items():
        what = f"{contents.splits[split]} images of {source}"
        rows = np.arange(len(arrays[f"{split}_labels"]))
        sizes, digests = arrays[f"{split}_sizes"], arrays[f"{split}_digests"]
        found[split] = Pictures(_decoder(encoded, what), _Names(what, rows), digests, sizes, rows)
    return found


def _decoder(encoded: Callable[[int], bytes], what: str) -> Callable[[int], Image.Image]:
    def read(row: int) -> Image.Image:
        try:
            content = encoded(row)
        except Exception as error:  # array_record raises several kinds of errors for files that have changed
            raise ImageError(_name(what, row), f"cannot be read ({cause(error)})", RENEW) from error
        return _intact(decode, content, row, what)

    return read


def _packed(contents: Contents, arrays: Mapping[str, np.ndarray]) -> dict[str, Callable[[int], bytes]]:
    content, start, found = arrays["content"], 0, {}
    for split in contents.splits:
        bounds = np.concatenate([[start], arrays[f"{split}_ends"]])
        start = bounds[-1]
        found[split] = _slices(content, bounds)
    return found


def _slices(content: UInt8[np.ndarray, "bytes"], bounds: Int[np.ndarray, "n+1"]) -> Callable[[int], bytes]:
    return lambda row: content[bounds[row] : bounds[row + 1]].tobytes()


def _in_files(source: Path, contents: Contents) -> dict[str, Callable[[int], bytes]]:
    with quiet_tfds(source) as tfds, refusing_corrupt(source):
        builder = tfds.builder_from_directory(source)
        encoded = {contents.image: tfds.decode.SkipDecoding()}
        readers = {
            split: _random_access(tfds, builder, name, [contents.image], encoded)
            for split, name in contents.splits.items()
        }
    return {split: _field(read, contents.image) for split, read in readers.items()}


def _field(read: Callable[[int], Mapping[str, Any]], key: str) -> Callable[[int], bytes]:
    return lambda row: read(row)[key]
