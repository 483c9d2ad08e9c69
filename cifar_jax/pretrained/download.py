"""Downloads: pooch fetches a file under a temporary name, and it is renamed only if its digest is right."""

import contextlib
import errno
import glob
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit
from urllib.request import url2pathname

import requests
from requests import exceptions
from urllib3.exceptions import InvalidHeader, ReadTimeoutError
from urllib3.util import Retry, parse_url

from cifar_jax.files import replacing
from cifar_jax.pretrained.formats.detect import WEB_PAGE

WAITS = (1.0, 2.0, 4.0)  # seconds before each retry of a source
TIMEOUT = 30.0  # seconds without a byte
LONGEST_WAIT = 60.0  # longest Retry-After, in seconds, that is honoured
CHUNK = 1 << 16  # bytes
THIS_MACHINE = {("http", "localhost"), ("http", "127.0.0.1"), ("http", "[::1]")}
ABANDONED = 3600.0  # seconds after its last change at which a temporary file counts as left by a killed process

logger = logging.getLogger(__name__)


class NotDownloaded(Exception):
    """Raised if all sources of a file failed; `causes` maps each source to the reason."""

    def __init__(self, causes: dict[str, str]):
        super().__init__("; ".join(f"{place}: {cause}" for place, cause in causes.items()))
        self.causes = causes


class _Failed(Exception):
    """Raised if an attempt failed; `wait` is the delay in seconds the server asks for, None if a retry is pointless."""

    def __init__(self, cause: str, wait: float | None = None):
        super().__init__(cause)
        self.wait = wait


def has_digest(path: Path, digest: str) -> bool:
    """Returns whether a file has a digest `md5:HEX` or `sha256:HEX`; HEX may be a prefix.

    MD5, which Keras publishes, identifies a file but does not protect against forgery.
    """
    algorithm, _, start = digest.partition(":")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False))
    return found.hexdigest().startswith(start)


def download(
    places: Sequence[str],
    target: Path,
    size: int,
    digest: str,
    *,
    bar: Callable[[int], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
    timeout: float = TIMEOUT,
) -> None:
    """Downloads a file from the first source that provides it. Each attempt starts from the beginning.

    Args:
      places: https URLs (http for localhost), file URLs or paths, tried in order.
      target: path of the file; written atomically, even if several processes download it at once.
      size: size of the file in bytes.
      digest: `md5:HEX` or `sha256:HEX`, or a prefix of it.
      bar: called with the number of bytes received so far.
      sleep: waits for a number of seconds.
      timeout: seconds without a byte after which an attempt fails.

    Raises:
      NotDownloaded: if all sources fail.
      OSError: if the file cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in target.parent.glob(f".{glob.escape(target.name)}.*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
    causes: dict[str, str] = {}
    for place in places:
        shown = without_password(place)
        logger.info(f"Downloading {size / 1e6:.0f} MB from {shown}")
        for wait in (*WAITS, None):
            try:
                with replacing(target) as temporary:
                    _fetch(place, _Progress(temporary, size, bar), timeout)
                    if not has_digest(temporary, digest):
                        raise _Failed("what came has another hash")
                return
            except _Failed as failure:
                if wait is None or failure.wait is None:
                    causes[shown] = str(failure)
                    break
                wait = max(wait, failure.wait)
                logger.info(f"Trying again in {wait:.0f} s: {failure}")
                sleep(wait)
    raise NotDownloaded(causes)


def without_password(text: str) -> str:
    """Removes credentials, the part before an @, from URLs in a text that is to be shown."""
    return re.sub(r"://[^/\s]*@", "://", text)


class _Progress:
    """The progress bar of an attempt, as called by pooch, which sets `total` to the declared length, if any."""

    total = 0

    def __init__(self, path: Path, size: int, bar: Callable[[int], None]):
        self.path, self.size, self.bar = path, size, bar
        bar(0)

    def update(self, _: int) -> None:
        """Reads the progress from the file, as pooch passes the maximum chunk length, but flushes every chunk."""
        done = self.path.stat().st_size
        if self.total > self.size:
            raise _Failed(f"the file there has {self.total} bytes, not {self.size}")
        if done > self.size:
            raise _Failed(f"received more than the file's {self.size} bytes")
        self.bar(done)

    def reset(self) -> None:
        """Does nothing: pooch resets the bar at the end, but the count is already right."""

    close = reset


def _fetch(place: str, progress: _Progress, timeout: float) -> None:
    if "://" not in place or place.startswith("file:"):
        _copy(place, progress)
    else:
        _get(place, progress, timeout)
    with open(progress.path, "rb") as file:
        if file.read(64).lstrip().lower().startswith(WEB_PAGE):
            raise _Failed("received a web page instead of the file")
    if (found := progress.path.stat().st_size) != progress.size:
        raise _Failed(f"the file there has {found} bytes, not {progress.size}", None if progress.total else 0)


def _copy(place: str, progress: _Progress) -> None:
    source = url2pathname(urlsplit(place).path) if "://" in place else os.path.expanduser(place)
    try:
        progress.total = os.stat(source).st_size
        if progress.total <= progress.size:
            shutil.copyfile(source, progress.path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise _Failed(error.strerror or str(error)) from error
    progress.update(progress.total)


def _get(url: str, progress: _Progress, timeout: float) -> None:
    from pooch import HTTPDownloader

    fetch = HTTPDownloader(
        progress, CHUNK, timeout=timeout, headers={"Accept-Encoding": "identity"}, hooks={"response": _check_redirect}
    )
    try:
        _require_https(url)
        # Not pooch.retrieve: it logs the URL with its password, and hashes the file once more.
        fetch(url, str(progress.path), None)
    except (exceptions.RequestException, ValueError) as error:  # ValueError: the URL cannot be parsed
        raise _explain(error, timeout) from None  # the chained error would show the password


def _check_redirect(response: requests.Response, **_: Any) -> None:
    if response.is_redirect:
        _require_https(urljoin(response.url, response.headers["Location"]))


def _require_https(url: str) -> None:
    """Rejects http, which is open to tampering on the way, except to this machine."""
    parts = parse_url(url)
    if parts.scheme != "https" and (parts.scheme, parts.host) not in THIS_MACHINE:
        raise _Failed(without_password(f"{url} is not https"))


def _explain(error: Exception, timeout: float) -> _Failed:
    """Converts an error to a short cause, and decides whether a retry is worthwhile."""
    if isinstance(error, exceptions.HTTPError) and error.response is not None:
        return _explain_status(error.response)
    if isinstance(error, exceptions.Timeout) or any(isinstance(cause, ReadTimeoutError) for cause in error.args):
        return _Failed(f"nothing came for {timeout:g} s", 0)
    if isinstance(error, exceptions.SSLError):
        return _Failed("no secure connection to the server")
    if isinstance(error, exceptions.ConnectionError):
        return _Failed("no connection to the server", 0)
    if isinstance(error, exceptions.ChunkedEncodingError | exceptions.ContentDecodingError):
        return _Failed("the connection broke off", 0)
    return _Failed(without_password(str(error)))


def _explain_status(response: requests.Response) -> _Failed:
    cause = f"the server answered {response.status_code}"
    if response.status_code != 429 and response.status_code < 500:
        return _Failed(cause)
    try:
        wait = Retry().parse_retry_after(response.headers.get("Retry-After", "0"))
    except (InvalidHeader, ValueError, OverflowError):
        wait = 0.0
    if wait > LONGEST_WAIT:
        return _Failed(f"{cause} and asks to retry after {wait:.0f} s")
    return _Failed(cause, wait)
