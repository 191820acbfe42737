"""Forked children do not share descriptors, locks and sockets with their parents."""

import fcntl
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from weakref import WeakSet

import pytest

from dspex_persist.infra import forks

DEADLINE_S = 20


def in_child(work: Callable[[], object], *, deadline_s: int = DEADLINE_S) -> str:
    """Return the result of `work` in a forked child, as text. SIGALRM ends a child that takes too long."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(deadline_s)
        try:
            result = str(work())
        except BaseException as error:  # noqa: BLE001 -- the child's end
            result = f"{type(error).__name__}: {error}"
        os.write(writing, result.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        result = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0, result
    return result


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    descriptor = forks.own(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600))
    yield descriptor
    forks.close(descriptor)


def test_a_child_does_not_keep_the_lock_of_an_owned_descriptor(tmp_path: Path) -> None:
    held = forks.own(os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT, 0o600))
    fcntl.flock(held, fcntl.LOCK_EX)
    child = multiprocessing.get_context("fork").Process(target=signal.pause)
    begun, beginning = os.pipe()
    os.register_at_fork(after_in_child=lambda: os.write(beginning, b"!"))
    child.start()
    # The hooks of a child run in the order of their registration, so it has closed the descriptor by then.
    os.read(begun, 1)
    try:
        forks.close(held)
        with (tmp_path / "lock").open("rb") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert child.is_alive()
    finally:
        child.kill()
        child.join(DEADLINE_S)
        child.close()


def test_a_childs_writes_to_an_owned_descriptor_have_no_effect(file: int) -> None:
    in_child(lambda: os.write(file, b"from the child"))
    os.write(file, b"from the parent")
    assert os.pread(file, 100, 0) == b"from the parent"


def test_a_child_keeps_a_descriptor_that_reuses_the_number_of_a_closed_one(tmp_path: Path) -> None:
    gone = forks.own(os.open(tmp_path / "gone", os.O_RDWR | os.O_CREAT))
    forks.close(gone)
    reused = os.open(tmp_path / "another", os.O_RDWR | os.O_CREAT)
    assert reused == gone
    in_child(lambda: os.write(reused, b"kept"))
    assert os.pread(reused, 10, 0) == b"kept"
    os.close(reused)


class Listener:
    def __init__(self) -> None:
        self.quiet: bool | None = None

    def forked(self, *, quiet: bool) -> None:
        self.quiet = quiet


def test_listeners_are_notified_in_the_child_only() -> None:
    listener = Listener()
    forks.register(listener)
    assert in_child(lambda: listener.quiet) == "True"
    assert listener.quiet is None


def test_listeners_are_not_kept_alive_and_can_be_unregistered() -> None:
    alive = WeakSet([kept := Listener()])
    forks.register(kept)
    removed = Listener()
    forks.register(removed)
    forks.unregister(removed)
    assert in_child(lambda: removed.quiet) == "None"
    del kept
    assert not alive


def test_a_fork_waits_for_a_critical_section() -> None:
    begun, forking, listener = threading.Event(), threading.Event(), Listener()
    forks.register(listener)
    # Registered last, so it runs first of the hooks before a fork.
    os.register_at_fork(before=forking.set)

    def work() -> None:
        with forks.busy():
            begun.set()
            forking.wait(DEADLINE_S)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(DEADLINE_S)
    assert in_child(lambda: listener.quiet) == "True"
    thread.join()


def test_a_thread_that_was_interrupted_as_it_left_a_section_is_in_none_once_it_has_ended() -> None:
    listener = Listener()
    forks.register(listener)
    thread = threading.Thread(target=forks.busy().__enter__)
    thread.start()
    thread.join()
    assert in_child(lambda: listener.quiet) == "True"
    assert forks.inside() == set()


def test_nor_is_a_later_thread_that_has_its_number() -> None:
    interrupted = threading.Thread(target=forks.busy().__enter__)
    interrupted.start()
    interrupted.join()
    ended, others = threading.Event(), list[threading.Thread]()
    while interrupted.ident not in {other.ident for other in others}:
        assert len(others) < 100
        others.append(threading.Thread(target=ended.wait, args=(DEADLINE_S,)))
        others[-1].start()
    assert forks.inside() == set()
    ended.set()
    for other in others:
        other.join()


def test_a_fork_does_not_wait_forever_and_the_child_knows() -> None:
    begun, ended, listener = threading.Event(), threading.Event(), Listener()
    forks.register(listener)

    def work() -> None:
        with forks.busy():
            begun.set()
            ended.wait(DEADLINE_S)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(DEADLINE_S)
    assert in_child(lambda: listener.quiet) == "False"
    # The parent's section does not block one of the child.
    assert in_child(lambda: forks.busy().__enter__()) == "None"
    ended.set()
    thread.join()


def test_a_fork_in_a_critical_section_of_its_own_thread_is_not_quiet() -> None:
    listener = Listener()
    forks.register(listener)
    with forks.busy(), forks.busy():
        assert in_child(lambda: listener.quiet) == "False"
    assert in_child(lambda: listener.quiet) == "True"


def test_signals_are_not_blocked_after_a_fork() -> None:
    assert in_child(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ())) == "set()"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_a_child_blanks_the_sockets_of_one_address_only(family: socket.AddressFamily, tmp_path: Path) -> None:
    listening, other = (socket.socket(family) for _ in range(2))
    for number, each in enumerate((listening, other)):
        each.bind(("127.0.0.1", 0) if family is socket.AF_INET else str(tmp_path / f"{number}"))
        each.listen()
    client = socket.create_connection(listening.getsockname()) if family is socket.AF_INET else socket.socket(family)
    if family is socket.AF_UNIX:
        client.connect(listening.getsockname())
    accepted, _ = listening.accept()
    name = listening.getsockname()

    def look() -> list[bool]:
        forks.blank_sockets(name[1] if isinstance(name, tuple) else name)
        return [_is_socket(each) for each in (listening, accepted, other, client)]

    assert in_child(look) == "[False, False, True, True]"
    for each in (listening, other, accepted, client):
        each.close()


def _is_socket(each: socket.socket) -> bool:
    try:
        each.getsockname()
    except OSError:
        return False
    return True


def test_each_process_knows_its_number() -> None:
    assert forks.process() == os.getpid()
    assert in_child(lambda: forks.process() == os.getpid()) == "True"
