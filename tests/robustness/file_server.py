"""A local web server that answers as a test tells it to and records the requested paths."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

PAGE = b"\n<!DOCTYPE html><html><body>Sign in</body></html>"


class FileServer(ThreadingHTTPServer):
    """Gives its answers in order, the last one repeatedly; `asked` are the requested paths."""

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
        self.server.asked.append(self.path)
        answers = self.server.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    def log_message(self, *_):
        pass


Answer = Callable[[_Handler], None]


@contextlib.contextmanager
def serving(*answers: Answer) -> Iterator[FileServer]:
    """Runs a server, bypassing any proxy."""
    with mock.patch.dict(os.environ, no_proxy="127.0.0.1"), FileServer(answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def sends(body: bytes, status: int = 200, *, length: int | None = None, stalls: bool = False, **headers: str) -> Answer:
    """Sends a body with the given Content-Length, or none; if it stalls, the connection then stays open in silence."""

    def answer(handler: _Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(body)
        if stalls:
            handler.server.released.wait(30)

    return answer


def whole(content: bytes) -> Answer:
    return sends(content, length=len(content))


def hangs_up(handler: _Handler) -> None:
    """Closes the connection without an answer."""


def by_path(answers: dict[str, Answer]) -> Answer:
    """Answers by path, and 404 for other paths."""
    return lambda handler: answers.get(handler.path, sends(b"not here", 404))(handler)
