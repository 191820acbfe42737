"""What a server does when its connections to a shared log break, when the log goes away, and when it is an older copy.

Each of these proofs on PostgreSQL has to find a bug that is planted at the end; those of Valkey are in `tests/valkey`.
"""

import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final, NamedTuple

import psycopg
import pytest

from dspex_persist.state import writer
from dspex_persist.state.errors import (
    LostCommitsError,
    OutcomeUnknownError,
    StateError,
    StorageError,
    UnavailableError,
)
from dspex_persist.state.log_store import News
from dspex_persist.state.shared import SharedState, shared_groups
from dspex_persist.state.store.log import LogWriter
from dspex_persist.state.store.postgres import heads, notices, servers, writing
from dspex_persist.state.store.postgres.postgres_log import PostgresLog
from dspex_persist.state.valkey import valkey_log
from tests.deadline import within
from tests.engines import Postgres, Server, Valkey, wait_until
from tests.faults.cutting import Cut, CuttingProxy
from tests.faults.places import Place, PostgresPlace, ValkeyPlace

SESSION: Final = "session"


class Scene(NamedTuple):
    """Two servers on one log; the connections of the first one can be cut."""

    place: Place
    proxy: CuttingProxy
    behind: SharedState
    other: SharedState
    fatal: list[BaseException]
    """Why the first one has ended."""

    def write(self, value: int = 1, **given: Any) -> int:
        return self.behind.set_variable(SESSION, "x", value, **given)

    def versions(self) -> list[int]:
        return versions_of(self.other)


def versions_of(state: SharedState) -> list[int]:
    return sorted(each.version for each in state.get_variable_history(SESSION, "x", 10_000))


class Optimistic(Postgres):
    """A PostgreSQL server, on which no group looks at the head before its end unless it is repeated."""


@pytest.fixture(scope="module", params=[pytest.param(Postgres, marks=pytest.mark.thorough), Optimistic, Valkey])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    server: Server = request.param.own()
    yield server
    server.end()


def place_on(server: Server) -> Place:
    if isinstance(server, Postgres):
        return PostgresPlace(server)
    assert isinstance(server, Valkey)
    return ValkeyPlace(server)


def scene_on(server: Server) -> Iterator[Scene]:
    place, fatal = place_on(server), list[BaseException]()
    with (
        CuttingProxy(place.socket) as proxy,
        place.open(proxy.socket, on_fatal=fatal.append, settle_s=1.0) as behind,
        place.open() as other,
    ):
        behind.initialize_session(SESSION)
        behind.register_variable(SESSION, "x", "integer", 0)
        yield Scene(place, proxy, behind, other, fatal)
    place.remove()


@pytest.fixture
def scene(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    if isinstance(server, Optimistic):
        monkeypatch.setattr(shared_groups, "QUIET", 0)
    monkeypatch.setattr(valkey_log, "SETTLE_S", 1.0)
    yield from scene_on(server)


# ---- connections ----


def test_commit_that_did_not_arrive(scene: Scene) -> None:
    scene.proxy.cut(Cut.BEFORE)
    with pytest.raises(StorageError):
        scene.write()
    assert scene.versions() == [0]
    assert scene.write() == 1
    assert scene.versions() == [0, 1]


def test_answer_lost(scene: Scene) -> None:
    scene.proxy.cut(Cut.AFTER)
    assert scene.write() == 1
    assert scene.proxy.cuts_made.acquire(blocking=False)
    assert scene.versions() == [0, 1]
    assert versions_of(scene.behind) == [0, 1]


def settles_what_arrives_late(scene: Scene) -> None:
    """A server looks whether its commit is stored while that is on its way: what it answers has to stay true."""
    scene.proxy.cut(Cut.LATE)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(scene.write)
        assert scene.proxy.cuts_made.acquire(timeout=within(10))
        # If it does not wait for the commit, it answers before that arrives.
        with suppress(TimeoutError):
            writing.exception(within(0.15))
        scene.proxy.deliver()
        error = writing.exception()
    assert error is None or isinstance(error, StorageError)
    wait_until(lambda: _writes(scene.other, "y"))
    assert scene.versions() == ([0, 1] if error is None else [0])
    assert versions_of(scene.behind) == scene.versions()


def _writes(state: SharedState, name: str) -> bool:
    try:
        state.register_variable(SESSION, name, "integer", 0)
    except (StorageError, UnavailableError):
        return False
    return True


def test_commit_that_arrives_late(scene: Scene) -> None:
    settles_what_arrives_late(scene)


def test_log_goes_away_in_the_middle(scene: Scene) -> None:
    """Nobody can say whether the write was stored: its key says it once the log is there again."""
    scene.proxy.cut(Cut.AFTER, goes_away=True)
    with pytest.raises(OutcomeUnknownError):
        scene.write(idempotency_key="key")
    with pytest.raises(UnavailableError):
        scene.behind.get_variable(SESSION, "x")
    with pytest.raises((UnavailableError, StorageError)):
        scene.write(2)
    scene.proxy.bring_back()
    assert scene.write(idempotency_key="key") == 1
    assert scene.versions() == [0, 1]


@pytest.mark.parametrize("first", ["read", "write"])
def test_all_connections_break(scene: Scene, first: str) -> None:
    """Nothing was under way, so nobody notices."""
    scene.proxy.cut_all()
    written = scene.other.set_variable(SESSION, "x", 2)
    if first == "read":
        assert scene.behind.get_variable(SESSION, "x").version == written
    assert scene.write() == written + 1
    assert versions_of(scene.behind) == scene.versions()


@pytest.mark.parametrize("server", [Optimistic], indirect=True)
def test_connection_breaks_while_a_group_writes(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = LogWriter.flush

    def cut_and_flush(self: LogWriter) -> None:
        scene.proxy.cut_all()
        flush(self)

    with monkeypatch.context() as patch:
        patch.setattr(LogWriter, "flush", cut_and_flush)
        with pytest.raises(StorageError):
            scene.write()
    assert scene.write() == 1
    assert scene.versions() == [0, 1]


@pytest.mark.crash
def test_an_engine_is_in_trouble_until_the_log_is_back(scene: Scene) -> None:
    with scene.place.open(lease_s=0.4) as state:
        scene.place.server.take_away(signal.SIGKILL)
        wait_until(lambda: state.trouble() != "")
        assert re.match(r"the database could not be used for \d+ s: .", state.trouble())
        scene.place.server.bring_back()
        wait_until(lambda: state.trouble() == "")
        assert state.set_variable(SESSION, "x", 1) == 1


@pytest.mark.crash
def test_log_is_killed_under_load(scene: Scene) -> None:
    acknowledged = list[int]()
    ended, progress = threading.Event(), threading.Semaphore(0)

    def write(state: SharedState) -> None:
        while not ended.is_set():
            try:
                acknowledged.append(state.set_variable(SESSION, "x", 7))
                progress.release()
            except (StorageError, UnavailableError, OutcomeUnknownError):
                ended.wait(0.01)

    # Valkey has no end between an orderly one and SIGKILL.
    first = signal.SIGQUIT if isinstance(scene.place.server, Postgres) else signal.SIGKILL
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, state) for state in (scene.behind, scene.other) * 2]
        try:
            for number in (first, signal.SIGKILL, None):
                for _ in range(20):
                    assert progress.acquire(timeout=within(20))
                if number is not None:
                    scene.place.server.restart(number)
        finally:
            ended.set()
        for each in writers:
            each.result()
    there = scene.versions()
    assert len(acknowledged) == len(set(acknowledged))
    assert {*acknowledged} <= {*there}
    assert there == list(range(len(there)))


# ---- several servers ----


def takes_turns(scene: Scene) -> None:
    """No write fails because another server writes at the same time."""

    def write(state: SharedState) -> None:
        for _ in range(25):
            state.set_variable(SESSION, "x", 1)

    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(write, state) for state in (scene.behind, scene.other) * 2]:
            error = each.exception()
            assert error is None, error
    assert scene.versions() == list(range(101))


def test_servers_take_turns(scene: Scene) -> None:
    takes_turns(scene)


def watches_without_notices(scene: Scene) -> None:
    with scene.other.watch(SESSION, ["x"]) as watch:
        scene.write()
        deadline, updates = time.monotonic() + within(3), list[Any]()
        while not updates and time.monotonic() < deadline:
            updates = watch.next(0.2)
        assert [each.version.version for each in updates] == [1]


def test_watch_without_notices(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(scene.behind._shared.log), "tell", lambda _: None)
    watches_without_notices(scene)


def watches_a_slow_commit(scene: Scene) -> None:
    """A watch gets what one server was slow to commit while another one wrote."""
    scene.other.register_variable(SESSION, "y", "integer", 0)
    log = scene.behind._shared.log
    assert isinstance(log, PostgresLog)
    commit, begun, there = log._writing._commit, threading.Event(), threading.Event()

    def commit_late(end: str) -> None:
        begun.set()
        # With the lock, the other one has to wait for it.
        there.wait(0.5)
        commit(end)

    with scene.other.watch(SESSION, ["x", "y"]) as watch, ThreadPoolExecutor(2) as pool:
        vars(log._writing)["_commit"] = commit_late
        slow = pool.submit(scene.write)
        assert begun.wait(within(10))
        seen = list[tuple[str, int]]()

        def see(name: str, version: int) -> None:
            deadline = time.monotonic() + within(10)
            while (name, version) not in seen and time.monotonic() < deadline:
                seen.extend((each.variable.name, each.variable.version) for each in watch.next(1.0))

        fast = pool.submit(scene.other.set_variable, SESSION, "y", 1)
        see("y", 1)
        there.set()
        assert (slow.exception(), fast.exception()) == (None, None)
        scene.other.set_variable(SESSION, "y", 2)
        see("y", 2)
    assert sorted(seen) == [("x", 1), ("y", 1), ("y", 2)]


@pytest.mark.parametrize("server", [Postgres, Optimistic], indirect=True)
def test_watch_of_a_slow_commit(scene: Scene) -> None:
    watches_a_slow_commit(scene)


# ---- older copies ----


def notices_an_older_copy(scene: Scene) -> None:
    """The log is put back to what it was, under servers that run."""
    server, copy = scene.place.server, scene.place.server.directory.with_suffix(".copy")
    data = server.directory / ("data" if isinstance(server, Postgres) else "appendonlydir")
    server.take_away(signal.SIGINT)
    try:
        shutil.copytree(data, copy, symlinks=True)
        server.bring_back()
        wait_until(lambda: _writes(scene.behind, "y"))
        assert scene.write() == 1
        server.take_away(signal.SIGINT)
        shutil.rmtree(data)
        shutil.copytree(copy, data, symlinks=True)
        for each in (data, *data.rglob("*")):
            shutil.chown(each, *_owner(server))
        server.bring_back()
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    assert _end_of(scene) is LostCommitsError
    with pytest.raises(StateError):
        scene.write()


def _owner(server: Server) -> tuple[int, int]:
    facts = server.directory.stat()
    return facts.st_uid, facts.st_gid


def _end_of(scene: Scene) -> type[BaseException] | None:
    """Write until the server has ended, and return why; None if it goes on."""
    deadline = time.monotonic() + within(10)
    while not scene.fatal and time.monotonic() < deadline:
        try:
            scene.write(3)
        except StateError:
            time.sleep(0.02)
        else:
            return None
    return type(scene.fatal[0]) if scene.fatal else None


@pytest.mark.crash
def test_older_copy_under_a_server(scene: Scene) -> None:
    notices_an_older_copy(scene)


# ---- planted bugs ----


def _settle_without_the_lock(patch: pytest.MonkeyPatch, _: Scene) -> None:
    patch.setattr(writing.Writing, "_look_up", lambda self, head: heads.has_commit(self.connect(), head))


def _select_head() -> str:
    """What connections prepare for their server, for those of any server: they have its id in their names."""
    select = heads.SELECT_HEAD.replace(
        "server_id = '{server}'", "'dspex-persist:' || left(server_id, 12) = current_setting('application_name')"
    )
    assert select != heads.SELECT_HEAD
    return select


def _lock_and_head_at_once(patch: pytest.MonkeyPatch, _: Scene) -> None:
    """The head is then read as it was before the wait for the lock."""
    lock = f"pg_advisory_xact_lock({heads.LOCKS}, 'head'::regclass::oid::int)"
    at_once = _select_head().replace(" FROM head\n", f", {lock} FROM head\n")
    assert lock in at_once
    patch.setattr(heads, "BEGIN", f"BEGIN; SELECT true; {at_once}")
    row_of = heads.KnownHead.row_of
    patch.setattr(heads.KnownHead, "row_of", lambda self, found: row_of(self, found[: len(heads.HeadRow._fields)]))


def _order_by_a_sequence(patch: pytest.MonkeyPatch, scene: Scene) -> None:
    """Each group takes its numbers from a sequence of the database, and no lock: later ones may be there before it."""
    with psycopg.connect(scene.place.url(), autocommit=True) as connection:
        connection.execute("CREATE SEQUENCE planted START 100 INCREMENT 100")
    select = _select_head()
    numbered = select.replace("database_id, sequence,", "database_id, nextval('planted'),")
    assert numbered != select
    patch.setattr(heads, "BEGIN", f"BEGIN; SELECT true; {numbered}")
    patch.setattr(heads, "TRY_TO_BEGIN", heads.BEGIN)
    patch.setattr(heads.KnownHead, "learn", _learn_the_number)


def _learn_the_number(known: heads.KnownHead, _: object, row: heads.HeadRow) -> News | None:
    before = known.head.sequence
    if row.sequence <= before:
        return None
    known.take(row)
    return News(before, row.sequence, known.last_at, None)


def _notices_alone(patch: pytest.MonkeyPatch, _: Scene) -> None:
    patch.setattr(notices.Notices, "tell", lambda _: None)
    patch.setattr(writer, "_CHECK_S", 3600.0)


def _never_compared(patch: pytest.MonkeyPatch, _: Scene) -> None:
    """As if the anchor were only looked at when a server starts."""
    patch.setattr(heads.KnownHead, "learn", lambda self, _, row: self.take(row))


def _settle_for_now(patch: pytest.MonkeyPatch, _: Scene) -> None:
    patch.setattr(servers.Lease, "move_on", lambda *_: None)


def _never_look(patch: pytest.MonkeyPatch, _: Scene) -> None:
    patch.setattr(heads.KnownHead, "begin_here", lambda *_, **__: "BEGIN; EXECUTE dspex_lock")


@pytest.mark.parametrize(
    ("server", "plant", "proof", "says"),
    [
        (Postgres, _settle_without_the_lock, settles_what_arrives_late, "[0, 1] == [0]"),
        (Postgres, _lock_and_head_at_once, takes_turns, "duplicate key"),
        (Postgres, _order_by_a_sequence, watches_a_slow_commit, "[('y', 1), ('y', 2)] == [('x', 1)"),
        (Optimistic, _settle_for_now, settles_what_arrives_late, "[0, 1] == [0]"),
        (Optimistic, _never_look, takes_turns, "duplicate key"),
        pytest.param(Postgres, _notices_alone, watches_without_notices, "[] == [1]", marks=pytest.mark.thorough),
        pytest.param(
            Postgres,
            _never_compared,
            notices_an_older_copy,
            "None is LostCommitsError",
            marks=(pytest.mark.thorough, pytest.mark.crash),
        ),
    ],
    indirect=["server"],
)
def test_finds(
    plant: Callable[[pytest.MonkeyPatch, Scene], None],
    proof: Callable[[Scene], None],
    says: str,
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch, scene)
    with pytest.raises(AssertionError, match=re.escape(says)):
        proof(scene)
