"""The end of a distributed run: if one process fails or is lost, all of them end, and each says why.

Without this, the other processes wait in a collective for the one that failed, and it waits for them in its exit, until
JAX aborts them all. Here the process that fails announces its reason to the others through the key-value store of JAX's
coordination service, and all leave without waiting. What JAX aborts is explained by `supervisor`.
"""

import contextlib
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from cifar_jax.errors import RunError
from cifar_jax.runtime.supervisor import lost_sentence, record_end, record_joined

HEARTBEAT = 25  # seconds without a sign of life after which a process is considered lost
POLL = 0.5  # seconds between looks for an announcement
GRACE = 1.0  # seconds that a process has to end by an error of its own once another one has failed
PATIENCE = 5.0  # seconds that a process that failed waits for the others to have read its reason

logger = logging.getLogger(__name__)


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
        self._ends, self._ended = threading.Lock(), False  # held by the thread that ends this process

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
                watcher.join(2 * (self._poll + GRACE))
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
            if self._ended:  # for the reason that the other thread has given
                return
            self._ended = True
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
    record_joined()
