"""Sessions that leave a server: to a file or another server, while its clients write, and with broken connections."""

import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import Context
from dspex_persist.audit import CommitQuery
from dspex_persist.cognitive import moves
from dspex_persist.state.abilities import Recordable
from dspex_persist.state.bridge.client.audits import BridgedHold
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.errors import (
    InternalError,
    InvalidArgumentError,
    OutcomeUnknownError,
    SessionHeldError,
    SessionMovedError,
    SessionNotFoundError,
    StateError,
    UnavailableError,
    UnsupportedError,
)
from dspex_persist.state.store import maintenance
from dspex_persist.testing.server import ServedDatabase
from tests.deadline import within


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDatabase]:
    with ServedDatabase(tmp_path_factory.mktemp("away") / "sessions.db") as served:
        yield served


@pytest.fixture(scope="module")
def revealing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDatabase]:
    with ServedDatabase(tmp_path_factory.mktemp("away") / "open.db", {"audit_reveal": True}) as served:
        yield served


@pytest.fixture
def url(served: ServedDatabase) -> str:
    return f"grpc://{served.target}"


@pytest.fixture
def there(served: ServedDatabase) -> Iterator[BridgedState]:
    with BridgedState(served.target, timeout_s=within(30)) as there:
        yield there


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """The id of a session, another one for each test."""
    return f"session-{request.node.name}"


@pytest.fixture
def ctx(url: str, name: str) -> Iterator[Context]:
    with Context(name, url, timeout_s=within(30)) as ctx:
        ctx.define("x", 1, constraints={"min": 0})
        ctx.set("x", 2, idempotency_key="once", reason="to see", actor="bob")
        yield ctx


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "here.db"


def content_hash(ctx: Context) -> str:
    return Recordable.of(ctx.backend.provider).content_hash(ctx.session_id)


def test_to_a_file(ctx: Context, there: BridgedState, name: str, path: Path, url: str) -> None:
    before = content_hash(ctx)
    ctx.move_to(path)
    assert (ctx.backend.kind, ctx.backend.url) == ("embedded", str(path))
    assert content_hash(ctx) == before
    (switch,) = ctx.backend.switches
    assert (switch.source, switch.variables, switch.versions) == (f"bridged {url}", 1, 2)
    # Everything has come along.
    assert ctx.set("x", 2, idempotency_key="once") == 1
    assert [(entry.value, entry.actor, entry.reason) for entry in ctx.history("x", 1)] == [(2, "bob", "to see")]
    with pytest.raises(StateError, match="min"):
        ctx.set("x", -1)
    # There it has ended, and says why and by whom.
    assert not there.heartbeat(name)
    with there.audit() as audit:
        (last,) = audit.page(CommitQuery(session=name, newest_first=True), most=1).rows
    assert last.cause == "EndMovedSession"
    assert last.actor == ctx.history("x")[1].actor
    ctx.move_to(path)
    assert len(ctx.backend.switches) == 1
    ctx.close()
    assert maintenance.check(path).problems == ()


def test_to_another_server_and_back(ctx: Context, url: str, revealing: ServedDatabase) -> None:
    other = f"grpc://{revealing.target}"
    for place, value in ((other, 3), (url, 4), (url, 5)):
        before = content_hash(ctx)
        ctx.move_to(place)
        assert content_hash(ctx) == before
        ctx["x"] = value
    assert [switch.target for switch in ctx.backend.switches] == [f"bridged {other}", f"bridged {url}"]
    assert [entry.value for entry in ctx.history("x")] == [5, 4, 3, 2, 1]


def test_from_a_file_to_another_one_and_from_memory(path: Path) -> None:
    with Context("s") as ctx:
        ctx.define("x", 1)
        ctx.move_to(path)
        ctx.move_to(path.with_name("other.db"))
        ctx.move_to(str(path.with_name("other.db")))
        assert ctx.backend.url == str(path.with_name("other.db"))
        assert (len(ctx.backend.switches), ctx["x"]) == (2, 1)
        for wrong in ("memory:", "local"):
            with pytest.raises(InvalidArgumentError, match="is not a file"):
                ctx.move_to(wrong)


def test_nothing_is_lost_while_clients_write(ctx: Context, url: str, name: str, path: Path) -> None:
    """Those of the context go on, and the others learn where it is."""
    moved = threading.Event()
    acknowledged: list[tuple[int, int]] = []
    raised: list[BaseException] = []

    def write(other: Context, number: int) -> None:
        try:
            for count in range(number, number + 1_000_000):
                acknowledged.append((other.set("x", count), count))
                if moved.is_set():
                    return
        except (SessionMovedError, SessionNotFoundError) as error:
            raised.append(error)

    with Context(name, url) as first, Context(name, url) as second:
        writers = [
            threading.Thread(target=write, args=(each, 1_000_000 * number))
            for number, each in enumerate((ctx, ctx, first, second), 1)
        ]
        for writer in writers:
            writer.start()
        try:
            ctx.move_to(path)
        finally:
            moved.set()
            for writer in writers:
                writer.join(within(60))
    assert len(raised) == 2
    versions = dict(acknowledged)
    assert len(versions) == len(acknowledged)
    history, before = {}, None
    while page := ctx.history("x", 1000, before=before):
        history |= {entry.version: entry.value for entry in page}
        before = page[-1].version
    assert history == {0: 1, 1: 2} | versions


def test_watches_go_on(ctx: Context, path: Path) -> None:
    with ctx.watch("x", include_initial=False) as changes:
        ctx["x"] = 3
        ctx.move_to(path)
        ctx["x"] = 4
        assert [(change.value, change.old) for change in islice(changes, 2)] == [(3, 2), (4, 3)]


def test_tools_of_clients_are_waited_for(
    ctx: Context, url: str, name: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "TIMEOUT_S", 0.05)
    with Context(name, url) as other:
        with other.transaction() as transaction:
            transaction["x"] = 3
            with pytest.raises(UnavailableError, match="still running"):
                ctx.move_to(path)
            assert not path.exists()
        ctx.move_to(path)
    assert ctx["x"] == 3


def test_sensitive_values_leave_only_a_server_that_reveals_them(
    ctx: Context, revealing: ServedDatabase, path: Path
) -> None:
    ctx.define("secret", "hush", metadata={"sensitive": "true"})
    with pytest.raises(UnsupportedError, match="start the server with --audit-reveal"):
        ctx.move_to(path)
    assert not path.exists()
    ctx["x"] = 3
    with Context("s", f"grpc://{revealing.target}") as other:
        other.define("secret", "hush", metadata={"sensitive": "true"})
        other.move_to(path)
        assert other["secret"] == "hush"


def test_one_that_becomes_sensitive_while_it_is_copied(
    ctx: Context, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = BridgedState.hold_session

    def mark(state: BridgedState, session_id: str, **options: Any) -> BridgedHold:
        state.set_variable(session_id, "x", 5, metadata={"sensitive": "true"})
        return hold(state, session_id, **options)

    monkeypatch.setattr(BridgedState, "hold_session", mark)
    with pytest.raises(UnsupportedError, match="--audit-reveal"):
        ctx.move_to(path)
    assert not path.exists()
    assert ctx["x"] == 5


# Failures


def test_one_who_holds_it_already(ctx: Context, there: BridgedState, name: str, path: Path) -> None:
    with there.hold_session(name), pytest.raises(SessionHeldError):
        ctx.move_to(path)
    assert not path.exists()
    ctx["x"] = 3


@pytest.mark.parametrize("fault", ["sent", "not sent", "refused"])
def test_a_connection_that_breaks_while_the_session_ends(
    ctx: Context, there: BridgedState, name: str, path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The server tells whether it has ended, and it is in one place only."""
    answer = BridgedHold._answer

    def break_off(hold: BridgedHold, patience_s: float) -> Any:
        monkeypatch.setattr(BridgedHold, "_answer", answer)
        if fault == "sent":
            answer(hold, patience_s)
        hold._call.cancel()
        raise UnavailableError("the network is gone")

    def move(hold: BridgedHold, moved_to: str) -> None:
        if fault == "not sent":
            hold._call.cancel()
        elif fault == "refused":
            raise UnavailableError("the disk is full")
        else:
            monkeypatch.setattr(BridgedHold, "_answer", break_off)
        plain(hold, moved_to)

    plain = BridgedHold.move
    monkeypatch.setattr(BridgedHold, "move", move)
    if fault == "sent":
        ctx.move_to(path)
        assert (ctx.backend.kind, ctx["x"]) == ("embedded", 2)
        assert not there.heartbeat(name)
        return
    with pytest.raises(StateError):
        ctx.move_to(path)
    monkeypatch.undo()
    assert (ctx.backend.kind, ctx.backend.switches) == ("bridged", ())
    assert not path.exists()
    assert there.set_variable(name, "x", 3) == 2
    ctx.move_to(path)
    assert ctx["x"] == 3


def test_a_server_that_dies_before_it_answers(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows whether the session has ended there, so it is kept here, where it is complete."""
    move = BridgedHold.move
    with (
        ServedDatabase(tmp_path / "sessions.db") as served,
        Context("s", f"grpc://{served.target}", timeout_s=2) as ctx,
    ):
        ctx.define("x", 1)

        def kill(hold: BridgedHold, moved_to: str) -> None:
            served.process.kill()
            # Sent, and never answered.
            monkeypatch.setattr(BridgedHold, "_answer", lambda *_: (_ for _ in ()).throw(UnavailableError("gone")))
            move(hold, moved_to)

        monkeypatch.setattr(BridgedHold, "move", kill)
        with pytest.raises((OutcomeUnknownError, UnavailableError)):
            ctx.move_to(path)
        monkeypatch.undo()
        assert (ctx.backend.kind, ctx["x"]) == ("embedded", 1)
        ctx["x"] = 2


def test_a_copy_that_differs(ctx: Context, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recordable, "content_hash", lambda *_, **__: "0")
    with pytest.raises(InternalError, match="has not what was sent"):
        ctx.move_to(path)
    monkeypatch.undo()
    assert not path.exists()
    ctx["x"] = 3


def test_a_client_that_disappears_while_it_holds(there: BridgedState, url: str, name: str) -> None:
    there.initialize_session(name)
    there.register_variable(name, "x", "integer", 0)
    other = BridgedState(url)
    hold = other.hold_session(name)
    pending = threading.Thread(target=there.set_variable, args=(name, "x", 1))
    pending.start()
    other.close()
    pending.join(within(30))
    assert there.get_value(name, "x") == 1
    with pytest.raises(StateError):
        hold.move("nowhere")
    hold.close()
    assert there.heartbeat(name)


def test_a_server_that_shuts_down_ends_holds(tmp_path: Path) -> None:
    with ServedDatabase(tmp_path / "sessions.db") as served, BridgedState(served.target) as state:
        state.initialize_session("s")
        hold = state.hold_session("s")
        served.process.terminate(within(30))
        with pytest.raises(StateError):
            hold.move("nowhere")
