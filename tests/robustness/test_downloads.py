"""Downloads from a server that does everything wrong: the file comes whole, or there is a reason and no half file."""

import errno
import fcntl
import gzip
import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import files_below, full_disk, hearing
from hypothesis import given, settings, strategies as st
from robustness.file_server import (
    PAGE,
    by_path,
    hangs_up,
    moved,
    ranged,
    resets,
    sends,
    serving,
    stalls,
    whole,
)

from cifar_jax.pretrained import places
from cifar_jax.pretrained.download import WAITS, NotDownloaded, download, part_of
from cifar_jax.pretrained.places import CHUNK

CONTENT = random.Random(0).randbytes(5 * CHUNK + 123)
OTHER = random.Random(1).randbytes(len(CONTENT))
SIZE, HALF = len(CONTENT), 2 * CHUNK + CHUNK // 2
DIGEST = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


class Outcome(NamedTuple):
    """What a download came to."""

    error: NotDownloaded | None
    said: list[str]
    bar: list[int]
    slept: list[float]

    @property
    def cause(self) -> str:
        (cause,) = self.error.causes.values()
        return cause


def bring(target: Path, *where: str, digest: str = DIGEST) -> Outcome:
    outcome = Outcome(None, [], [], [])
    try:
        with hearing(outcome.said.append):
            download(where, target, SIZE, digest, bar=outcome.bar.append, sleep=outcome.slept.append)
    except NotDownloaded as error:
        outcome = outcome._replace(error=error)
    assert target.is_file() == (outcome.error is None)
    assert not target.is_file() or target.read_bytes() == CONTENT
    part = part_of(target, digest)
    assert set(files_below(target.parent)) <= {target.name, part.name} and not (part.exists() and target.exists())
    assert part.exists() == bool(outcome.error and outcome.error.kept)
    return outcome


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "weights.h5"


@pytest.fixture
def part(target):
    """What another process left when it was killed: a right start."""
    path = part_of(target, DIGEST)
    path.parent.mkdir()
    path.write_bytes(CONTENT[:HALF])
    return path


def test_a_file_comes_whole_and_once(target):
    with serving(whole(CONTENT)) as server:
        for _ in range(2):
            outcome = bring(target, server.url())
            assert outcome.error is None and not outcome.slept
        assert [asked.range for asked in server.asked] == [None]
    (target.parent / "any").touch()
    assert target.stat().st_mode == (target.parent / "any").stat().st_mode


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
@pytest.mark.parametrize("digits", [8, None])
def test_the_bar_says_what_is_here(target, algorithm, digits):
    digest = f"{algorithm}:{hashlib.new(algorithm, CONTENT).hexdigest()[:digits]}"
    with serving(whole(CONTENT)) as server:
        outcome = bring(target, server.url(), digest=digest)
        assert outcome.said == [f"Downloading 0 MB from {server.url()}"]
    assert outcome.bar[0] == 0 and outcome.bar[-1] == SIZE and len(outcome.bar) > 5
    assert outcome.bar == sorted(outcome.bar)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (sends(b"not here", 404), "the server answered 404"),
        (sends(PAGE, 403), "the server answered 403"),
        (sends(b"", 410), "the server answered 410"),
        (sends(b"", 204), "the server answered 204"),
        (sends(CONTENT, 206, length=SIZE, Content_Range=f"bytes 0-{SIZE - 1}/{SIZE}"), "the server answered 206"),
        (sends(PAGE), "a web page came instead of the file"),
        (sends(PAGE, length=len(PAGE), Content_Type="text/html"), "a web page came instead of the file"),
        (sends(PAGE + CONTENT[len(PAGE) :], length=SIZE), "a web page came instead of the file"),
        (sends(b"", length=0), f"the file there has 0 bytes, not {SIZE}"),
        (sends(CONTENT, length=SIZE - 1), f"the file there has {SIZE - 1} bytes, not {SIZE}"),
        (sends(CONTENT, length=10**18), f"the file there has {10**18} bytes, not {SIZE}"),
        (sends(CONTENT + b"x"), f"more than the file's {SIZE} bytes came"),
        (moved("/weights.h5"), "it redirects without end"),
        (moved("http://192.0.2.1/weights.h5"), "http://192.0.2.1/weights.h5 is not https"),
        (moved("ftp://127.0.0.1/weights.h5"), "No connection adapters were found for 'ftp://127.0.0.1/weights.h5'"),
        (moved("http://["), "Invalid IPv6 URL"),
        (sends(b"", 429, Retry_After="61"), "the server answered 429 and asks to be left alone for 61 s"),
    ],
)
def test_what_will_not_change_is_not_tried_again(target, answer, cause):
    with serving(answer) as server:
        outcome = bring(target, server.url())
        assert outcome.cause == cause and not outcome.slept and not outcome.error.kept
        assert len(server.asked) == (31 if "redirects" in cause else 1)


def test_the_bytes_are_asked_for_as_they_lie(target):
    """Compressed on the way they would have another length and other ranges."""
    packed = gzip.compress(CONTENT)

    def compresses(handler):
        willing = "gzip" in (handler.headers["Accept-Encoding"] or "")
        (sends(packed, length=len(packed), Content_Encoding="gzip") if willing else whole(CONTENT))(handler)

    with serving(compresses) as server:
        assert bring(target, server.url()).error is None


def test_no_more_is_ever_taken_than_the_file_has(target):
    """A body without an end is left after one chunk too many."""

    def endless(handler):
        sends(CONTENT)(handler)
        for _ in range(10_000):
            handler.wfile.write(CONTENT)
        pytest.fail("somebody took three gigabytes")

    with serving(endless) as server:
        assert bring(target, server.url()).cause == f"more than the file's {SIZE} bytes came"


FAILURES = {
    "the server answered 500": sends(b"", 500),
    "the server answered 503": sends(PAGE, 503, length=len(PAGE)),
    "the server answered 429": sends(b"", 429),
    "the connection broke off": sends(CONTENT[:HALF], length=SIZE),
    "the connection broke off ": sends(CONTENT[:HALF]),
    "the connection broke off  ": resets(CONTENT[:HALF], SIZE),
    "no connection to the server": hangs_up,
    "nothing came for 0.5 s": stalls(),
    "nothing came for 0.5 s ": stalls(CONTENT[:HALF], SIZE),
}
STALLS = [answer for cause, answer in FAILURES.items() if cause.startswith("nothing came")]


@pytest.mark.parametrize("cause", FAILURES)
def test_what_may_change_is_tried_a_few_times(target, monkeypatch, cause):
    if FAILURES[cause] in STALLS:
        monkeypatch.setattr(places, "TIMEOUT", 0.5)
    with serving(FAILURES[cause]) as server:
        outcome = bring(target, server.url())
        assert outcome.cause == cause.strip()
        last = slice(-len(WAITS), None)
        waits = [WAITS[0]] * len(WAITS) if cause == "no connection to the server" else list(WAITS)
        assert outcome.slept[last] == waits and len(server.asked) == len(outcome.slept) + 1
        assert outcome.said[last] == [f"Trying again in {wait:.0f} s: {cause.strip()}" for wait in waits]
        # A reset may cost what has come and was not yet read, so that a later try brings more, and a few more follow.
        assert len(outcome.slept) == len(WAITS) or cause == "the connection broke off  "


def test_a_password_in_a_url_is_for_the_server_alone(target):
    with serving(sends(b"", 404)) as server:
        outcome = bring(target, server.url().replace("://", "://me:secret@"))
    assert "secret" not in f"{outcome.said} {outcome.error}" and outcome.said[0].endswith(server.url())


@pytest.mark.parametrize("cause", FAILURES)
def test_it_goes_well_in_the_end(target, monkeypatch, cause):
    if FAILURES[cause] in STALLS:
        monkeypatch.setattr(places, "TIMEOUT", 0.5)
    with serving(*[FAILURES[cause]] * 3, whole(CONTENT)) as server:
        outcome = bring(target, server.url())
        assert outcome.error is None and len(server.asked) == 4 and len(outcome.slept) == 3


def test_no_server_is_explained(target):
    outcome = bring(target, "http://127.0.0.1:1/weights.h5")
    assert outcome.cause == "no connection to the server" and outcome.slept == [WAITS[0]] * 3


def test_a_server_that_cannot_show_who_it_is_is_not_asked_again(target):
    with serving(whole(CONTENT)) as server:
        outcome = bring(target, server.url().replace("http:", "https:"))
    assert outcome.cause == "no secure connection to the server" and not outcome.slept


@pytest.mark.parametrize(
    ("asked", "waited"),
    [
        ("0", WAITS[0]),
        ("7", 7),
        (format_datetime(datetime(2001, 1, 1, tzinfo=UTC), usegmt=True), WAITS[0]),  # long ago
        ("soon", WAITS[0]),
        ("-1", WAITS[0]),
        ("9" * 5000, WAITS[0]),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_server_is_left_alone_as_long_as_it_asks(target, status, asked, waited):
    with serving(sends(b"", status, Retry_After=asked), whole(CONTENT)) as server:
        outcome = bring(target, server.url())
    assert outcome.error is None and outcome.slept == [waited]


def test_a_server_may_name_the_time(target):
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    with serving(sends(b"", 503, Retry_After=later), whole(CONTENT)) as server:
        (waited,) = bring(target, server.url()).slept
    assert 20 < waited <= 30


def test_a_download_goes_on_where_it_broke_off(target):
    with serving(ranged(CONTENT, cut=HALF)) as server:
        outcome = bring(target, server.url())
        ranges = [asked.range for asked in server.asked]
    starts = [0, *(int(asked.removeprefix("bytes=").removesuffix("-")) for asked in ranges[1:])]
    assert outcome.error is None and len(starts) == 3
    assert all(a + CHUNK <= b for a, b in itertools.pairwise(starts)), starts  # less than a chunk is lost
    assert outcome.bar == sorted(outcome.bar) and outcome.bar[-1] == SIZE
    assert outcome.slept == [WAITS[0]] * 2


def test_what_brings_something_new_is_tried_as_often_as_it_takes(target):
    with serving(ranged(CONTENT, cut=CHUNK)) as server:
        outcome = bring(target, server.url())
        assert outcome.error is None and len(server.asked) == 6 > len(WAITS) + 1


@pytest.mark.parametrize("other_place", [False, True])
def test_the_next_attempt_goes_on_too(target, other_place):
    with serving(ranged(CONTENT, cut=HALF), sends(b"", 503)) as server:
        first = bring(target, server.url())
        assert first.error.kept == 2 * CHUNK and first.cause == "the server answered 503"
        if other_place:
            server.answers = [by_path({"/mirror/weights.h5": ranged(CONTENT)})]
        else:
            server.answers = [ranged(CONTENT)]
        server.asked.clear()
        second = bring(target, server.url("mirror/weights.h5" if other_place else "weights.h5"))
        assert [asked.range for asked in server.asked] == [f"bytes={2 * CHUNK}-"]
    assert second.error is None and second.bar[0] == 2 * CHUNK and second.bar[-1] == SIZE


def test_what_is_here_is_said(target, part):
    with serving(ranged(CONTENT)) as server:
        (said,) = bring(target, server.url()).said
    assert said == f"Downloading 0 MB from {server.url()}, of which 0 MB are here already"


@pytest.mark.parametrize(
    "answer",
    [
        whole(CONTENT),
        sends(CONTENT, 206, length=SIZE),
        sends(CONTENT, 206, length=SIZE, Content_Range=f"bytes 0-{SIZE - 1}/{SIZE}"),
        sends(CONTENT[HALF:], 206, Content_Range=f"bytes {HALF}-{SIZE}/{SIZE + 1}"),
        sends(CONTENT[HALF:], 206, Content_Range=f"bytes {HALF}-{SIZE - 1}/*"),
        sends(CONTENT[HALF:], 206, Content_Range="nonsense"),
        sends(b"", 416, Content_Range=f"bytes */{HALF}"),
    ],
)
def test_a_server_that_does_not_go_on_starts_over(target, part, answer):
    with serving(answer, whole(CONTENT)) as server:
        outcome = bring(target, server.url())
        assert [asked.range for asked in server.asked] in ([f"bytes={HALF}-"], [f"bytes={HALF}-", None])
    assert outcome.error is None and outcome.bar[0] == 0 and not outcome.slept


@pytest.mark.parametrize(
    "answer",
    [
        sends(b"", 404),
        sends(PAGE),
        sends(PAGE, length=len(PAGE)),
        whole(OTHER[:-1]),
        whole(OTHER + b"x"),
        hangs_up,
        lambda handler: sends(b"", 416 if handler.headers["Range"] else 404)(handler),
    ],
)
def test_what_is_no_file_does_not_cost_what_is_here(target, part, answer):
    with serving(answer) as server:
        assert bring(target, server.url()).error.kept == HALF
        assert part.read_bytes() == CONTENT[:HALF]


def test_a_file_that_changes_between_tries_is_not_pieced_together(target):
    answers = ranged(OTHER, cut=HALF, ETag='"1"'), ranged(CONTENT, ETag='"2"')
    with serving(*answers) as server:
        outcome = bring(target, server.url())
        assert [asked.range for asked in server.asked] == [None, f"bytes={2 * CHUNK}-", None]
    assert outcome.error is None and "what came has another hash" in outcome.said[2]


def test_another_file_of_that_size_is_refused_the_second_time(target):
    with serving(ranged(OTHER)) as server:
        outcome = bring(target, server.url())
        assert [asked.range for asked in server.asked] == [None, None]
    assert outcome.cause == "what came has another hash" and not outcome.error.kept


def test_a_place_that_has_another_file_does_not_spoil_the_next(target):
    with serving(by_path({"/a": ranged(OTHER, cut=HALF), "/b": ranged(CONTENT)})) as server:
        server.answers.insert(0, by_path({"/a": ranged(OTHER, cut=HALF)}))
        server.answers[1:1] = [sends(b"", 500)] * (len(WAITS) + 1)
        assert bring(target, server.url("a"), server.url("b")).error is None


def test_a_part_that_is_whole_needs_no_server(target, part):
    part.write_bytes(CONTENT)
    outcome = bring(target, "http://127.0.0.1:1/weights.h5")
    assert outcome.error is None


@pytest.mark.parametrize("damaged", [CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]), CONTENT + b"x", OTHER[:HALF]])
def test_a_damaged_part_is_given_up(target, part, damaged):
    part.write_bytes(damaged)
    with serving(ranged(CONTENT)) as server:
        assert bring(target, server.url()).error is None
        assert server.asked[-1].range is None


def test_a_part_of_another_file_is_not_continued(target):
    old = part_of(target, f"md5:{hashlib.md5(OTHER).hexdigest()}")
    old.parent.mkdir()
    old.write_bytes(OTHER[:HALF])
    with serving(ranged(CONTENT)) as server:
        download([server.url()], target, SIZE, DIGEST)
        assert [asked.range for asked in server.asked] == [None]
    assert target.read_bytes() == CONTENT and old.read_bytes() == OTHER[:HALF]


def test_a_damaged_file_is_replaced_only_by_a_whole_one(target):
    target.parent.mkdir()
    target.write_bytes(OTHER)
    with serving(sends(CONTENT[:HALF], length=SIZE)) as server:
        with pytest.raises(NotDownloaded):
            download([server.url()], target, SIZE, DIGEST, sleep=lambda _: None)
        assert target.read_bytes() == OTHER
        server.answers = [ranged(CONTENT)]
        download([server.url()], target, SIZE, DIGEST)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("url", ["http://192.0.2.1/x", "http://example.org/x", "http://127.0.0.1.example.org/x"])
def test_http_is_for_this_machine_alone(target, url):
    outcome = bring(target, url)
    assert outcome.cause == f"{url} is not https" and not outcome.slept


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "localhost", "[::1]"])
def test_this_machine_has_several_names(target, host, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    assert bring(target, f"http://{host}:1/x").cause == "no connection to the server"


@pytest.mark.parametrize(
    "url", ["ftp://example.org/x", "https://", "https://[", "https://a b/", "x://y", "https://" + "a" * 300]
)
def test_what_is_no_url_is_explained(target, url):
    outcome = bring(target, url)
    assert outcome.cause and "\n" not in outcome.cause and not outcome.slept


@pytest.mark.parametrize("form", ["path", "url", "home"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_directory_may_hold_the_file(target, tmp_path, request, monkeypatch, form, begun):
    if begun:
        request.getfixturevalue("part")
    copy = tmp_path / "a share" / "weights.h5"
    copy.parent.mkdir()
    copy.write_bytes(CONTENT)
    monkeypatch.setenv("HOME", str(tmp_path))
    place = {"path": str(copy), "url": copy.as_uri(), "home": "~/a share/weights.h5"}[form]
    outcome = bring(target, place)
    assert outcome.error is None and outcome.bar[0] == HALF * begun
    assert copy.read_bytes() == CONTENT


def test_what_a_directory_holds_may_be_wrong(target, tmp_path):
    for name, content in (("short", CONTENT[:-1]), ("long", CONTENT + b"x"), ("other", OTHER)):
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    names = ("none", "short", "long", "other", ".")
    outcome = bring(target, *(f"{tmp_path}/{name}" for name in names))
    assert list(outcome.error.causes.values()) == [
        "No such file or directory",
        f"the file there has {SIZE - 1} bytes, not {SIZE}",
        f"the file there has {SIZE + 1} bytes, not {SIZE}",
        "what came has another hash",
        "Is a directory",
    ]


def test_places_are_tried_in_order_and_each_is_said(target):
    with serving(by_path({"/b": ranged(CONTENT), "/c": ranged(CONTENT)})) as server:
        outcome = bring(target, "/nowhere/weights.h5", server.url("a"), server.url("b"), server.url("c"))
        assert [asked.path for asked in server.asked] == ["/a", "/b"]
    assert [said.rpartition(" from ")[2] for said in outcome.said] == [
        "/nowhere/weights.h5",
        server.url("a"),
        server.url("b"),
    ]


def test_a_server_that_is_not_there_is_not_waited_for_twice(target):
    dead, other = "http://127.0.0.1:1", "http://127.0.0.1:2"
    outcome = bring(target, f"{dead}/a", "/nowhere/a", "/nowhere/b", f"{dead}/b", f"{other}/a")
    assert list(outcome.error.causes) == [f"{dead}/a", "/nowhere/a", "/nowhere/b", f"{other}/a"]
    assert outcome.slept == [WAITS[0]] * 6


def test_the_error_says_why_of_each_place(target):
    with serving(by_path({"/b": sends(PAGE)})) as server:
        error = bring(target, server.url("a"), server.url("b")).error
    a, b = server.url("a"), server.url("b")
    assert error.causes == {a: "the server answered 404", b: "a web page came instead of the file"}
    assert str(error) == f"{a}: the server answered 404; {b}: a web page came instead of the file"


def test_a_full_disk_keeps_what_came(target):
    with serving(ranged(CONTENT)) as server:
        with full_disk(at=HALF), pytest.raises(OSError, match="too large"):
            bring(target, server.url())
        assert files_below(target.parent) == [part_of(target, DIGEST).name] and len(server.asked) == 1
        assert bring(target, server.url()).error is None
        assert server.asked[-1].range == f"bytes={HALF}-"


def test_ctrl_c_keeps_what_came(target):
    def bar(done):
        if done > HALF:
            raise KeyboardInterrupt

    with serving(ranged(CONTENT)) as server:
        with pytest.raises(KeyboardInterrupt):
            download([server.url()], target, SIZE, DIGEST, bar=bar)
        assert files_below(target.parent) == [part_of(target, DIGEST).name]
        assert bring(target, server.url()).bar[0] == 3 * CHUNK


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        download(["http://127.0.0.1:1/"], tmp_path / "cache" / "sub" / "weights.h5", SIZE, DIGEST)
    assert files_below(tmp_path) == ["cache"]


def test_a_file_system_without_locks_will_do(target, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with serving(ranged(CONTENT)) as server:
        assert bring(target, server.url()).error is None


def test_of_two_downloads_one_waits_for_the_other(target):
    """And finds the file when it is done: the server is asked once."""
    begun, go_on, outcomes = threading.Event(), threading.Event(), []

    def slow(handler):
        begun.set()
        go_on.wait(30)
        whole(CONTENT)(handler)

    with serving(slow) as server, hearing(lambda text: go_on.set() if "Another process" in text else None):
        one, two = (
            threading.Thread(target=lambda: outcomes.append(download([server.url()], target, SIZE, DIGEST)))
            for _ in range(2)
        )
        one.start()
        assert begun.wait(30)
        two.start()
        one.join(30)
        two.join(30)
        assert len(outcomes) == 2 and len(server.asked) == 1
    assert target.read_bytes() == CONTENT and files_below(target.parent) == [target.name]


@pytest.mark.parametrize("left", [0, 2 * CHUNK])
def test_one_goes_on_with_what_the_other_left(target, left):
    """The first fails while the second waits, and takes its empty part away."""
    begun, waits = threading.Event(), threading.Event()

    def breaks_off(handler):
        begun.set()
        waits.wait(30)
        ranged(CONTENT, cut=left)(handler)

    def fails():
        with pytest.raises(NotDownloaded, match="404"):
            download([server.url()], target, SIZE, DIGEST, sleep=lambda _: None)

    with serving(breaks_off, sends(b"", 404), ranged(CONTENT)) as server:
        first = threading.Thread(target=fails)
        first.start()
        assert begun.wait(30)
        with hearing(lambda text: waits.set() if "Another" in text else None):
            download([server.url()], target, SIZE, DIGEST)
        first.join(30)
        assert [asked.range for asked in server.asked] == [None, *[f"bytes={left}-" if left else None] * 2]
    assert target.read_bytes() == CONTENT and files_below(target.parent) == [target.name]


PROGRAM = """
import sys
from pathlib import Path
from cifar_jax.pretrained.download import download
url, target, size, digest = sys.argv[1:]
download([url], Path(target), int(size), digest)
"""


def test_a_killed_process_leaves_a_part_and_no_lock(target):
    """While it downloads another process waits for it, and goes on with what it left."""
    part = part_of(target, DIGEST)
    with serving(stalls(CONTENT[:HALF], SIZE), ranged(CONTENT)) as server:
        arguments = [server.url(), str(target), str(SIZE), DIGEST]
        with subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments]) as other:
            while not (part.exists() and part.stat().st_size):
                assert other.poll() is None
                time.sleep(0.01)
            with hearing(lambda text: "Another" in text and other.kill()):
                download([server.url()], target, SIZE, DIGEST)
        assert other.returncode == -signal.SIGKILL
        assert [asked.range for asked in server.asked] == [None, f"bytes={2 * CHUNK}-"]
    assert target.read_bytes() == CONTENT and files_below(target.parent) == [target.name]


EVENTS = {
    "whole": whole(CONTENT),
    "ranged": ranged(CONTENT),
    "cut": ranged(CONTENT, cut=HALF),
    "cut, no ranges": sends(CONTENT[:HALF], length=SIZE),
    "cut, no length": sends(CONTENT[:HALF]),
    "reset": resets(CONTENT[:HALF], SIZE),
    "other": whole(OTHER),
    "other, ranged": ranged(OTHER),
    "other, cut": ranged(OTHER, cut=HALF),
    "longer": sends(CONTENT + b"x"),
    "wrong range": sends(CONTENT, 206, Content_Range=f"bytes 0-{SIZE - 1}/{SIZE}"),
    "range that lies": lambda handler: sends(
        OTHER[:CHUNK], 206, Content_Range=f"bytes {(handler.headers['Range'] or '=0-')[6:]}{SIZE - 1}/{SIZE}"
    )(handler),
    "page": sends(PAGE),
    "404": sends(b"", 404),
    "416": sends(b"", 416),
    "503": sends(b"", 503),
    "hangs up": hangs_up,
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(EVENTS)), min_size=1, max_size=8))
def test_whatever_comes_the_file_is_right_or_not_there(tmp_path_factory, events):
    """Two places, attempts until one of them is good; what `bring` checks holds throughout."""
    target = tmp_path_factory.mktemp("any") / "weights.h5"
    with serving(*(EVENTS[event] for event in events)) as server:
        for _ in range(3):
            server.asked.clear()
            bring(target, server.url("a"), server.url("b"))
            assert len(server.asked) <= 60
        server.answers = [ranged(CONTENT)]
        assert bring(target, server.url("a")).error is None
