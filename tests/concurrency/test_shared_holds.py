"""Sessions that one server moves away, while clients write them through another one: in memory, on PostgreSQL, and on
Valkey."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from dspex_persist.state.abilities import SessionHold
from dspex_persist.state.commands import BeginExecution, InterruptExecutions, SetVariable
from dspex_persist.state.errors import (
    SessionHeldError,
    SessionMovedError,
    SessionNotFoundError,
    UnavailableError,
)
from dspex_persist.state.model import Value
from dspex_persist.state.shared import HoldingState, SharedGroups
from dspex_persist.state.shared_log import SharedHold, SharedLog
from dspex_persist.state.watch import Watch
from dspex_persist.testing.shared_memory_log import SharedMemory, SharedMemoryLog
from tests.deadline import within

SESSION = "session"
Open = Callable[..., SharedLog]


@pytest.fixture(params=["locking", "optimistic", "postgresql", "valkey"])
def open_log(request: pytest.FixtureRequest) -> Open:
    """Opens the log of another server."""
    if request.param == "postgresql":
        from dspex_persist.state.store.postgres.postgres_log import PostgresLog

        url = request.getfixturevalue("postgresql_url")
        return lambda lease_s: PostgresLog(url, lease_s=lease_s)
    if request.param == "valkey":
        import redis

        from dspex_persist.state.valkey.valkey_log import ValkeyLog

        store, prefix = request.getfixturevalue("valkey"), request.getfixturevalue("valkey_prefix")
        return lambda lease_s: ValkeyLog(lambda: redis.Redis.from_url(store), prefix=prefix, lease_s=lease_s)
    memory, optimistic = SharedMemory(), request.param == "optimistic"
    return lambda lease_s: SharedMemoryLog(memory, optimistic=optimistic, lease_s=lease_s)


class Deaf(HoldingState):
    """A server that hears nothing of others, unless it writes."""

    def __init__(self, log: SharedLog) -> None:
        self.hears = True
        super().__init__(SharedGroups(log), sweep_interval_s=0.05)
        follow = self._shared.follow
        self._shared.follow = lambda: follow() if self.hears else None  # type: ignore[method-assign]


class Two:
    def __init__(self, open_log: Open) -> None:
        self._open = open_log
        self.servers: list[Deaf] = []

    def start(self, lease_s: float = 30.0) -> tuple[Deaf, Deaf]:
        self.servers = [Deaf(self._open(lease_s)) for _ in range(2)]
        one, other = self.servers
        one.initialize_session(SESSION)
        one.register_variable(SESSION, "x", "integer", 0)
        assert other.get_value(SESSION, "x") == 0
        return one, other


@pytest.fixture
def two(open_log: Open) -> Iterator[Two]:
    two = Two(open_log)
    yield two
    for each in two.servers:
        each.hears = True
        each.close()


def write(value: int) -> SetVariable:
    return SetVariable(SESSION, "x", Value(str(value)))


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + within(15)
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.01)


def test_a_server_that_has_not_heard_of_a_hold_writes_nothing(two: Two) -> None:
    one, other = two.start()
    other.hears = False
    with one.hold_session(SESSION):
        pending = other.submit(write(1))
        # Whatever comes after it in the queue of that server is done, so that it has had its turn.
        other.initialize_session("later")
        assert not pending.done()
        assert one.get_value(SESSION, "x") == 0
        other.hears = True
    assert pending.result(within(10)) == 1
    assert one.get_value(SESSION, "x") == 1


def test_a_group_that_has_begun_before_a_hold_is_not_stored_after_it(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two.start()
    begun, go_on = threading.Event(), threading.Event()
    append = other._shared.log.append

    def late(*args: Any) -> None:
        if not begun.is_set():
            begun.set()
            go_on.wait(within(10))
        append(*args)

    monkeypatch.setattr(other._shared.log, "append", late)
    pending = other.submit(write(1))
    assert begun.wait(within(10))
    # A log that locks lets the group end before it begins the hold; another one has it run again.
    timer = threading.Timer(0.2, go_on.set)
    timer.start()
    with one.hold_session(SESSION):
        go_on.set()
        value = one.get_value(SESSION, "x")
        other.initialize_session("later")
        assert one.get_value(SESSION, "x") == value
        assert pending.done() == (value == 1)
    timer.join()
    assert pending.result(within(10)) == 1


def test_executions_elsewhere_are_waited_for_and_no_others_begin(two: Two) -> None:
    one, other = two.start()
    running = other.run(BeginExecution(SESSION, "tool")).execution_id
    with pytest.raises(UnavailableError, match="a tool is still running"):
        one.hold_session(SESSION, timeout_s=0.1)
    wait_until(lambda: SESSION not in other._groups.held)
    held: list[SessionHold] = []
    holder = threading.Thread(target=lambda: held.append(one.hold_session(SESSION)))
    holder.start()
    wait_until(lambda: SESSION in other._groups.held)
    # What is running may write.
    assert other.submit(write(1)).result(within(10)) == 1
    begun = other.submit(BeginExecution(SESSION, "tool"))
    assert not begun.done()
    other.run(InterruptExecutions(SESSION, (running,)))
    holder.join(within(10))
    assert not begun.done()
    held.pop().close()
    assert begun.result(within(10)).execution_id != running


def test_only_one_server_holds_it(two: Two) -> None:
    one, other = two.start()
    other.hears = False
    with one.hold_session(SESSION):
        # It has not heard of it, but the log has.
        with pytest.raises(SessionHeldError):
            other.hold_session(SESSION)
        assert other.submit(write(1)).done() is False
    other.hears = True
    wait_until(lambda: one.get_value(SESSION, "x") == 1)
    other.hold_session(SESSION).close()


def test_a_move_is_told_to_those_who_waited_elsewhere(two: Two) -> None:
    one, other = two.start()
    with other.watch(SESSION) as watch:
        with one.hold_session(SESSION) as held:
            pending = other.submit(write(1))
            other.initialize_session("later")
            held.move("the moon")
        wait_until(lambda: has_ended(watch))
    with pytest.raises(SessionMovedError) as raised:
        pending.result(within(10))
    assert raised.value.moved_to == "the moon"
    with pytest.raises(SessionNotFoundError):
        other.set_variable(SESSION, "x", 2)


def has_ended(watch: Watch) -> bool:
    try:
        watch.pull()
    except SessionNotFoundError:
        return True
    return False


def test_the_hold_of_a_server_that_dies_ends_with_its_lease(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two.start(lease_s=within(0.25))
    held = one.hold_session(SESSION)
    pending = other.submit(write(1))
    other.initialize_session("later")
    assert not pending.done()
    monkeypatch.setattr(one._shared.log, "renew", lambda: None)
    assert pending.result(within(20)) == 1
    monkeypatch.undo()
    # It has another lease, but the hold was of the one before.
    wait_until(lambda: writes(one))
    with pytest.raises(UnavailableError, match="was not moved"):
        held.move("the moon")
    held.close()
    assert other.get_value(SESSION, "x") == 2
    one.hold_session(SESSION).close()


def writes(server: HoldingState) -> bool:
    try:
        server.set_variable(SESSION, "x", 2)
    except UnavailableError:
        return False
    return True


class _Forgetful(SharedMemoryLog):
    """A planted bug: each server only knows of its own holds."""

    @property
    def holds(self) -> Mapping[str, SharedHold]:
        return {session_id: hold for session_id, hold in super().holds.items() if hold.is_own}


def test_holds_that_only_their_server_knows_are_found() -> None:
    memory = SharedMemory()
    two = Two(lambda lease_s: _Forgetful(memory, lease_s=lease_s))
    try:
        with pytest.raises(AssertionError):
            test_a_server_that_has_not_heard_of_a_hold_writes_nothing(two)
    finally:
        for each in two.servers:
            each.hears = True
            each.close()
