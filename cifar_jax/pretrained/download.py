"""How a file is downloaded: whole, checked, once, in as many pieces and from as many places as it takes."""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import requests

from cifar_jax.files import lock
from cifar_jax.pretrained.places import Failed, Unreachable, connection, opened, without_password

WAITS = (1.0, 2.0, 4.0)  # seconds between tries that bring nothing new

logger = logging.getLogger(__name__)


class NotDownloaded(Exception):
    """No place gave the file: `causes` says why not by place, `kept` how many bytes wait for the next attempt."""

    def __init__(self, causes: dict[str, str], kept: int):
        super().__init__("; ".join(f"{place}: {cause}" for place, cause in causes.items()))
        self.causes, self.kept = causes, kept


def has_digest(path: Path, digest: str) -> bool:
    """Whether a file has a digest `md5:HEX` or `sha256:HEX`. MD5, which Keras publishes, identifies, no more."""
    algorithm, _, start = digest.partition(":")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False))
    return found.hexdigest().startswith(start)


def part_of(target: Path, digest: str) -> Path:
    """Where a download gathers: beside its target, named after the digest, so that no other file is continued."""
    return target.with_name(f"{target.name}.{digest.partition(':')[2][:8]}.part")


def download(
    places: Sequence[str],
    target: Path,
    size: int,
    digest: str,
    *,
    bar: Callable[[int], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Brings a file from the first of some places that gives it.

    What came is kept until it is whole, for the next try, place or process to go on from. The digest of the whole says
    whether the pieces fit; entity tags, which would say it sooner, differ from server to server.

    Args:
      places: https URLs (http on this machine), file URLs or paths, in order. Of a server that does not answer only
        the first is tried.
      target: appears whole or not at all.
      size: of the file in bytes; no more is ever kept.
      digest: `md5:HEX` or `sha256:HEX`, or the start of it.
      bar: is called with the number of bytes that are here.
      sleep: waits some seconds.

    Raises:
      NotDownloaded: when no place gives it.
      OSError: when it cannot be kept here.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    causes: dict[str, str] = {}
    silent: list[list[str]] = []
    with _alone(part_of(target, digest)) as file, connection() as session:
        part = _Part(file, size, digest, bar)
        if target.is_file() and part.is_whole(target):
            return  # another process has just brought it
        for place in places:
            if (server := place.split("/", 3)[:3]) in silent:
                continue
            here = f", of which {part.end / 1e6:.0f} MB are here already" if part.end else ""
            logger.info(f"Downloading {size / 1e6:.0f} MB from {without_password(place)}{here}")
            try:
                _bring(session, place, part, sleep)
            except Failed as failure:
                causes[without_password(place)] = str(failure)
                if isinstance(failure, Unreachable):
                    silent.append(server)
                continue
            os.fsync(file.fileno())
            os.replace(part.path, target)
            return
        raise NotDownloaded(causes, part.end)


class _Part:
    """What has come of a file."""

    def __init__(self, file: IO[bytes], size: int, digest: str, bar: Callable[[int], None]):
        self.file, self.path = file, Path(file.name)
        self.size, self.digest, self.bar = size, digest, bar

    @property
    def end(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def is_whole(self, path: Path) -> bool:
        return path.stat().st_size == self.size and has_digest(path, self.digest)

    def restart(self) -> None:
        self.file.truncate(0)

    def append(self, chunks: Iterable[bytes]) -> None:
        self.bar(done := self.end)
        for chunk in chunks:
            done += len(chunk)
            if done > self.size:
                self.restart()
                raise Failed(f"more than the file's {self.size} bytes came")
            self.file.write(chunk)
            self.file.flush()
            self.bar(done)
        if done < self.size:
            raise Failed("the connection broke off", 0)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[IO[bytes]]:
    """Opens a part for this process alone, by a lock that ends with the process; an empty one does not stay."""
    while True:
        with open(path, "a+b") as file:
            lock(file, lambda: logger.info(f"Another process is downloading to {path}: waiting for it"))
            try:
                if not os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    continue
            except FileNotFoundError:
                continue  # whoever had it has moved it into place
            try:
                yield file
            finally:
                if not os.fstat(file.fileno()).st_size:
                    path.unlink(missing_ok=True)
            return


def _bring(session: requests.Session, place: str, part: _Part, sleep: Callable[[float], None]) -> None:
    """Tries a place as long as each try brings something new, and a few times more."""
    tries, furthest, others = 0, part.end, 0
    while True:
        try:
            if part.end < part.size:
                with opened(session, place, part.end, part.size) as (start, chunks):
                    if not start:
                        part.restart()
                    part.append(chunks)
            if part.is_whole(part.path):
                return
            # Once it may be made of pieces of different files; a second time it all came from here.
            part.restart()
            others += 1
            raise Failed("what came has another hash", 0 if others == 1 else None)
        except Failed as failure:
            tries = 1 if part.end > furthest else tries + 1
            furthest = max(furthest, part.end)
            if failure.wait is None or tries > len(WAITS):
                raise
            # Where there is no network at all, who waits for it should hear of it soon.
            wait = WAITS[0] if isinstance(failure, Unreachable) else max(WAITS[tries - 1], failure.wait)
            logger.info(f"Trying again in {wait:.0f} s: {failure}")
            sleep(wait)
