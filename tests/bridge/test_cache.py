"""The cache of a client: alone, with a clock and a stream of the test's own; then on a real server."""

import asyncio
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest

from dspex_persist import tool
from dspex_persist.cognitive.tool_context import ToolContext
from dspex_persist.state import commands as c
from dspex_persist.state.bridge import codec
from dspex_persist.state.bridge.client import cache as caches
from dspex_persist.state.bridge.client.cache import ValueCache
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.errors import InvalidArgumentError, StateError, UnavailableError
from dspex_persist.state.frozen import FrozenDict
from dspex_persist.state.model import (
    ChangeKind,
    Optimization,
    Source,
    Update,
    UpdateKind,
    Value,
    Variable,
    VariablesFound,
    VariableVersion,
)
from dspex_persist.testing.checks import let_pass
from dspex_persist.testing.server import ServedDatabase
from tests.concurrency.clients import INITIAL, NAME, SESSION, EmbeddedRegister, record
from tests.concurrency.linearizability import check
from tests.deadline import within

AT = datetime(2026, 3, 1, tzinfo=UTC)
LOCK = Optimization("", "mipro", AT)


def variable(version: int, name: str = "x", token: str = "1", lock: Optimization | None = None) -> Variable:
    value = Value(str(version))
    return Variable(f"var_{name}_{token}", name, "integer", value, version, "", FrozenDict(), Source.PYTHON, AT, lock)


def update(changed: Variable, kind: UpdateKind = UpdateKind.VALUE_CHANGE) -> Any:
    change = ChangeKind.DELETED if kind is UpdateKind.DELETED else ChangeKind.SET
    version = VariableVersion(
        changed.id, "integer", changed.version, change, changed.value, {}, Source.PYTHON, AT, "ada", "SetVariable", 7
    )
    return codec.update_message(Update(kind, changed, 7, AT, version))


class Broken(grpc.RpcError):
    """The end of a stream."""


class Stream:
    """A stream that the test feeds."""

    def __init__(self) -> None:
        self._messages: queue.Queue[Any] = queue.Queue()
        self.taken = threading.Semaphore(0)

    def initial_metadata(self) -> Any:
        return (("x-dspex-position", "6"), ("x-dspex-initial-values", "0"))

    def __iter__(self) -> Iterator[Any]:
        while (message := self._messages.get(timeout=within(20))) is not None:
            yield message
            self.taken.release()
        raise Broken

    def send(self, message: Any) -> None:
        """Send a message, and wait until the cache has taken it."""
        self._messages.put(message)
        assert self.taken.acquire(timeout=within(20))

    def cancel(self) -> None:
        self._messages.put(None)


class World:
    """A cache on streams of the test's own, with a clock that only the test moves."""

    def __init__(self, **options: Any) -> None:
        self.now = 100.0
        self.streams: list[Stream] = []
        options = {"max_bytes": 100_000, "max_age_s": 1.0, **options}
        self.cache = ValueCache(self.follow, now=lambda: self.now, **options)

    def follow(self, _session_id: str) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def live(self, session_id: str = "s") -> Stream:
        """Have the session followed."""
        until(lambda: self._is_live(session_id))
        return self.streams[-1]

    def _is_live(self, session_id: str) -> bool:
        self.read(session_id, "no such variable", None)
        session = self.cache._sessions.get(session_id)
        return session is not None and session.is_live

    def read(self, session_id: str, identifier: str, answer: Variable | None) -> None:
        """Read a variable on the server."""
        done = self.cache.sending(c.GetVariable(session_id, identifier))
        if done is not None:
            done(answer)

    def find(self, identifier: str = "x", session_id: str = "s") -> Variable | None:
        found: Variable | None = self.cache.find(c.GetVariable(session_id, identifier))
        return found


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.cache.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + within(20)
    while not condition():
        assert time.monotonic() < deadline
        let_pass(0.001)


def test_a_read_is_kept_while_the_session_is_followed(world: World) -> None:
    world.live()
    world.read("s", "x", variable(3))
    assert world.find() == world.find("var_x_1") == variable(3)
    assert world.cache.find(c.GetVariables("s", ["x"])) == VariablesFound({"x": variable(3)}, ())
    assert world.cache.hits == 3
    assert len(world.cache) == 1
    assert world.cache.find(c.GetVariables("s", ["x", "y"])) is None, "several are read as of one moment"
    assert world.cache.find(c.GetVariable("s", "x", bypass_cache=True)) is None
    assert world.find("y") is None
    assert world.find(session_id="other") is None


def test_it_is_never_older_than_the_bound_whatever_arrives(world: World) -> None:
    stream = world.live()
    done = world.cache.sending(c.GetVariable("s", "x"))
    assert done is not None
    world.now += 0.4
    done(variable(3))
    world.now += 0.5
    assert world.find() == variable(3)
    stream.send(update(variable(4)))
    assert world.find() == variable(4)
    world.now += 0.2
    assert world.find() is None, "1.1 s after the read was sent"
    assert len(world.cache) == 0


def test_changes_replace_or_drop_what_is_kept(world: World) -> None:
    stream = world.live()
    world.read("s", "x", variable(3))
    stream.send(update(variable(2)))
    assert world.find() == variable(3), "an update that was on its way already"
    stream.send(update(variable(4, lock=LOCK)))
    assert world.find() is None, "its lock may end at any moment"
    world.read("s", "x", variable(4))
    stream.send(update(variable(5), UpdateKind.DELETED))
    assert world.find() is None
    world.read("s", "x", variable(4))
    stream.send(update(variable(0, token="2")))
    assert world.find() is None, "another variable of this name"
    world.read("s", "var_x_2", variable(0, token="2"))
    assert world.find("var_x_2") is None, "by its id, it may be an earlier variable of its name"
    world.read("s", "x", variable(0, token="2"))
    assert world.find("var_x_2") is not None
    stream.send(update(variable(9), UpdateKind.DEPENDENCY_CHANGED))
    assert world.find() == variable(0, token="2")


def test_a_locked_variable_is_not_kept(world: World) -> None:
    world.live()
    world.read("s", "x", variable(3, lock=LOCK))
    assert world.find() is None


def test_an_answer_that_a_change_has_overtaken_is_not_kept(world: World) -> None:
    stream = world.live()
    for identifier, overtake in (
        ("x", lambda: stream.send(update(variable(4)))),
        ("x", lambda: world.cache.forget(c.SetVariable("s", "x", Value("4")))),
        ("x", lambda: world.cache.forget(c.SetVariable("s", "var_x_1", Value("4")))),
        ("x", lambda: world.read("s", "var_x_1", variable(4))),
        ("x", lambda: world.cache.forget(c.ExecuteTool("s", "t"))),
        ("x", lambda: world.cache.forget_session("s")),
    ):
        done = world.cache.sending(c.GetVariable("s", identifier))
        assert done is not None
        overtake()
        done(variable(3))
        assert world.find() is None
    world.read("s", "x", variable(4))
    assert world.find() == variable(4)


def test_no_read_goes_back_behind_what_the_client_has_seen(world: World) -> None:
    world.live()
    newer = variable(4)
    seen: list[Callable[[], object]] = [
        lambda: _answer(world, c.ListVariables("s"), (newer,)),
        lambda: _answer(world, c.GetVariables("s", ["x", "y"]), VariablesFound({"x": newer}, ("y",))),
        lambda: _answer(world, c.GetVariable("s", "x", bypass_cache=True), newer),
        lambda: _answer(world, c.GetVariableHistory("s", "x"), [_version(newer)]),
        lambda: _answer(world, c.ListVariables("s"), (variable(0, token="2"),)),
        lambda: world.cache.told("s", Update(UpdateKind.VALUE_CHANGE, newer, 7, AT, _version(newer))),
    ]
    for see in seen:
        world.cache.forget_session("s")
        world.read("s", "x", variable(3))
        assert world.find() == variable(3)
        see()
        assert world.find() in (None, newer)
    # Reads that overtake each other: the first to be answered fills the cache with the older version.
    world.cache.forget_session("s")
    calls = [world.cache.sending(c.GetVariable("s", identifier)) for identifier in ("x", "x", "var_x_1")]
    for done, version in zip(calls, (3, 5, 4), strict=True):
        assert done is not None
        done(variable(version))
        assert world.find() in (None, variable(3)) if version == 3 else world.find() in (None, variable(5))


def _answer(world: World, command: c.Command[Any], result: Any) -> None:
    done = world.cache.sending(command)
    assert done is not None
    done(result)


def _version(changed: Variable) -> VariableVersion:
    facts = (ChangeKind.SET, changed.value, {}, Source.PYTHON, AT, "ada", "SetVariable", 7)
    return VariableVersion(changed.id, "integer", changed.version, *facts)


def test_own_writes_drop_what_they_change(world: World) -> None:
    world.live()
    own: list[tuple[c.Command[Any], set[str]]] = [
        (c.SetVariable("s", "x", Value("1")), {"y", "z"}),
        (c.SetVariable("s", "var_x_1", Value("1")), {"y", "z"}),
        (c.RollbackVariable("s", "x", 0), {"y", "z"}),
        (c.DeleteVariable("s", "y"), {"x", "z"}),
        (c.SetVariables("s", {"x": Value("1"), "y": Value("1")}), {"z"}),
        (c.StartOptimization("s", "z", "mipro"), {"x", "y"}),
        (c.RegisterVariable("s", "x", "integer", Value("1")), {"y", "z"}),
        (c.ExecuteTool("s", "t"), set()),
        (c.CleanupSession("s"), set()),
        (c.SetVariable("other", "x", Value("1")), {"x", "y", "z"}),
    ]
    for command, left in own:
        for name in ("x", "y", "z"):
            world.read("s", name, variable(1, name))
        done = world.cache.sending(command)
        assert done is not None
        assert world.find() is not None, "until the server has answered"
        done(None)
        assert {name for name in ("x", "y", "z") if world.find(name) is not None} == left


def test_without_the_stream_it_is_empty_and_follows_again_after_a_pause(world: World) -> None:
    stream = world.live()
    world.read("s", "x", variable(3))
    stream.cancel()
    until(lambda: len(world.cache) == 0)
    assert world.find() is None
    until(lambda: "s" in world.cache._resume_at)
    world.read("s", "x", variable(3))
    assert len(world.streams) == 1
    world.now += 1.0
    world.live()
    assert len(world.streams) == 2
    world.read("s", "x", variable(5))
    assert world.find() == variable(5)


def test_it_stays_within_its_size(world: World) -> None:
    world.live()
    for number in range(1000):
        world.read("s", f"v{number}", variable(1, f"v{number}"))
        assert world.find("v0") is not None, "the one that is used"
    assert world.cache.size_bytes <= 100_000
    assert 50 < len(world.cache) < 70
    assert world.find("v1") is None
    world.read("s", "large", variable(1, "large")._replace(value=Value('"' + "x" * 200_000 + '"')))
    assert world.find("large") is None
    world.cache.forget_session("s")
    assert world.cache.size_bytes == len(world.cache) == 0


def test_it_follows_a_bounded_number_of_sessions(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "MOST_SESSIONS", 3)
    for number in range(5):
        world.live(f"s{number}")
        world.read(f"s{number}", "x", variable(1))
        world.now += 0.6
    assert [world.find(session_id=f"s{number}") is not None for number in range(5)] == [
        False,
        False,
        False,
        False,
        True,
    ]
    assert list(world.cache._sessions) == ["s2", "s3", "s4"]
    for name in ("s2", "s3", "s4"):
        world.read(name, "x", variable(1))
    world.read("s5", "x", variable(1))
    assert list(world.cache._sessions) == ["s2", "s3", "s4"], "all are in use"


def test_a_session_that_nobody_reads_is_left(world: World) -> None:
    stream = world.live()
    world.now += 61
    stream._messages.put(codec.heartbeat_message(7, AT))
    until(lambda: not world.cache._sessions)


# On a server


@tool
def add(ctx: ToolContext, name: str) -> None:
    """Add one."""
    ctx[name] += 1


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDatabase]:
    path = tmp_path_factory.mktemp("cache") / "sessions.db"
    with ServedDatabase(path, {"tools": "tests.bridge.test_cache"}, import_from=Path.cwd()) as served:
        yield served


@pytest.fixture
def other(served: ServedDatabase, request: pytest.FixtureRequest) -> Iterator[BridgedState]:
    """Another client, which has registered x in session `s`."""
    with BridgedState(served.target, timeout_s=within(20)) as other:
        other.initialize_session("s")
        other.register_variable("s", "x", "integer", 0)
        yield other
        other.cleanup_session("s")


def warmed(state: BridgedState, session: str = "s", name: str = "x") -> ValueCache:
    """Read until the cache answers."""
    cache = state.cache
    assert cache is not None
    hits = cache.hits

    def is_hit() -> bool:
        state.get_value(session, name)
        return cache.hits > hits

    until(is_hit)
    return cache


def test_hits_ask_the_server_nothing_and_changes_by_others_arrive(served: ServedDatabase, other: BridgedState) -> None:
    with BridgedState(served.target, timeout_s=within(20), cache=True, cache_age_s=within(600)) as state:
        cache = warmed(state)
        misses = cache.misses
        for _ in range(1000):
            assert state.get_value("s", "x") == 0
        assert cache.misses == misses
        assert cache.hit_rate > 0.9
        assert "1 variables" in repr(cache)
        for number in range(1, 20):
            other.set_variable("s", "x", number)
            until(lambda number=number: state.get_value("s", "x") == number)
        other.delete_variable("s", "x")
        until(lambda: not _exists(state))
        other.register_variable("s", "x", "string", "again")
        assert state.get_value("s", "x") == "again"


def _exists(state: BridgedState) -> bool:
    try:
        state.get_variable("s", "x")
    except StateError:
        return False
    return True


def test_own_changes_of_every_kind_are_seen_at_once(served: ServedDatabase, other: BridgedState) -> None:
    with BridgedState(served.target, timeout_s=within(20), cache=True, cache_age_s=within(600)) as state:
        warmed(state)
        for number in range(1, 30):
            state.set_variable("s", "x", number)
            assert state.get_value("s", "x") == number
        assert state.execute_tool("s", "add", {"name": "x"}).success
        assert state.get_value("s", "x") == 30
        assert list(state.stream_tool("s", "add", {"name": "x"})) == []
        assert state.get_value("s", "x") == 31
        warmed(state)
        with state.begin_transaction("s") as transaction:
            transaction.run(c.SetVariable("s", "x", Value("77")))
            assert transaction.run(c.GetVariable("s", "x")).value == Value("77")
            assert state.get_value("s", "x") == 31
            transaction.commit()
            assert state.get_value("s", "x") == 77
        warmed(state)
        for value in (31, 77):
            state.restore_session("s", f"{state.get_variable_history('s', 'x')[0].sequence}^")
            assert state.get_value("s", "x") == value
        warmed(state)
        state.start_optimization("s", "x", "mipro")
        assert state.get_variable("s", "x").optimization is not None
        state.stop_optimization("s", "x", force=True)
        assert state.get_variable("s", "x").optimization is None


def test_the_calls_of_an_execution_bypass_it(served: ServedDatabase, other: BridgedState) -> None:
    with (
        other.begin_transaction("s") as transaction,
        BridgedState(served.target, cache=True, execution_id=transaction.execution_id) as inside,
    ):
        for number in range(3):
            inside.set_variable("s", "x", number)
            assert inside.get_value("s", "x") == number
        assert inside.cache is not None
        assert (inside.cache.hits, inside.cache.misses) == (0, 0)


def test_a_server_that_hangs_is_noticed_within_the_bound(served: ServedDatabase, other: BridgedState) -> None:
    with BridgedState(served.target, timeout_s=0.3, cache=True, cache_age_s=0.5, breaker=None) as state:
        warmed(state)
        os.kill(served.process.pid, signal.SIGSTOP)
        try:
            stopped, began = time.monotonic(), list[float]()

            def read_on() -> None:
                while True:
                    began.append(time.monotonic())
                    state.get_value("s", "x")

            with pytest.raises(UnavailableError, match="did not answer"):
                read_on()
            # Later ones would have come from the server, which answers nothing.
            assert all(at - stopped < 0.5 for at in began[:-1])
            assert len(began) > 1
        finally:
            os.kill(served.process.pid, signal.SIGCONT)


def test_an_ended_session_is_not_shown(served: ServedDatabase, other: BridgedState) -> None:
    with BridgedState(served.target, timeout_s=within(20), cache=True, cache_age_s=within(600)) as state:
        warmed(state)
        other.cleanup_session("s")
        until(lambda: not _exists(state))
        other.initialize_session("s")
        assert not _exists(state)


def test_after_a_restart_it_fills_again(tmp_path: Path) -> None:
    with ServedDatabase(tmp_path / "sessions.db") as served, BridgedState(served.target, cache=True) as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 0)
        cache = warmed(state)
        served.kill()
        until(lambda: len(cache) == 0)
        served.restart()
        assert state.get_value("s", "x") == 0
        warmed(state)


def test_a_closed_client_answers_nothing(served: ServedDatabase, other: BridgedState) -> None:
    state = BridgedState(served.target, cache=True)
    cache = warmed(state)
    state.close()
    assert len(cache) == 0
    with pytest.raises(StateError, match="closed"):
        state.get_value("s", "x")


def test_wrong_settings() -> None:
    for wrong in ({"cache": 0}, {"cache": "much"}, {"cache": True, "cache_age_s": 0}):
        with pytest.raises(InvalidArgumentError):
            BridgedState("127.0.0.1:1", **wrong)
    with BridgedState("127.0.0.1:1") as state:
        assert state.cache is None


# Histories


@pytest.fixture
def register(served: ServedDatabase) -> Iterator[BridgedState]:
    with BridgedState(served.target, timeout_s=within(20), cache=True) as state:
        yield state
        state.cleanup_session(SESSION)


@pytest.mark.parametrize("seed", range(2))
def test_one_client_is_linearizable_also_with_a_cache(register: BridgedState, seed: int) -> None:
    shared, cache = EmbeddedRegister(register), register.cache
    assert cache is not None
    deadline = time.monotonic() + within(10)
    while not cache.hits:
        # Nothing is kept until the session is followed.
        assert time.monotonic() < deadline
        asyncio.run(shared.get())
    before = cache.hits
    history = asyncio.run(record(shared, clients=8, operations=100, seed=seed))
    assert [str(violation) for violation in check(history, INITIAL)] == []
    assert cache.hits > before


def test_what_others_write_is_seen_within_the_bound(served: ServedDatabase, register: BridgedState) -> None:
    """Readers with a cache beside writers without: no read is older than the bound, and none goes back in time."""
    EmbeddedRegister(register, "integer", "0")
    bound_s, ends_at = 0.2, time.monotonic() + 1.5
    # Reads wait for the server behind the writers, so the bound is about when they were sent.
    reading = BridgedState(served.target, timeout_s=within(20), cache=True, cache_age_s=bound_s)

    def write(number: int) -> list[tuple[float, int]]:
        random, written = Random(number), list[tuple[float, int]]()
        with BridgedState(served.target, timeout_s=within(20)) as writer:
            while time.monotonic() < ends_at:
                version = writer.set_variable(SESSION, NAME, number)
                written.append((time.monotonic(), version))
                let_pass(random.random() * 0.05)
        return written

    def read(_: int) -> list[tuple[float, int]]:
        seen = list[tuple[float, int]]()
        while time.monotonic() < ends_at:
            began = time.monotonic()
            seen.append((began, reading.get_variable(SESSION, NAME).version))
        return seen

    with reading, ThreadPoolExecutor(5) as pool:
        writers, readers = [pool.submit(write, number) for number in range(3)], [pool.submit(read, 0) for _ in range(2)]
        written = sorted(pair for future in writers for pair in future.result())
        histories = [future.result() for future in readers]
    assert reading.cache is not None
    assert reading.cache.hits > 10 * reading.cache.misses
    for seen in histories:
        versions = [version for _, version in seen]
        assert versions == sorted(versions)
        acknowledged = iter(written)
        newest, following = 0, next(acknowledged, None)
        for began, version in seen:
            while following is not None and following[0] < began - bound_s:
                newest, following = max(newest, following[1]), next(acknowledged, None)
            assert version >= newest
