"""A newcomer's machine: an empty home, a dead network, a shell to type in, and an environment to install into."""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT = 300  # seconds; nothing that is typed here takes as long
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass(frozen=True)
class Typed:
    """What came of a command: its exit code, what it wrote, how long it took."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Newcomer:
    """Someone at a shell.

    Attributes:
      home: the home directory.
      binaries: where `python` and what was installed beside it lie.
    """

    home: Path
    binaries: Path

    def type(self, texts: str | Sequence[str], directory: Path) -> list[Typed]:
        """Types commands, as many at a time as there are, and waits for all of them."""
        texts = [texts] if isinstance(texts, str) else texts
        began = time.monotonic()
        shells = [
            subprocess.Popen(
                ["/bin/sh", "-c", text],
                cwd=directory,
                env=self._environment(text),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for text in texts
        ]
        try:
            written = [shell.communicate(timeout=LIMIT) for shell in shells]
        finally:
            for shell in shells:
                if shell.poll() is None:
                    os.killpg(shell.pid, signal.SIGKILL)
        seconds = time.monotonic() - began
        return [Typed(shell.returncode, *streams, seconds) for shell, streams in zip(shells, written, strict=True)]

    def _environment(self, text: str) -> dict[str, str]:
        """Almost nothing; pip alone may ask its package index, as whoever made the tests' environment did."""
        own = {"HOME": str(self.home), "PATH": f"{self.binaries}:/usr/bin:/bin", "LANG": "C.UTF-8"}
        if text.startswith("pip "):
            return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own
        # What two processes say to each other on this machine must not go to the proxy either.
        return own | dict.fromkeys(PROXIES, f"http://127.0.0.1:{closed_port()}") | {"no_proxy": "127.0.0.1"}


def closed_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def make_environment(directory: Path) -> Path:
    """An environment that sees all that the tests' own has, but not the project; returns where its commands lie."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    sees = {"base": str(directory), "platbase": str(directory)}
    inside = Path(sysconfig.get_path("purelib", "venv", sees))
    (inside / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return directory / "bin"
