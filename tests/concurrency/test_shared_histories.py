"""Histories of clients of several servers on one log, while servers stop and answers are lost; and planted bugs."""

import asyncio
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from datetime import datetime, timedelta
from random import Random
from typing import Any, Final

import pytest

from dspex_persist import clock
from dspex_persist.infra.futures import settled
from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.state import writer
from dspex_persist.state.commands import Command, GetVariable, InitializeSession, ReadState, SetVariable
from dspex_persist.state.errors import (
    OutcomeUnknownError,
    SessionNotFoundError,
    StateError,
    UnavailableError,
    VersionConflictError,
)
from dspex_persist.state.groups import Groups, Job
from dspex_persist.state.model import Origin, Value
from dspex_persist.state.shared import Barrier, SharedGroups, SharedState
from dspex_persist.testing.shared_memory_log import SharedMemory, SharedMemoryLog
from tests.concurrency.clients import INITIAL, NAME, SESSION
from tests.concurrency.linearizability import Operation, check
from tests.concurrency.shared_servers import Chaos, ChaoticLog, Fate, Servers
from tests.deadline import within

CLIENTS, OPERATIONS = 8, 40


# --- One variable, through all servers ---


def begin(servers: Servers) -> Servers:
    deadline = time.monotonic() + within(20)
    while True:
        # On a busy machine this server, too, may be taken for dead.
        with suppress(UnavailableError):
            servers.states[0].initialize_session(SESSION)
            servers.states[0].register_variable(SESSION, NAME, "string", json.loads(INITIAL))
            return servers
        assert time.monotonic() < deadline


def history_of(servers: Servers, seed: int = 1, *, operations: int = OPERATIONS) -> list[Operation]:
    """Return what clients saw whose calls go to any of the servers, in each of the ways in which one can call."""
    states = servers.states

    async def run() -> list[list[Operation]]:
        loop = LoopMailbox(asyncio.get_running_loop())
        on_loop = [each.on_loop(loop) for each in states]

        async def call(random: Random, command: Command[Any]) -> Any:
            place = random.randrange(len(states))
            way = random.randrange(3)
            if way == 0:
                return await on_loop[place](command)
            if way == 1:
                return await asyncio.wrap_future(states[place].submit(command))
            return await asyncio.to_thread(states[place].run, command)

        return await asyncio.gather(
            *(_client(call, number, operations, Random(f"{seed}/{number}")) for number in range(CLIENTS))
        )

    history = [each for part in asyncio.run(run()) for each in part]
    for log in servers.logs:
        log.fate = lambda: None
    last = states[-1].get_variable(SESSION, NAME)
    now = time.monotonic()
    return [*history, Operation(CLIENTS, "get", now, now, "ok", last.value.json, last.version)]


async def _client(call: Callable[..., Any], number: int, operations: int, random: Random) -> list[Operation]:
    history: list[Operation] = []
    seen = 0
    for count in range(operations):
        began = time.monotonic()
        if random.random() < 0.5:
            try:
                variable = await call(random, GetVariable(SESSION, NAME))
            except StateError:
                # The server was just taken for dead, say. It has seen nothing.
                continue
            seen = variable.version
            history.append(Operation(number, "get", began, time.monotonic(), "ok", variable.value.json, seen))
            continue
        value, expected = json.dumps(f"{number}-{count}"), random.choice([0, seen])
        status, version, ended = "ok", None, math.inf
        try:
            seen = version = await call(random, SetVariable(SESSION, NAME, Value(value), {}, expected or None))
            ended = time.monotonic()
        except OutcomeUnknownError:
            status = "unknown"
        except StateError as error:
            status, ended = "refused", time.monotonic()
            version = error.actual if isinstance(error, VersionConflictError) else None
        history.append(Operation(number, "set", began, ended, status, value, version, expected))  # type: ignore[arg-type]
    return history


def broken(history: list[Operation]) -> set[str]:
    return {violation.rule for violation in check(history, INITIAL)}


@pytest.mark.parametrize("optimistic", [False, True], ids=["locking", "optimistic"])
@pytest.mark.parametrize("count", [2, 3])
def test_servers_that_stop_and_lose_answers_are_linearizable(count: int, optimistic: bool) -> None:
    # A lease that is shorter than a stop: some are taken for dead.
    with Servers(count, optimistic=optimistic, lease_s=0.05, sweep_s=0.03) as servers:
        with Chaos(begin(servers), seed=count, losses=0.4) as chaos:
            history = history_of(servers)
        assert check(history, INITIAL) == []
    assert chaos.stops > 0
    assert set(chaos.lost) == set(Fate), "too little has happened"
    assert sum(each.status == "ok" and each.kind == "set" for each in history) > OPERATIONS


def without_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Barrier, "pass_through", lambda _: None)
    monkeypatch.setattr(Barrier, "ask", lambda _: settled(None))


def looked_up_before(monkeypatch: pytest.MonkeyPatch) -> None:
    run, submit = SharedState.run, SharedState.submit

    def run_early(self: SharedState, command: Command[Any], *arguments: Any, **who: Any) -> Any:
        state = None if command.writes else self.loaded(command.session_id)
        if state is None:
            return run(self, command, *arguments, **who)
        self._barrier.pass_through()
        return self._read(command, self.default_origin(command.cause), state)

    def submit_early(self: SharedState, command: Command[Any], origin: Origin | None = None) -> Future[Any]:
        state = None if command.writes else self.loaded(command.session_id)
        if state is None:
            return submit(self, command, origin)
        self._barrier.ask().result()
        return settled(self._read(command, self.default_origin(command.cause), state))

    monkeypatch.setattr(SharedState, "run", run_early)
    monkeypatch.setattr(SharedState, "submit", submit_early)


def late_comers_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that wait are served by a round trip, those too that came while it was under way."""

    def serve(self: Barrier, asked: "list[Future[None]]") -> None:
        head = self._head()
        # Others come in the meantime.
        time.sleep(0.002)
        with self._changed:
            asked, self._asked = [*asked, *self._asked], []
            self._waiting.append((head, asked))
        self._nudge()

    monkeypatch.setattr(Barrier, "_serve", serve)
    monkeypatch.setattr(Barrier, "pass_through", lambda self: self.ask().result())


def news_not_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedGroups, "learn", lambda self, news: self._advance(news.sequence))


def settled_without_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChaoticLog, "settles_safely", False)


BUGS: Final[dict[str, tuple[Callable[[pytest.MonkeyPatch], None], bool, set[str]]]] = {
    "reads without the barrier": (without_barrier, False, {"real-time order"}),
    "the state looked up before the barrier": (looked_up_before, False, {"real-time order"}),
    "a round trip that serves those who came during it": (late_comers_served, False, {"real-time order"}),
    "news that change nothing": (news_not_learnt, False, {"real-time order", "duplicate version"}),
    "settled without the fence": (settled_without_fence, True, {"dirty read", "lost version", "real-time order"}),
    "settled without the lock": (settled_without_fence, False, {"dirty read", "lost version", "real-time order"}),
}
"""Each with whether the log is optimistic, and the rules of which one has to be broken."""


@pytest.mark.parametrize("bug", BUGS)
def test_the_checker_finds(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, optimistic, rules = BUGS[bug]
    plant(monkeypatch)
    found: set[str] = set()
    for seed in range(5):
        with Servers(2, optimistic=optimistic, hints=False) as servers:
            begin(servers)
            if plant is settled_without_fence:
                random = Random(seed)
                for log in servers.logs:
                    log.fate = lambda random=random: Fate.LATE if random.random() < 0.1 else None  # type: ignore[misc]
            found = broken(history_of(servers, seed))
        if found & rules:
            return
    pytest.fail(f"not found: {bug}; only {found}")


# --- Sessions with a TTL ---

TTL_S: Final = 100.0


def ends_of_sessions(monkeypatch: pytest.MonkeyPatch, seed: int) -> set[str]:
    """Use a session with a TTL through servers at random; return what is wrong with when it ends.

    The clock is the test's, and there are no threads.
    """
    random, wrong = Random(seed), set[str]()
    now = begin = datetime(2030, 1, 1).astimezone()
    monkeypatch.setattr(clock, "steady", lambda: now)
    monkeypatch.setattr(clock, "now", lambda: now)
    memory = SharedMemory()
    servers = [SharedGroups(SharedMemoryLog(memory)) for _ in range(3)]
    for number in range(20):
        now = begin = begin + timedelta(days=1)
        session, used_at = f"s{number}", now
        servers[0].write_group([Job(InitializeSession(session, {"ttl_seconds": f"{TTL_S:g}"}), _ORIGIN)])
        for _ in range(40):
            now += timedelta(seconds=random.choice([0.1, 1, 30, 60, 99, 140]))
            passed_s = (now - used_at).total_seconds()
            server = random.choice(servers)
            if random.random() < 0.4:
                server.sweep()
                ended = session not in {state.session.id for state in memory.live()}
            else:
                (outcome,) = server.write_group([Job(ReadState(session), _ORIGIN)])
                ended = isinstance(outcome.error, SessionNotFoundError)
                used_at = used_at if ended else now
            if ended and passed_s < TTL_S:
                wrong.add("it ended early")
            if not ended and passed_s > TTL_S * 1.1 and used_at == now:
                wrong.add("it outlived its TTL")
            if ended:
                break
    return wrong


_ORIGIN: Final = Origin("test", "test")


@pytest.mark.parametrize("seed", range(3))
def test_sessions_end_when_no_server_has_used_them_for_their_ttl(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    assert ends_of_sessions(monkeypatch, seed) == set()


def test_a_ttl_of_memory_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedGroups, "load", Groups.load)
    assert set().union(*(ends_of_sessions(monkeypatch, seed) for seed in range(3))) == {"it ended early"}


# --- Watches ---


def missed_by_a_watch(servers: Servers, wait_s: float) -> bool:
    """Whether a watch at an idle server misses what another server writes."""
    one, other = begin(servers).states
    with other.watch(SESSION) as watch:
        one.set_variable(SESSION, NAME, "a")
        return not watch.next(wait_s)


@pytest.mark.parametrize("hints", [True, False])
def test_a_watch_needs_no_hints(hints: bool) -> None:
    with Servers(2, hints=hints) as servers:
        assert not missed_by_a_watch(servers, within(5))


def test_hints_without_a_poll_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_CHECK_S", 1e9)
    with Servers(2, hints=False) as servers:
        # More than twice as long as a poll takes.
        assert missed_by_a_watch(servers, 2.5)


def test_a_watch_gets_every_commit_once_and_in_order_whichever_server_made_it() -> None:
    with Servers(3, lease_s=0.05, sweep_s=0.03) as servers:
        begin(servers)
        with servers.states[2].watch(SESSION) as watch:
            with Chaos(servers, seed=7) as chaos:
                history_of(servers, operations=3 * OPERATIONS)
            last = servers.states[0].get_variable(SESSION, NAME).version
            versions: list[int] = []
            while not versions or versions[-1] < last:
                updates = watch.next(within(5))
                assert updates, "it has missed some"
                versions += [each.version.version for each in updates if each.version is not None]
        assert versions == list(range(1, last + 1))
        assert chaos.stops > 0
