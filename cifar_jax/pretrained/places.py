"""One try to get a file's bytes from one place: a server, or a directory that holds copies."""

import contextlib
import ipaddress
import os
from collections.abc import Iterator
from itertools import chain
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import InvalidHeader, ReadTimeoutError
from urllib3.util import Retry, parse_url

from cifar_jax.pretrained.formats.detect import WEB_PAGE

TIMEOUT = 30.0  # seconds without a byte
LONGEST_WAIT = 60.0  # seconds that a server may ask for
CHUNK = 1 << 16  # bytes, as many as a break may lose

Bytes = tuple[int, Iterator[bytes]]  # where they begin, and they in chunks


class Failed(Exception):
    """A try failed. `wait` is how long the place asks to be left alone, None where another try would end the same."""

    def __init__(self, cause: str, wait: float | None = None):
        super().__init__(cause)
        self.wait = wait


class Unreachable(Failed):
    """The server does not answer, whatever it is asked for."""


def without_password(place: str) -> str:
    """A URL as it may be shown: what stands before an @ in it is for the server alone."""
    start, scheme, rest = place.partition("://")
    server, slash, path = rest.partition("/")
    return f"{start}{scheme}{server.rpartition('@')[2]}{slash}{path}"


def connection() -> requests.Session:
    """A session that speaks https; http, which anybody on the way can answer, only with this machine."""
    session = requests.Session()
    session.mount("http://", _ThisMachineOnly())
    return session


@contextlib.contextmanager
def opened(session: requests.Session, place: str, start: int, size: int) -> Iterator[Bytes]:
    """Opens a file at a place.

    Args:
      session: of `connection`.
      place: an https URL (http on this machine), a file URL or a path.
      start: how many bytes are here already.
      size: of the whole file.

    Yields:
      Where the bytes begin, which is at `start`, or at 0 where the place does not go on from there; and the bytes.

    Raises:
      Failed: when the place does not have such a file or does not give it, now or while the bytes are read.
    """
    if "://" not in place or place.startswith("file:"):
        yield start, _from_file(place, start, size)
        return
    try:
        with _from_server(session, place, start, size) as body:
            yield body
    except (requests.RequestException, ValueError) as error:  # the latter of addresses that cannot be parsed
        raise _explained(error) from error


def _from_file(place: str, start: int, size: int) -> Iterator[bytes]:
    path = url2pathname(urlsplit(place).path) if "://" in place else os.path.expanduser(place)
    try:
        with open(path, "rb") as file:
            if (found := os.fstat(file.fileno()).st_size) != size:
                raise Failed(f"the file there has {found} bytes, not {size}")
            file.seek(start)
            while chunk := file.read(CHUNK):
                yield chunk
    except OSError as error:
        raise Failed(error.strerror or str(error)) from error


@contextlib.contextmanager
def _from_server(session: requests.Session, url: str, start: int, size: int) -> Iterator[Bytes]:
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        chunks = response.iter_content(CHUNK)
        if start and response.status_code in (206, 416):
            if response.headers.get("Content-Range") == f"bytes {start}-{size - 1}/{size}":
                yield start, chunks
                return
            with _from_server(session, url, 0, size) as body:
                yield body
            return
        _require_ok(response)
        # Before what is here already is given up for it: a login page, another file.
        first = next(chunks, b"")
        if first[:64].lstrip().lower().startswith(WEB_PAGE):
            raise Failed("a web page came instead of the file")
        if (declared := response.headers.get("Content-Length", str(size))) != str(size):
            raise Failed(f"the file there has {declared} bytes, not {size}")
        yield 0, chain([first], chunks)


def _require_ok(response: requests.Response) -> None:
    status = response.status_code
    if status == 429 or status >= 500:
        try:
            wait = Retry().parse_retry_after(response.headers.get("Retry-After", "0"))
        except (InvalidHeader, ValueError, OverflowError):
            wait = 0.0
        if wait > LONGEST_WAIT:
            raise Failed(f"the server answered {status} and asks to be left alone for {wait:.0f} s")
        raise Failed(f"the server answered {status}", wait)
    if status != 200:
        raise Failed(f"the server answered {status}")


def _explained(error: Exception) -> Failed:
    """What went wrong, in few words, and whether another try may end better."""
    if isinstance(error, requests.Timeout) or any(isinstance(cause, ReadTimeoutError) for cause in error.args):
        return Failed(f"nothing came for {TIMEOUT:g} s", 0)
    if isinstance(error, requests.exceptions.SSLError):
        return Failed("no secure connection to the server")
    if isinstance(error, requests.ConnectionError):
        return Unreachable("no connection to the server", 0)
    if isinstance(error, requests.exceptions.ChunkedEncodingError | requests.exceptions.ContentDecodingError):
        return Failed("the connection broke off", 0)
    if isinstance(error, requests.TooManyRedirects):
        return Failed("it redirects without end")
    return Failed(str(error))


class _ThisMachineOnly(HTTPAdapter):
    """Every request for http passes here, those of redirects too."""

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        if not _is_this_machine((parse_url(request.url or "").host or "").strip("[]")):
            raise requests.exceptions.InvalidURL(f"{request.url} is not https")
        return super().send(request, *args, **kwargs)


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
