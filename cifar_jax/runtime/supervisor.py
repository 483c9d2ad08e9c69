"""The parent process that each process of a distributed run works under, which explains an end by a signal.

JAX aborts a process, from C++, as soon as it notices that another one is gone, so the process cannot say why it ends.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from typing import TextIO

# JAX itself reads only the first of these.
NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
DETECT = "CIFAR_JAX_DISTRIBUTED"
# Notes to the parent process, in the file for C++ logs.
_JOINED, _ENDED = "cifar_jax joined", "cifar_jax ended with"
_CHILD = "CIFAR_JAX_SUPERVISED"  # file descriptors of a pipe from the parent, and of the file for C++ logs
CONTINUE = "Start all processes again with --resume --out DIR to continue from the last checkpoint"


def is_distributed() -> bool:
    """Whether the environment variables ask for a run of several processes."""
    return any(os.environ.get(name) for name in NAMES) or detects()


def detects() -> bool:
    """Whether JAX is to find out what the environment variables do not say."""
    return os.environ.get(DETECT, "0") not in ("", "0")


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


def record_joined() -> None:
    """Tells the parent process that this one has joined the others."""
    _tell_parent(_JOINED)


def record_end(code: int) -> None:
    """Tells the parent process the exit code, in case JAX aborts this process before it has ended."""
    _tell_parent(f"{_ENDED} {code}")


def _tell_parent(note: str) -> None:
    if _CHILD in os.environ:
        with contextlib.suppress(OSError):  # no space left for the file
            os.write(2, f"\n{note}\n".encode())
