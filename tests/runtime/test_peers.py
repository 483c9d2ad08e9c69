"""One process of a run that fails ends all of them, each with a sentence."""

import threading

import pytest

from cifar_jax.errors import UserError
from cifar_jax.runtime.peers import GRACE, Peers, is_peer_lost


class Store(dict):
    """A key-value store like JAX's."""

    def key_value_set(self, key, value):
        if self.setdefault(key, value) is not value:
            raise RuntimeError(f"ALREADY_EXISTS: {key}")

    def key_value_try_get(self, key):
        return self[key]


class Process(threading.Thread):
    """A process of a run: a thread that does `work` and remembers how it ended."""

    def __init__(self, store, own, work):
        super().__init__(daemon=True)
        self.own, self.shown, self.codes, self.ended = own, [], [], threading.Event()
        self.peers = Peers(store, own, 2, leave=self.leave, poll=0.01, patience=2)
        self.work = work
        self.start()

    def leave(self, code):
        self.codes.append(code)
        self.ended.set()

    def run(self):
        try:
            with self.peers.failing_together(lambda error: (str(error), 2), self.shown.append):
                self.work(self)
        except Exception:
            self.ended.set()
        else:
            self.peers.leave_together(143)
            self.leave(143)


def fails(reason):
    def work(_):
        raise UserError(reason)

    return work


def waits_for_ever(process):
    process.ended.wait(10)  # as in a collective, which nothing in this thread can end


@pytest.mark.parametrize("failing", [0, 1])
def test_the_others_end_with_the_reason_of_the_one_that_failed(failing):
    store = Store()
    works = [waits_for_ever, waits_for_ever]
    works[failing] = fails("The weights are missing.")
    processes = [Process(store, own, work) for own, work in enumerate(works)]
    for process in processes:
        process.ended.wait(10)
    other = processes[1 - failing]
    assert processes[failing].shown == ["The weights are missing."] and processes[failing].codes == [2]
    assert other.shown == [f"Process {failing} failed: The weights are missing."] and other.codes == [2]


def test_what_fails_in_all_processes_is_said_once_by_each():
    store = Store()
    processes = [Process(store, own, fails("No such option.")) for own in (0, 1)]
    for process in processes:
        process.join(10)
        assert process.shown == ["No such option."] and process.codes == [2]


@pytest.mark.parametrize("message", ["UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:9"])
def test_a_process_that_is_gone_without_a_reason_is_named(message):
    process = Process(Store(), 0, fails(message))
    process.join(10)
    assert process.shown[0].startswith("Process 1 of this run was lost. ") and "--resume --out DIR" in process.shown[0]


def test_the_reason_of_a_process_that_is_gone_is_preferred():
    """The broken connection is seen first, the announcement a moment later."""
    store = Store()
    first = Process(store, 0, fails("UNKNOWN: Gloo: Connection closed by peer"))
    Process(store, 1, fails("The disk is full."))
    first.ended.wait(10)
    assert first.shown == ["Process 1 failed: The disk is full."]


def test_processes_that_leave_together_say_nothing_and_wait_for_each_other():
    store, going = Store(), threading.Event()
    quick = Process(store, 0, lambda _: None)
    slow = Process(store, 1, lambda _: going.wait(10))
    assert not quick.ended.wait(0.3)
    going.set()
    for process in (quick, slow):
        process.join(10)
        assert process.shown == [] and process.codes == [143]


class Diverged(Exception):
    in_all_processes = True


def test_an_error_of_all_processes_leaves_the_first_one_time_to_write():
    store, writing = Store(), threading.Event()

    def diverges(process):
        if process.own == 0:
            assert writing.wait(10)
        raise Diverged("The loss is not finite.")

    second = Process(store, 1, diverges)
    first = Process(store, 0, diverges)
    assert not second.ended.wait(2 * GRACE) and not first.shown
    writing.set()
    for process in (first, second):
        process.join(10)
        assert process.shown == ["The loss is not finite."] and process.codes == [2]


def test_a_first_process_that_fails_in_writing_ends_those_that_wait_for_it():
    store = Store()
    waiting = Process(store, 1, lambda process: process.peers.leave_together(143))
    Process(store, 0, fails("The disk is full."))
    assert waiting.ended.wait(10)
    assert waiting.shown == ["Process 0 failed: The disk is full."] and waiting.codes[0] == 2


def test_errors_of_devices_and_of_files_are_not_those_of_peers():
    assert not is_peer_lost(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    assert not is_peer_lost(UserError("--out /data/nccl-tests holds other files"))
    assert not is_peer_lost(ConnectionResetError("[Errno 104] Connection reset by peer"))
