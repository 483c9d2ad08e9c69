"""Downloads from a server that does everything wrong: the file comes whole, or a reason and nothing is left."""

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
from helpers import files_below, full_disk, hearing
from robustness.file_server import PAGE, by_path, hangs_up, sends, serving, whole

from cifar_jax.pretrained import download as module
from cifar_jax.pretrained.download import CHUNK, WAITS, NotDownloaded, download

CONTENT = random.Random(0).randbytes(5 * CHUNK + 123)
OTHER = CONTENT[::-1]
SIZE, HALF = len(CONTENT), len(CONTENT) // 2
DIGEST = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
CUT = sends(CONTENT[:HALF], length=SIZE)


class Outcome(NamedTuple):
    """What a download came to."""

    causes: list[str]
    said: list[str]
    bar: list[int]
    slept: list[float]


def bring(target: Path, *where: str, digest: str = DIGEST) -> Outcome:
    """Downloads, and looks whether all of the file is there or nothing at all."""
    outcome = Outcome([], [], [], [])
    try:
        with hearing(outcome.said.append):
            download(where, target, SIZE, digest, bar=outcome.bar.append, sleep=outcome.slept.append)
    except NotDownloaded as error:
        outcome.causes.extend(error.causes.values())
    assert files_below(target.parent) == ([] if outcome.causes else [target.name])
    assert outcome.causes or target.read_bytes() == CONTENT
    return outcome


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "weights.h5"


def packed(handler):
    """Compresses for those who can read it: that has another length, here a greater one."""
    if "gzip" in (handler.headers["Accept-Encoding"] or ""):
        return sends(gz := gzip.compress(CONTENT), length=len(gz), Content_Encoding="gzip")(handler)
    return whole(CONTENT)(handler)


@pytest.mark.parametrize("answer", [whole(CONTENT), sends(CONTENT), packed])
@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
@pytest.mark.parametrize("digits", [8, None])
def test_a_file_comes_whole_and_the_bar_counts_to_its_size(target, answer, algorithm, digits):
    digest = f"{algorithm}:{hashlib.new(algorithm, CONTENT).hexdigest()[:digits]}"
    with serving(whole(OTHER), answer) as server:
        assert bring(target, server.url(), digest=digest).causes == ["what came has another hash"]
        outcome = bring(target, server.url(), digest=digest)
        assert len(server.asked) == 2 and outcome.said == [f"Downloading 0 MB from {server.url()}"]
    assert outcome.bar == sorted(outcome.bar) and len(set(outcome.bar)) > 5
    assert outcome.bar[0] == 0 and outcome.bar[-1] == SIZE
    (target.parent / "any").touch()
    assert target.stat().st_mode == (target.parent / "any").stat().st_mode


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (sends(b"not here", 404), "the server answered 404"),
        (sends(PAGE, 403), "the server answered 403"),
        (sends(PAGE), "received a web page instead of the file"),
        (whole(PAGE), "received a web page instead of the file"),
        (whole(CONTENT[:-1]), f"the file there has {SIZE - 1} bytes, not {SIZE}"),
        (sends(CONTENT, length=10**18), f"the file there has {10**18} bytes, not {SIZE}"),
        (
            sends(CONTENT + bytes(CHUNK), stalls=True),
            f"received more than the file's {SIZE} bytes",
        ),  # its end is not awaited
        (sends(b"", 302, Location="/weights.h5"), "Exceeded 30 redirects."),
        (sends(b"", 302, Location="http://me:secret@192.0.2.1/x"), "http://192.0.2.1/x is not https"),
        (sends(b"", 302, Location="http://["), "Invalid IPv6 URL"),
        (sends(b"", 429, Retry_After="61"), "the server answered 429 and asks to retry after 61 s"),
    ],
)
def test_what_will_not_change_is_not_tried_again(target, answer, cause):
    with serving(answer) as server:
        outcome = bring(target, server.url())
        assert outcome.causes == [cause] and not outcome.slept
        assert len(server.asked) == (31 if "redirects" in cause else 1)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (sends(b"", 500), "the server answered 500"),
        (sends(PAGE, 503, Retry_After="7"), "the server answered 503"),
        (sends(b"", 429, Retry_After="soon"), "the server answered 429"),
        (CUT, "the connection broke off"),
        (sends(CONTENT[:HALF]), f"the file there has {HALF} bytes, not {SIZE}"),
        (hangs_up, "no connection to the server"),
        (sends(CONTENT[:HALF], length=SIZE, stalls=True), "nothing came for 0.5 s"),
    ],
)
def test_what_may_change_is_tried_a_few_times_from_the_start(target, monkeypatch, answer, cause):
    monkeypatch.setattr(module, "TIMEOUT", 0.5)
    waits = [max(wait, 7 * cause.endswith("503")) for wait in WAITS]
    with serving(answer) as server:
        outcome = bring(target, server.url())
        assert outcome.causes == [cause] and outcome.slept == waits and len(server.asked) == len(WAITS) + 1
        assert outcome.said[1:] == [f"Trying again in {wait:.0f} s: {cause}" for wait in waits]
        assert outcome.bar.count(0) >= len(WAITS) + 1
        server.answers = [answer, answer, whole(CONTENT)]
        assert bring(target, server.url()).slept == waits[:2]


def test_a_place_that_fails_is_followed_by_the_next(target, tmp_path):
    (tmp_path / "short").write_bytes(CONTENT[:-1])
    (tmp_path / "a copy").write_bytes(CONTENT)
    with serving(by_path({"/b": whole(CONTENT)})) as server:
        outcome = bring(target, f"{tmp_path}/none", server.url("a"), server.url("b"), server.url("c"))
        assert server.asked == ["/a", "/b"] and not outcome.causes
        assert [said.rpartition(" from ")[2] for said in outcome.said] == [f"{tmp_path}/none", *map(server.url, "ab")]
    target.unlink()
    assert bring(target, f"{tmp_path}/none", f"{tmp_path}/short", str(tmp_path)).causes == [
        "No such file or directory",
        f"the file there has {SIZE - 1} bytes, not {SIZE}",
        "Is a directory",
    ]
    outcome = bring(target, (tmp_path / "a copy").as_uri())
    assert not outcome.causes and outcome.bar[-1] == SIZE


def test_a_password_in_a_url_is_for_the_server_alone(target, said):
    with serving(sends(b"", 503)) as server:
        places = [server.url().replace("://", "://me:secret@"), "https://me:secret@/x"]
        with pytest.raises(NotDownloaded) as caught:
            download(places, target, SIZE, DIGEST, sleep=lambda _: None)
    assert "secret" not in f"{said} {caught.value}" and server.url() in said[0]
    assert caught.value.causes["https:///x"] == "Invalid URL 'https:///x': No host supplied"


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("http://example.org/x", "http://example.org/x is not https"),
        ("http://127.0.0.1.example.org/x", "http://127.0.0.1.example.org/x is not https"),
        ("ftp://localhost/x", "ftp://localhost/x is not https"),
        ("https://", "Invalid URL 'https://': No host supplied"),
    ],
)
def test_what_is_no_https_is_not_asked(target, url, cause):
    outcome = bring(target, url)
    assert outcome.causes == [cause] and not outcome.slept


def test_a_server_that_cannot_show_who_it_is_is_not_asked_again(target):
    with serving(whole(CONTENT)) as server:
        outcome = bring(target, server.url().replace("http:", "https:"))
    assert outcome.causes == ["no secure connection to the server"] and not outcome.slept


@pytest.mark.parametrize("local", [False, True])
def test_a_full_disk_is_no_fault_of_the_place(target, tmp_path, local):
    (tmp_path / "copy").write_bytes(CONTENT)
    with serving(whole(CONTENT)) as server, full_disk(at=HALF), pytest.raises(OSError, match="too large"):
        bring(target, str(tmp_path / "copy") if local else server.url(), server.url())
    assert files_below(target.parent) == [] and len(server.asked) == (not local)


def test_an_interrupted_download_leaves_what_was_there(target):
    def bar(done):
        if done > HALF:
            raise KeyboardInterrupt

    target.parent.mkdir()
    target.write_bytes(OTHER)
    with serving(whole(CONTENT)) as server:
        with pytest.raises(KeyboardInterrupt):
            download([server.url()], target, SIZE, DIGEST, bar=bar)
        assert target.read_bytes() == OTHER and files_below(target.parent) == [target.name]
        bring(target, server.url())


PROGRAM = """
import sys
from pathlib import Path
from cifar_jax.pretrained.download import download
url, target, size, digest = sys.argv[1:]
download([url], Path(target), int(size), digest)
"""


def test_another_process_may_download_the_same_file_and_be_killed(target):
    """Each has a temporary file of its own; the one that is left is removed when it is old."""
    with serving(sends(CONTENT[:HALF], length=SIZE, stalls=True), whole(CONTENT)) as server:
        with subprocess.Popen([sys.executable, "-c", PROGRAM, server.url(), str(target), str(SIZE), DIGEST]) as other:
            while not (left := [path for path in target.parent.glob(".*") if path.stat().st_size]):
                assert other.poll() is None
                time.sleep(0.01)
            download([server.url()], target, SIZE, DIGEST)
            assert target.read_bytes() == CONTENT and left[0].exists()
            other.send_signal(signal.SIGKILL)
        os.utime(left[0], (0, 0))
        bring(target, server.url())
