"""What a server has in memory of a log that it shares: when it forgets, and when it begins another lease."""

import re
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from freezegun.api import FrozenDateTimeFactory

from dspex_persist import clock
from dspex_persist.infra.metrics import Family
from dspex_persist.state.commands import GetVariable, InitializeSession, ReadState, RegisterVariable, SetVariable
from dspex_persist.state.commands.base import Command
from dspex_persist.state.errors import StorageError, UnavailableError
from dspex_persist.state.groups import Job, Outcome
from dspex_persist.state.model import Origin, Value
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.shared import ServerMeter, SharedGroups
from dspex_persist.state.shared.server_lease import ServerLease
from dspex_persist.testing.shared_memory_log import SharedMemory, SharedMemoryLog
from tests.clocks import pass_s
from tests.deadline import within
from tests.logs import capture_logs

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "metrics.md"


class Log(SharedMemoryLog):
    """Brings sessions up to date in memory, until it is told to fail."""

    fails: Exception | None = None

    def advance(self, states: Sequence[SessionState], until: int) -> list[SessionState | None]:
        if self.fails is not None:
            raise self.fails
        return [self.load(state.session.id) for state in states]


def server(memory: SharedMemory, **options: Any) -> tuple[SharedGroups, Log]:
    log = Log(memory, **options)
    return SharedGroups(log, server_meter=ServerMeter()), log


@pytest.fixture
def memory() -> SharedMemory:
    return SharedMemory()


@pytest.fixture
def two(memory: SharedMemory) -> tuple[SharedGroups, SharedGroups, Log]:
    one, _ = server(memory)
    other, log = server(memory)
    do(one, InitializeSession("s"), RegisterVariable("s", "n", "integer", Value("0")))
    do(other, ReadState("s"))
    return one, other, log


def do(groups: SharedGroups, *commands: Command[Any]) -> Sequence[Outcome]:
    outcomes = groups.write_group([Job(each, Origin("test", each.cause)) for each in commands])
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return outcomes


def counted(groups: SharedGroups, name: str) -> dict[tuple[str, ...], float]:
    assert groups.server_meter is not None
    families: dict[str, Family] = {family.name: family for family in groups.server_meter.families()}
    return dict(families[f"dspex_persist_{name}"].samples)


def test_what_is_counted_is_what_is_documented() -> None:
    section = DOCUMENT.read_text(encoding="utf-8").partition("### Servers that share a log")[2]
    rows = re.findall(r"^\| `([a-z_]+)` \| (\w+) \| (.*?) ?\| ", section, re.MULTILINE)
    documented = {(name, kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert documented == {(family.name, family.kind, family.labels) for family in ServerMeter().families()}


def test_it_follows_the_others(two: tuple[SharedGroups, SharedGroups, Log]) -> None:
    one, other, _ = two
    known: list[int] = []
    other.on_known = known.append
    do(one, SetVariable("s", "n", Value("1")))
    assert other.known < one.known
    other.follow()
    state = other.find_loaded("s")
    assert state is not None
    assert (state.variables["n"].value.json, known[-1]) == ("1", one.known)
    assert counted(other, "foreign_commits_total")[()] == 3
    assert counted(other, "foreign_sessions_total") == {("advanced",): 1, ("dropped",): 0}


@pytest.mark.parametrize("error", [StorageError("the cable"), ZeroDivisionError()])
def test_news_that_are_learnt_in_part_are_not_forgotten(
    two: tuple[SharedGroups, SharedGroups, Log], error: Exception
) -> None:
    """The log hands them out once: what memory has of the sessions in them is worth nothing then."""
    one, other, log = two
    do(one, InitializeSession("t"), RegisterVariable("t", "n", "integer", Value("0")))
    do(other, ReadState("t"))
    do(one, SetVariable("s", "n", Value("1")), SetVariable("t", "n", Value("1")))
    log.fails = error
    away: list[object] = []
    other.on_away = away.append
    if isinstance(error, StorageError):
        other.follow()
        assert away == [error]
    else:
        with pytest.raises(ZeroDivisionError):
            other.follow()
    log.fails = None
    for session in ("s", "t"):
        (outcome,) = do(other, GetVariable(session, "n"))
        assert outcome.result.value.json == "1"


@pytest.mark.parametrize("idle", [True, False])
def test_a_server_that_was_taken_for_dead_begins_another_lease(memory: SharedMemory, idle: bool) -> None:
    one, _ = server(memory, lease_s=0.0)
    other, _ = server(memory)
    do(other, InitializeSession("s"))
    fenced: list[int] = []
    other.on_fenced = lambda: fenced.append(1)
    one.log.fence()
    if idle:
        # As the thread does that renews the lease.
        other.lose_lease()
        other.follow()
    else:
        # Reads are none of an execution that is over.
        (read, write) = other.write_group(
            [Job(ReadState("s"), Origin("test", "test")), Job(InitializeSession("t"), Origin("test", "test"))]
        )
        assert read.error is None
        assert isinstance(write.error, UnavailableError)
    assert (fenced, counted(other, "fenced_total")[()]) == ([1], 1)
    other.follow()
    do(other, InitializeSession("t"))
    assert fenced == [1]


def test_it_says_once_why_a_lease_cannot_be_renewed(memory: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(memory, lease_s=0.02)
    tried = threading.Semaphore(0)
    renew = log.renew

    def refuse() -> None:
        tried.release()
        raise UnavailableError("too many connections")

    def renew_again() -> None:
        renew()
        tried.release()

    with capture_logs() as events:
        monkeypatch.setattr(log, "renew", refuse)
        lease = ServerLease(log, lambda: None)
        try:
            for _ in range(3):
                assert tried.acquire(timeout=within(10))
            monkeypatch.setattr(log, "renew", renew_again)
            for _ in range(6):
                assert tried.acquire(timeout=within(10))
        finally:
            lease.close()
    assert [(each["event"], each.get("reason")) for each in events] == [
        ("the lease cannot be renewed", "unavailable: too many connections"),
        ("the lease can be renewed again", None),
    ]


def test_servers_have_time_to_renew_their_leases_after_the_log_was_away(
    memory: SharedMemory, monkeypatch: pytest.MonkeyPatch, frozen: FrozenDateTimeFactory
) -> None:
    _, quiet = server(memory)
    other, log = server(memory)
    memory.leases[quiet._id] = (1, float("-inf"))

    def be_away() -> None:
        raise UnavailableError("the cable")

    with monkeypatch.context() as patched:
        patched.setattr(log, "news", be_away)
        other.follow()
        other.sweep()
    other.follow()
    for passed_s in (0.0, log.lease_s - 1.0):
        pass_s(frozen, passed_s)
        other.sweep()
        assert quiet.has_lease()
    pass_s(frozen, 1.0)
    with capture_logs() as events:
        other.sweep()
    assert [each["event"] for each in events] == ["a server has not renewed its lease"]
    assert not quiet.has_lease()


def test_reads_do_without_the_lock_unless_a_ttl_has_to_be_saved(
    memory: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = clock.steady()
    monkeypatch.setattr(clock, "steady", lambda: now)
    (one, _), (other, log) = server(memory), server(memory)
    do(one, InitializeSession("s", {"ttl_seconds": "100"}))
    begun: list[str] = []
    group = log.group
    monkeypatch.setattr(log, "group", lambda **options: (begun.append("group"), group(**options))[1])
    monkeypatch.setattr(log, "reading", lambda: (begun.append("reading"), group())[1])
    do(other, ReadState("s"))
    now += timedelta(seconds=50)
    do(other, ReadState("s"))
    do(other, ReadState("s"), RegisterVariable("s", "n", "integer", Value("0")))
    assert begun == ["reading", "reading", "group", "group"]
    now += timedelta(seconds=60)
    do(one, ReadState("s"))


def test_a_session_that_others_have_used_does_not_expire(memory: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock.steady()
    monkeypatch.setattr(clock, "steady", lambda: now)
    (one, _), (other, _) = server(memory), server(memory)
    do(one, InitializeSession("s", {"ttl_seconds": "100"}))
    do(other, ReadState("s"))
    for _ in range(4):
        now += timedelta(seconds=60)
        do(one, ReadState("s"))
    assert other.sweep() == 0
    do(other, ReadState("s"))
    now += timedelta(seconds=200)
    assert other.sweep() == 1
