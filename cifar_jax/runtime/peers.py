"""The end of a distributed run: if one process fails or is lost, all of them end, and each says why.

Without this, the other processes wait in a collective for the one that failed, and it waits for them in its exit, until
JAX aborts them all. Here the process that fails announces its reason to the others through the key-value store of JAX's
coordination service, and all leave without waiting. JAX aborts a process, from C++, as soon as it notices that another
one is gone; so each works under a parent process that does no more than explain such an end.
"""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TextIO

from cifar_jax.errors import RunError

# JAX itself reads only the first of these.
NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
DETECT = "CIFAR_JAX_DISTRIBUTED"
# Notes to the parent process, in the file for C++ logs.
_JOINED, _ENDED = "cifar_jax joined", "cifar_jax ended with"
_CHILD = "CIFAR_JAX_SUPERVISED"  # file descriptors of a pipe from the parent, and of the file for C++ logs

HEARTBEAT = 25  # seconds without a sign of life after which a process is considered lost
POLL = 0.5  # seconds between looks for an announcement
GRACE = 1.0  # seconds that a process has to end by an error of its own once another one has failed
PATIENCE = 5.0  # seconds that a process that failed waits for the others to have read its reason
CONTINUE = "Start all processes again with --resume --out DIR to continue from the last checkpoint"

logger = logging.getLogger(__name__)


def is_distributed() -> bool:
    """Whether the environment variables ask for a run of several processes."""
    return any(os.environ.get(name) for name in NAMES) or os.environ.get(DETECT, "0") not in ("", "0")


# ---------------------------------------------------------------------------------------------------------------------
# The parent process


def supervise(debug: bool = False) -> None:
    """Continues in a child process; the parent waits for it, explains its end if need be, and exits.

    The parent passes SIGTERM and Ctrl-C on. If the parent is killed, the child ends at once. C++ logs of the child say
    little to a user; they are read only for the cause of its end.

    Args:
      debug: whether the child's C++ logs are shown instead.
    """
    if _CHILD in os.environ:
        _become_child(debug)
        return
    alive, ours = os.pipe()
    with tempfile.TemporaryFile("w+", errors="backslashreplace") as logs:
        child = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env=os.environ | {_CHILD: f"{alive},{logs.fileno()}"},
            pass_fds=(alive, logs.fileno()),
        )
        os.close(alive)
        # A terminal sends Ctrl-C to both processes.
        signal.signal(signal.SIGINT, lambda *_: None if _in_foreground() else child.send_signal(signal.SIGINT))
        signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
        code = child.wait()
        logs.seek(0)
        code, sentence = explained_end(code, logs.read(), os.environ.get(NAMES[2]))
    if sentence:
        print(f"Error: {sentence}", file=sys.stderr, flush=True)
    os.close(ours)
    os._exit(code)


def _in_foreground() -> bool:
    """Whether a terminal sends Ctrl-C to this process and its children."""
    with contextlib.suppress(OSError), open("/dev/tty", "rb", 0) as terminal:
        return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    return False


def explained_end(code: int, logs: str, own: str | None) -> tuple[int, str | None]:
    """Returns the exit code for a child's return code, and a sentence if it was ended by a signal and has said nothing.

    Args:
      code: return code; of a signal its negative number.
      logs: what the process wrote to file descriptor 2, as C++ does.
      own: the number of this process, if known.
    """
    if code >= 0:
        return code, None
    if recorded := re.search(rf"^{_ENDED} (\d+)$", logs, re.MULTILINE):
        return int(recorded[1]), None
    if -code in (signal.SIGINT, signal.SIGTERM):
        return 128 - code, None
    this = "This process" if own is None else f"Process {own}"
    if code == -signal.SIGKILL:
        return 1, f"{this} was killed by SIGKILL, perhaps as memory ran out. {CONTINUE}."
    if "distributed service detected fatal errors" in logs and f"{_JOINED}\n" not in logs:
        return 1, f"{this} waited for the others in vain. Start all of them, with the same ${NAMES[0]}."
    if "distributed service detected fatal errors" in logs:
        unhealthy = re.search(r"stopped sending heartbeats\)[^\n]*\n(\d+(?:\n\d+)*)\n", logs)
        lost = ", ".join(unhealthy[1].split()) if unhealthy else "0"  # process 0 runs the coordination service
        return 1, lost_sentence(f"Process {lost}")
    fatal = re.search(r"^F\d{4} .*?\] (.*)", logs, re.MULTILINE)
    reason = fatal[1] if fatal else logs.strip()[-300:] or "without a message"
    return 1, f"{this} was ended by {signal.Signals(-code).name} ({reason}). {CONTINUE}."


def lost_sentence(process: str) -> str:
    """Says that a process is gone without having given a reason."""
    return f"{process} of this run was lost. {CONTINUE}."


def _become_child(debug: bool) -> None:
    """Ends this process when its parent ends, and unless `debug` sends what C++ prints to the file of its logs."""
    alive, logs = map(int, os.environ[_CHILD].split(","))

    def end_with_parent() -> None:
        os.read(alive, 1)  # returns when the parent is gone, as it writes nothing
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if debug:
        return
    sys.stdout, sys.stderr = _on_own_descriptor(sys.stdout), _on_own_descriptor(sys.stderr)
    os.dup2(logs, 1)
    os.dup2(logs, 2)


def _on_own_descriptor(stream: TextIO) -> TextIO:
    """Opens what a stream of Python writes to once more, so that it stays when C++'s is sent elsewhere."""
    stream.flush()
    buffering = 1 if stream.line_buffering or getattr(stream, "write_through", False) else -1
    return open(os.dup(stream.fileno()), "w", buffering, encoding=stream.encoding, errors="backslashreplace")


# ---------------------------------------------------------------------------------------------------------------------
# The processes of a run


class Store(Protocol):
    """The part of JAX's key-value store that is used."""

    def key_value_set(self, key: str, value: str) -> None:
        """Sets a key; raises if it has been set."""

    def key_value_try_get(self, key: str) -> str:
        """Returns the value of a key; raises if it has not been set."""


class Peers:
    """The processes of a run, which end together.

    Example:
      >>> with peers.failing_together(explain, say):  # doctest: +SKIP
      ...     train(config)
    """

    def __init__(
        self,
        store: Store,
        own: int,
        count: int,
        leave: Callable[[int], None] = os._exit,
        poll: float = POLL,
        patience: float = PATIENCE,
        long: float = 600.0,
    ) -> None:
        """Takes what reaches the other processes.

        Args:
          store: a key-value store that all processes have in common.
          own: the number of this process.
          count: the number of processes.
          leave: ends this process at once. JAX's regular exit waits for the others.
          poll: seconds between looks for an announcement.
          patience: seconds that a process that failed waits for the others to have read its reason.
          long: seconds that processes wait for the first one to write the run.
        """
        self._store, self._own, self._count = store, own, count
        self._leave, self._poll, self._patience, self._long = leave, poll, patience, long
        self._ends = threading.Lock()  # held by the thread that ends this process

    @contextlib.contextmanager
    def failing_together(
        self, explain: Callable[[BaseException], tuple[str, int]], say: Callable[[str], object]
    ) -> Iterator[None]:
        """Ends all processes if one of them leaves the block by an error, or is lost.

        An error with the attribute `in_all_processes` is raised in all of them; each is left time to react to it.

        Args:
          explain: returns the message and exit code for an error of the block.
          say: shows a message. It may be called from another thread, as the block may be waiting for ever for a process
            that is gone.
        """
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done, say), daemon=True)
        watcher.start()
        try:
            yield
        except BaseException as error:
            if getattr(error, "in_all_processes", False):
                self._end_with_all(*explain(error), say)
                raise
            if is_peer_lost(error):
                # It may have announced why it leaves, in which case the watcher ends this process.
                watcher.join(2 * self._poll + GRACE)
                error = RunError(lost_sentence(f"Process {1 - self._own}" if self._count == 2 else "Another process"))
            reason, code = explain(error)
            self._set("failure", {"process": self._own, "reason": reason, "code": code})
            self._end(reason, code, say)
            raise
        finally:
            done.set()

    def leave_together(self, code: int) -> None:
        """Waits, before an end that all processes have agreed on, until all have come to it.

        The first process still writes the run when the others are here, for as long as that takes. If it fails in that,
        they end for its reason; if it is killed, JAX aborts them.
        """
        record_end(code)
        self._set(f"finished/{self._own}", {})
        self._wait_for("finished", self._long)

    def _end_with_all(self, reason: str, code: int, say: Callable[[str], object]) -> None:
        say(reason)
        self._flush()
        self.leave_together(code)
        self._leave(code)

    def _watch(self, done: threading.Event, say: Callable[[str], object]) -> None:
        while not done.wait(self._poll):
            failure = self._get("failure")
            if failure and failure["process"] != self._own:
                if not done.wait(GRACE):  # a process that fails as well gives its own reason
                    self._end(f"Process {failure['process']} failed: {failure['reason']}", failure["code"], say)
                return

    def _end(self, reason: str, code: int, say: Callable[[str], object]) -> None:
        with self._ends:
            say(reason)
            self._flush()
            record_end(code)
            self._set(f"acknowledged/{self._own}", {})
            # The others read the reason from the first process.
            if self._own == 0 or (self._get("failure") or {}).get("process") == self._own:
                self._wait_for("acknowledged", self._patience)
            self._leave(code)

    def _flush(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()

    def _wait_for(self, name: str, seconds: float) -> None:
        """Waits until all processes have set a key of theirs, up to a number of seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if all(self._get(f"{name}/{process}") is not None for process in range(self._count)):
                break
            time.sleep(self._poll / 5)

    def _get(self, key: str) -> Any:
        try:
            return json.loads(self._store.key_value_try_get(f"cifar_jax/{key}"))
        except Exception:  # not set, or the service is gone with its process
            return None

    def _set(self, key: str, value: Mapping[str, Any]) -> None:
        with contextlib.suppress(Exception):  # another process was first, or the service is gone
            self._store.key_value_set(f"cifar_jax/{key}", json.dumps(value))


def is_peer_lost(error: BaseException) -> bool:
    """Whether an error of JAX, which begins with a status code, means that another process of the run is gone."""
    of_jax = re.match(
        r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION):", str(error)
    )
    about = re.search(r"Gloo|NCCL|coordination.?service|heartbeat|Connection (closed|reset) by peer", str(error), re.I)
    return bool(of_jax and about)


def record_end(code: int) -> None:
    """Tells the parent process the exit code, in case JAX aborts this process before it has ended."""
    _tell_parent(f"{_ENDED} {code}")


@contextlib.contextmanager
def joining(address: str, patience: float = 10.0) -> Iterator[None]:
    """Lets signals end the process while the block waits, within C++, for the other processes; logs a long wait."""
    if threading.current_thread() is threading.main_thread():
        usual = signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX replaces it once all have joined
    else:
        usual = None
    waiting = threading.Timer(patience, logger.info, [f"Waiting for the other processes at {address}."])
    waiting.daemon = True
    waiting.start()
    try:
        yield
    finally:
        waiting.cancel()
        if usual is not None:
            signal.signal(signal.SIGINT, usual)
    _tell_parent(_JOINED)


def _tell_parent(note: str) -> None:
    if _CHILD in os.environ:
        with contextlib.suppress(OSError):  # no space left for the file
            os.write(2, f"\n{note}\n".encode())
