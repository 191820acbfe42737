"""Sessions that move to a real server, and one program that prints the same on every backend."""

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dspex_persist import Context, tool
from dspex_persist.audit import ExecutionQuery
from dspex_persist.cognitive import moves
from dspex_persist.cognitive.tool_context import ToolContext
from dspex_persist.state.abilities import Recordable
from dspex_persist.state.bridge.client.audits import BridgedImport
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.errors import (
    InternalError,
    OutcomeUnknownError,
    SessionExistsError,
    StateError,
    ToolArgumentError,
    ToolFailedError,
    UnavailableError,
    UnsupportedError,
    VariableLockedError,
)
from dspex_persist.testing.server import ServedDatabase
from tests.deadline import within


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDatabase]:
    """A server that reveals nothing: a move needs no permission to audit."""
    with ServedDatabase(tmp_path_factory.mktemp("moves") / "sessions.db", {"metadata_entries": 3}) as served:
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


@pytest.fixture(params=["local", "file"])
def ctx(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> Iterator[Context]:
    """A context in memory, and one on a file."""
    with Context(name, "local" if request.param == "local" else tmp_path / "here.db") as ctx:
        ctx.define("x", 1, constraints={"min": 0})
        ctx.define("secret", "hush", metadata={"sensitive": "true"})
        ctx.set("x", 2, idempotency_key="once")
        ctx.backend.provider.start_optimization(name, "secret", "optimizer")
        yield ctx


def test_a_session_moves_to_a_server(ctx: Context, url: str, there: BridgedState, name: str) -> None:
    source = ctx.backend.provider
    before = Recordable.of(source).content_hash(name)
    # A server does not tell the ids of locks.
    variables = [each._replace(optimization=None) for each in source.list_variables(name)]
    ctx.ensure_bridged(url)
    assert (ctx.backend.kind, ctx.backend.url) == ("bridged", url)
    assert there.content_hash(name) == before
    assert [each._replace(optimization=None) for each in there.list_variables(name)] == variables
    assert [each.version for each in ctx.history("x")] == [1, 0]
    assert ctx.set("x", 2, idempotency_key="once") == 1
    assert ctx.set("x", 3) == 2
    with pytest.raises(VariableLockedError):
        ctx.set("secret", "no")
    assert there.get_value(name, "x") == 3
    ctx.ensure_bridged(url)
    ctx.ensure_persistent("no.db")
    assert len(ctx.backend.switches) == 1
    with pytest.raises(UnsupportedError, match="to another server"):
        ctx.ensure_bridged("grpc://127.0.0.1:1")


def test_from_memory_to_a_file_to_a_server(tmp_path: Path, url: str, name: str) -> None:
    with Context(name) as ctx:
        ctx.define("x", 0)
        for number, move in enumerate(
            (lambda: None, lambda: ctx.ensure_persistent(tmp_path / "x.db"), lambda: ctx.ensure_bridged(url))
        ):
            move()
            ctx["x"] = number
        assert [each.value for each in ctx.history("x")] == [2, 1, 0, 0]
        assert [switch.target.split()[0] for switch in ctx.backend.switches] == ["embedded", "bridged"]


def test_nothing_is_lost_while_others_write(ctx: Context, url: str) -> None:
    ctx.define("count", 0)
    moved, done = threading.Event(), [0, 0, 0]

    def write(place: int) -> None:
        while not moved.is_set() or done[place] < 20:
            ctx.update("count", lambda value: value + 1, retries=10_000)
            done[place] += 1

    writers = [threading.Thread(target=write, args=(place,)) for place in range(3)]
    for writer in writers:
        writer.start()
    try:
        ctx.ensure_bridged(url)
    finally:
        moved.set()
        for writer in writers:
            writer.join(within(60))
    assert ctx["count"] == sum(done)
    assert ctx.info("count").version == sum(done)


def test_what_cannot_move(ctx: Context, url: str, there: BridgedState, name: str) -> None:
    there.initialize_session(name)
    with pytest.raises(SessionExistsError):
        ctx.ensure_bridged(url)
    assert there.list_variables(name) == ()
    there.cleanup_session(name)
    ctx.define("much", 0, metadata={str(number): "" for number in range(4)})
    with pytest.raises(StateError, match="metadata_entries"):
        ctx.ensure_bridged(url)
    with pytest.raises(UnavailableError):
        ctx.ensure_bridged("grpc://127.0.0.1:1", timeout_s=0.5)
    ctx["x"] = 5
    assert ctx.backend.switches == ()
    assert not there.heartbeat(name)


@pytest.mark.parametrize("step", ["sent", "answered", "verified"])
def test_a_move_that_fails_leaves_nothing_on_the_server(
    ctx: Context, url: str, there: BridgedState, name: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = BridgedImport.finish

    def lose_the_answer(begun: BridgedImport) -> None:
        finish(begun)
        raise OutcomeUnknownError("the connection broke")

    def break_off(begun: BridgedImport) -> None:
        begun.close()
        raise UnavailableError("the network is gone")

    def differ(*_: object, **__: object) -> str:
        return "0"

    if step == "verified":
        monkeypatch.setattr(BridgedState, "content_hash", differ)
    else:
        monkeypatch.setattr(BridgedImport, "finish", break_off if step == "sent" else lose_the_answer)
    error = {"sent": UnavailableError, "answered": OutcomeUnknownError, "verified": InternalError}[step]
    with pytest.raises(error):
        ctx.ensure_bridged(url)
    monkeypatch.undo()
    assert not there.heartbeat(name)
    assert ctx["x"] == 2
    ctx["x"] = 3
    ctx.ensure_bridged(url)
    assert there.get_value(name, "x") == 3


def test_a_server_that_dies_while_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sessions.db"
    with ServedDatabase(path) as served, Context("s") as ctx:
        ctx.define("x", 1)
        finish = BridgedImport.finish

        def kill(begun: BridgedImport) -> object:
            served.process.kill()
            return finish(begun)

        monkeypatch.setattr(BridgedImport, "finish", kill)
        with pytest.raises((OutcomeUnknownError, UnavailableError)):
            ctx.ensure_bridged(f"grpc://{served.target}", timeout_s=5)
        monkeypatch.undo()
        ctx["x"] = 2
        served.restart()
        ctx.ensure_bridged(f"grpc://{served.target}")
        assert ctx["x"] == 2
        assert [each.value for each in ctx.history("x")] == [2, 1]


# One program on every backend


def program(ctx: Context, move: Callable[[Context], None]) -> None:
    """What is printed must not depend on the backend, nor on whether the session moves in the middle."""
    ctx.define("temperature", 20.5, constraints={"min": 0}, description="of the room")
    ctx.define("names", ["ada"])
    ctx["temperature"] = 21.0
    print(ctx.get("temperature"), ctx.get("missing", "nothing"), sorted(ctx.get_many()))
    move(ctx)
    ctx.set("temperature", 22.5, reason="warmer", actor="bob", idempotency_key="k")
    print(ctx.set("temperature", 22.5, idempotency_key="k"))
    ctx.update("names", lambda names: [*names, "bob"])
    with contextlib.suppress(StateError):
        ctx.set("temperature", -1)
    ctx.rollback("temperature", 0)
    for entry in ctx.history("temperature"):
        print(entry.version, entry.value, entry.kind, entry.reason)
    print(ctx["names"], [info.name for info in ctx.list("n*")])
    ctx.delete("names")
    print("names" in ctx, dict(ctx.variables))


def printed(ctx: Context, move: Callable[[Context], None] = lambda _: None) -> str:
    text = io.StringIO()
    with ctx, contextlib.redirect_stdout(text):
        program(ctx, move)
    return text.getvalue()


def test_one_program_prints_the_same_on_every_backend(tmp_path: Path, url: str) -> None:
    expected = printed(Context())
    assert expected.count("\n") > 6
    assert printed(Context(backend=tmp_path / "a.db")) == expected
    assert printed(Context(backend=url)) == expected
    assert printed(Context(), lambda ctx: ctx.ensure_persistent(tmp_path / "b.db")) == expected
    assert printed(Context(), lambda ctx: ctx.ensure_bridged(url)) == expected
    assert printed(Context(backend=tmp_path / "c.db"), lambda ctx: ctx.ensure_bridged(url)) == expected
    assert moves.TIMEOUT_S == 30


# Tools go along


@tool(retries=1_000, requires="remote")
def count(ctx: ToolContext, by: int = 1) -> int:
    """Counts, and remembers who else was there."""
    ctx["x"] += by
    ctx.log("counted", by=by)
    return int(ctx["x"])


@tool
def count_twice(ctx: ToolContext) -> list[int]:
    """Calls another tool."""
    return [ctx.call(count), ctx.call("count", by=2)]


@tool
async def count_later(ctx: ToolContext) -> int:
    """Calls another tool, asynchronously."""
    return int(await ctx.call(count))


@tool
def numbers(ctx: ToolContext) -> Iterator[int]:
    """Streams."""
    yield from range(int(ctx["x"]))


@tool
def fails(ctx: ToolContext) -> None:
    """Writes, and fails."""
    ctx["x"] = 1000
    raise ValueError("no")


@tool
def forgives(ctx: ToolContext) -> None:
    """Calls a tool that fails, and goes on."""
    with contextlib.suppress(StateError, ValueError):
        ctx.call(fails)


TOOLS = [count, count_twice, count_later, numbers, fails, forgives]


def test_tools_go_along_to_a_server(url: str, there: BridgedState, name: str) -> None:
    with Context(name, tools=TOOLS, remote_at=url) as ctx:
        ctx.define("x", 0)
        assert ctx.backend.kind == "local"
        assert ctx.call(count) == 1
        assert ctx.backend.kind == "bridged"
        assert there.get_value(name, "x") == 1
        assert ctx.call("count_twice") == [2, 4]
        assert ctx.call(count_later) == 5
        assert ctx.call(numbers) == [0, 1, 2, 3, 4]
        for broken in (fails, forgives):
            with pytest.raises(ToolFailedError, match="ValueError: no"):
                ctx.call(broken)
        with pytest.raises(ToolArgumentError):
            ctx.call(count, by="many")
        assert ctx["x"] == 5
        with there.audit() as audit:
            rows = audit.page(ExecutionQuery(session=name, newest_first=True)).rows
        assert {row.tool for row in rows} == {"transaction"}
        detail = there.audit().execution(rows[-1].execution_id)
        assert detail.metadata["tool"] == "count"


def call_often(ctx: Context) -> None:
    for _ in range(5):
        ctx.call(count)


def test_tools_of_this_process_conflict_as_those_of_the_server_do(url: str, name: str) -> None:
    with Context(name, tools=TOOLS, remote_at=url) as ctx:
        ctx.define("x", 0)
        callers = [threading.Thread(target=call_often, args=(ctx,)) for _ in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(within(60))
        assert ctx["x"] == 10


def test_a_program_with_tools_prints_the_same_everywhere(tmp_path: Path, url: str) -> None:
    def run(ctx: Context, move: Callable[[Context], None] = lambda _: None) -> list[object]:
        with ctx:
            ctx.define("x", 1)
            return [ctx.call(count_twice), move(ctx), ctx.call(count_twice), ctx.call(numbers)]

    tools = [tool(name=each.spec.name)(each._function) for each in TOOLS]
    expected = run(Context(tools=tools))
    assert run(Context(backend=tmp_path / "a.db", tools=tools)) == expected
    assert run(Context(tools=tools), lambda ctx: ctx.ensure_bridged(url)) == expected
    assert run(Context(backend=url, tools=tools)) == expected
    with BridgedState(url) as provider:
        assert run(Context(backend=provider, tools=tools)) == expected
        provider.check_open()
