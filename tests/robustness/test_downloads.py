"""Downloads from a misbehaving server: the file arrives whole, or there is a reason and nothing is left behind."""

import gzip
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import files_below, full_disk
from robustness.file_server import PAGE, by_path, hangs_up, sends, serving, whole

from cifar_jax.pretrained.download import CHUNK, WAITS, NotDownloaded, download

CONTENT = random.Random(0).randbytes(5 * CHUNK + 123)
OTHER = CONTENT[::-1]
SIZE, HALF = len(CONTENT), len(CONTENT) // 2
DIGEST = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


class Outcome(NamedTuple):
    """The result of a download: why each source failed, the progress, and the seconds waited between attempts."""

    causes: list[str]
    bar: list[int]
    waits: list[float]


def attempt(target: Path, *places: str, digest: str = DIGEST) -> Outcome:
    """Downloads a file, and checks that it is there as a whole or not at all."""
    outcome = Outcome([], [], [])
    try:
        download(places, target, SIZE, digest, bar=outcome.bar.append, sleep=outcome.waits.append, timeout=0.5)
    except NotDownloaded as error:
        outcome.causes.extend(error.causes.values())
    assert files_below(target.parent) == ([] if outcome.causes else [target.name])
    assert outcome.causes or target.read_bytes() == CONTENT
    return outcome


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "weights.h5"


def compressed(handler):
    """Compresses for clients that accept it: the declared length is another one, here a greater one."""
    if "gzip" in (handler.headers["Accept-Encoding"] or ""):
        return sends(gz := gzip.compress(CONTENT), length=len(gz), Content_Encoding="gzip")(handler)
    return whole(CONTENT)(handler)


@pytest.mark.parametrize("answer", [whole(CONTENT), sends(CONTENT), compressed])
@pytest.mark.parametrize(("algorithm", "digits"), [("md5", None), ("sha256", 8)])
def test_file_arrives_whole_and_progress_ends_at_its_size(target, answer, algorithm, digits):
    digest = f"{algorithm}:{hashlib.new(algorithm, CONTENT).hexdigest()[:digits]}"
    with serving(whole(OTHER), answer) as server:
        assert attempt(target, server.url(), digest=digest).causes == ["what came has another hash"]
        outcome = attempt(target, server.url(), digest=digest)
        assert len(server.asked) == 2
    assert outcome.bar == sorted(outcome.bar) and len(set(outcome.bar)) > 5
    assert outcome.bar[0] == 0 and outcome.bar[-1] == SIZE
    (target.parent / "any").touch()
    assert target.stat().st_mode == (target.parent / "any").stat().st_mode


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (sends(PAGE, 403), "the server answered 403"),
        (sends(PAGE), "received a web page instead of the file"),
        (whole(CONTENT[:-1]), f"the file there has {SIZE - 1} bytes, not {SIZE}"),
        (sends(CONTENT, length=10**18), f"the file there has {10**18} bytes, not {SIZE}"),
        # The end of a stream that is too long is not awaited.
        (sends(CONTENT + bytes(CHUNK), stalls=True), f"received more than the file's {SIZE} bytes"),
        (sends(b"", 302, Location="/weights.h5"), "Exceeded 30 redirects."),
        (sends(b"", 302, Location="http://me:secret@192.0.2.1/x"), "http://192.0.2.1/x is not https"),
        (sends(b"", 302, Location="http://["), "Invalid IPv6 URL"),
        (sends(b"", 429, Retry_After="61"), "the server answered 429 and asks to retry after 61 s"),
    ],
)
def test_permanent_failures_are_not_retried(target, answer, cause):
    with serving(answer) as server:
        outcome = attempt(target, server.url())
        assert outcome.causes == [cause] and not outcome.waits
        assert len(server.asked) == (31 if "redirects" in cause else 1)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (sends(b"", 500), "the server answered 500"),
        (sends(PAGE, 503, Retry_After="7"), "the server answered 503"),
        (sends(b"", 429, Retry_After="soon"), "the server answered 429"),
        (sends(CONTENT[:HALF], length=SIZE), "the connection broke off"),
        (sends(CONTENT[:HALF]), f"the file there has {HALF} bytes, not {SIZE}"),
        (hangs_up, "no connection to the server"),
        (sends(CONTENT[:HALF], length=SIZE, stalls=True), "nothing came for 0.5 s"),
    ],
)
def test_temporary_failures_are_retried_from_the_start(target, answer, cause):
    waits = [max(wait, 7 * cause.endswith("503")) for wait in WAITS]
    with serving(answer) as server:
        outcome = attempt(target, server.url())
        assert outcome.causes == [cause] and outcome.waits == waits and len(server.asked) == len(WAITS) + 1
        assert outcome.bar.count(0) >= len(WAITS) + 1
        server.answers = [answer, whole(CONTENT)]
        assert attempt(target, server.url()).waits == waits[:1]


def test_sources_are_tried_in_order(target, tmp_path):
    (tmp_path / "short").write_bytes(CONTENT[:-1])
    (tmp_path / "a copy").write_bytes(CONTENT)
    with serving(by_path({"/b": whole(CONTENT)})) as server:
        assert not attempt(target, f"{tmp_path}/none", server.url("a"), server.url("b"), server.url("c")).causes
        assert server.asked == ["/a", "/b"]
    target.unlink()
    assert attempt(target, f"{tmp_path}/none", f"{tmp_path}/short", str(tmp_path)).causes == [
        "No such file or directory",
        f"the file there has {SIZE - 1} bytes, not {SIZE}",
        "Is a directory",
    ]
    outcome = attempt(target, (tmp_path / "a copy").as_uri())
    assert not outcome.causes and outcome.bar[-1] == SIZE


def test_passwords_in_urls_are_not_shown(target, caplog):
    caplog.set_level("INFO", "cifar_jax")
    with serving(sends(b"", 503)) as server:
        places = [server.url().replace("://", "://me:secret@"), "https://me:secret@/x"]
        with pytest.raises(NotDownloaded) as caught:
            download(places, target, SIZE, DIGEST, sleep=lambda _: None)
    assert "secret" not in f"{caplog.messages} {caught.value}" and server.url() in caplog.messages[0]
    assert caught.value.causes["https:///x"] == "Invalid URL 'https:///x': No host supplied"


@pytest.mark.parametrize("url", ["http://example.org/x", "http://127.0.0.1.example.org/x", "ftp://localhost/x"])
def test_urls_that_are_not_https_are_refused(target, url):
    outcome = attempt(target, url)
    assert outcome.causes == [f"{url} is not https"] and not outcome.waits


def test_server_without_a_certificate_is_not_retried(target):
    with serving(whole(CONTENT)) as server:
        outcome = attempt(target, server.url().replace("http:", "https:"))
    assert outcome.causes == ["no secure connection to the server"] and not outcome.waits


@pytest.mark.parametrize("local", [False, True])
def test_full_disk_is_not_blamed_on_the_source(target, tmp_path, local):
    (tmp_path / "copy").write_bytes(CONTENT)
    with serving(whole(CONTENT)) as server, full_disk(at=HALF), pytest.raises(OSError, match="too large"):
        attempt(target, str(tmp_path / "copy") if local else server.url(), server.url())
    assert files_below(target.parent) == [] and len(server.asked) == (not local)


def test_interrupted_download_leaves_the_previous_file(target):
    def bar(done):
        if done > HALF:
            raise KeyboardInterrupt

    target.parent.mkdir()
    target.write_bytes(OTHER)
    with serving(whole(CONTENT)) as server:
        with pytest.raises(KeyboardInterrupt):
            download([server.url()], target, SIZE, DIGEST, bar=bar)
        assert target.read_bytes() == OTHER and files_below(target.parent) == [target.name]
        attempt(target, server.url())


PROGRAM = """
import sys
from pathlib import Path
from cifar_jax.pretrained.download import download
url, target, size, digest = sys.argv[1:]
download([url], Path(target), int(size), digest)
"""


def test_another_process_may_download_the_same_file_and_be_killed(target):
    """Each process has its own temporary file; one that is left behind is removed when it is old."""
    with serving(sends(CONTENT[:HALF], length=SIZE, stalls=True), whole(CONTENT)) as server:
        with subprocess.Popen([sys.executable, "-c", PROGRAM, server.url(), str(target), str(SIZE), DIGEST]) as other:
            while not (left := [path for path in target.parent.glob(".*") if path.stat().st_size]):
                assert other.poll() is None
                time.sleep(0.01)
            download([server.url()], target, SIZE, DIGEST)
            assert target.read_bytes() == CONTENT and left[0].exists()
            other.send_signal(signal.SIGKILL)
        os.utime(left[0], (0, 0))
        attempt(target, server.url())
