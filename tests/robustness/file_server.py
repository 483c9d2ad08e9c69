"""A web server on this machine that answers as a test tells it, and writes down what it was asked."""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from unittest import mock

PAGE = b"\n<!DOCTYPE html><html><body>Sign in</body></html>"


class Asked(NamedTuple):
    """A request."""

    path: str
    range: str | None


class FileServer(ThreadingHTTPServer):
    """Gives its answers one after the other, the last one again and again."""

    def __init__(self, answers: tuple["Answer", ...]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.asked, self.released = list(answers), [], threading.Event()

    def url(self, path: str = "weights.h5") -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, *_) -> None:
        pass  # a client that hangs up


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self):
        self.server.asked.append(Asked(self.path, self.headers["Range"]))
        answers = self.server.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    def log_message(self, *_):
        pass


Answer = Callable[[_Handler], None]


@contextlib.contextmanager
def serving(*answers: Answer) -> Iterator[FileServer]:
    """Runs a server, which no proxy stands before."""
    with mock.patch.dict(os.environ, no_proxy="127.0.0.1"), FileServer(answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def sends(body: bytes, status: int = 200, *, length: int | None = None, **headers: str) -> Answer:
    """The body, whose length it declares as told, or leaves to the end of the connection."""

    def answer(handler: _Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def whole(content: bytes, **headers: str) -> Answer:
    """The file, whatever part of it was asked for."""
    return sends(content, length=len(content), **headers)


def ranged(content: bytes, cut: int | None = None, **headers: str) -> Answer:
    """What was asked for of a file, cut off after so many bytes."""

    def answer(handler: _Handler) -> None:
        if (asked := handler.headers["Range"]) is None:
            return sends(content[:cut], length=len(content), **headers)(handler)
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        about = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} | headers
        return sends(content[start:][:cut], 206, length=len(content) - start, **about)(handler)

    return answer


def moved(to: str) -> Answer:
    """A redirect."""
    return sends(b"", 302, length=0, Location=to)


def stalls(start: bytes = b"", length: int | None = None) -> Answer:
    """Falls silent, where a length is given after the headers and a start."""

    def answer(handler: _Handler) -> None:
        if length is not None:
            sends(start, length=length)(handler)
        handler.server.released.wait(30)

    return answer


def hangs_up(handler: _Handler) -> None:
    """Closes the connection without a word."""


def resets(start: bytes, length: int) -> Answer:
    """Breaks the connection off in the midst of it, and not politely."""

    def answer(handler: _Handler) -> None:
        sends(start, length=length)(handler)
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    return answer


def by_path(answers: Mapping[str, Answer]) -> Answer:
    """Other answers for other paths, and 404 for the rest."""
    return lambda handler: answers.get(handler.path, sends(b"not here", 404))(handler)
