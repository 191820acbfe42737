"""What a forked child does not share with its parent."""

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
    """What `work` gives in a forked child, as text; a child that takes too long is ended by SIGALRM."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(deadline_s)
        try:
            said = str(work())
        except BaseException as error:  # noqa: BLE001 -- the child's end
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0, said
    return said


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    descriptor = forks.own(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600))
    yield descriptor
    forks.close(descriptor)


def test_a_child_does_not_keep_a_lock_on_what_is_owned(tmp_path: Path) -> None:
    held = forks.own(os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT, 0o600))
    fcntl.flock(held, fcntl.LOCK_EX)
    child = multiprocessing.get_context("fork").Process(target=signal.pause)
    begun, beginning = os.pipe()
    os.register_at_fork(after_in_child=lambda: os.write(beginning, b"!"))
    child.start()
    # The hooks of a child run in the order in which they were registered: it has let go by then.
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


def test_what_a_child_writes_to_an_owned_descriptor_goes_nowhere(file: int) -> None:
    in_child(lambda: os.write(file, b"from the child"))
    os.write(file, b"from the parent")
    assert os.pread(file, 100, 0) == b"from the parent"


def test_a_descriptor_that_was_closed_is_no_concern_of_a_child(tmp_path: Path) -> None:
    gone = forks.own(os.open(tmp_path / "gone", os.O_RDWR | os.O_CREAT))
    forks.close(gone)
    taken = os.open(tmp_path / "another", os.O_RDWR | os.O_CREAT)
    assert taken == gone
    in_child(lambda: os.write(taken, b"kept"))
    assert os.pread(taken, 10, 0) == b"kept"
    os.close(taken)


class Told:
    def __init__(self) -> None:
        self.quiet: bool | None = None

    def forked(self, *, quiet: bool) -> None:
        self.quiet = quiet


def test_a_child_is_told_and_its_parent_is_not() -> None:
    told = Told()
    forks.register(told)
    assert in_child(lambda: told.quiet) == "True"
    assert told.quiet is None


def test_whoever_is_told_is_not_kept_alive_and_can_be_forgotten() -> None:
    alive = WeakSet([kept := Told()])
    forks.register(kept)
    forgotten = Told()
    forks.register(forgotten)
    forks.unregister(forgotten)
    assert in_child(lambda: forgotten.quiet) == "None"
    del kept
    assert not alive


def test_a_fork_waits_for_what_is_under_way() -> None:
    begun, forking, told = threading.Event(), threading.Event(), Told()
    forks.register(told)
    # Runs first of the hooks before a fork, as it was registered last.
    os.register_at_fork(before=forking.set)

    def work() -> None:
        with forks.busy():
            begun.set()
            forking.wait(DEADLINE_S)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(DEADLINE_S)
    assert in_child(lambda: told.quiet) == "True"
    thread.join()


def test_a_fork_does_not_wait_for_ever_and_the_child_knows() -> None:
    begun, ended, told = threading.Event(), threading.Event(), Told()
    forks.register(told)

    def work() -> None:
        with forks.busy():
            begun.set()
            ended.wait(DEADLINE_S)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(DEADLINE_S)
    assert in_child(lambda: told.quiet) == "False"
    # Nothing is in the child's way, whoever was in the middle of something.
    assert in_child(lambda: forks.busy().__enter__()) == "None"
    ended.set()
    thread.join()


def test_a_fork_in_the_middle_of_something_of_its_own_is_not_quiet() -> None:
    told = Told()
    forks.register(told)
    with forks.busy(), forks.busy():
        assert in_child(lambda: told.quiet) == "False"
    assert in_child(lambda: told.quiet) == "True"


def test_signals_are_not_held_back_after_a_fork() -> None:
    assert in_child(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ())) == "set()"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_a_child_lets_go_of_the_sockets_of_an_address_and_of_no_other(
    family: socket.AddressFamily, tmp_path: Path
) -> None:
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
