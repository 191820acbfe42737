"""Contexts whose session moves: from memory to a file, while others use it, and with failures at each step."""

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import Context, connect, tool
from dspex_persist.audit import CommitQuery
from dspex_persist.cognitive import moves
from dspex_persist.cognitive.errors import ToolDefinitionError
from dspex_persist.cognitive.tool_context import ToolContext
from dspex_persist.state.abilities import Auditable, Recordable
from dspex_persist.state.errors import (
    DatabaseInUseError,
    ExecutionConflictError,
    InternalError,
    InvalidArgumentError,
    OutcomeUnknownError,
    RecordingError,
    SessionExistsError,
    SessionMovedError,
    SessionNotFoundError,
    StateError,
    StorageError,
    ToolFailedError,
    UnavailableError,
    UnsupportedError,
    VariableLockedError,
)
from dspex_persist.state.imports import CheckedImport
from dspex_persist.state.limits import Limits
from dspex_persist.state.local import MemoryState
from dspex_persist.state.log_state import LogState, _Hold
from dspex_persist.state.model import VariableVersion
from dspex_persist.state.store import maintenance
from tests.deadline import within
from tests.end_to_end.old_style import wait_until


@tool
def double(ctx: ToolContext, name: str) -> int:
    """Doubles a variable."""
    ctx[name] *= 2
    return int(ctx[name])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@pytest.fixture
def ctx() -> Iterator[Context]:
    """A context in memory, in which much has happened."""
    with Context("s", ttl_s=3600, metadata={"user": "ada"}, tools=[double]) as ctx:
        ctx.define("x", 1, constraints={"min": 0}, metadata={"unit": "m"})
        ctx.define("y", "text")
        ctx.define("gone", 0)
        ctx.set("x", 2, reason="to see", actor="bob")
        ctx.set("x", 3, idempotency_key="once")
        ctx.delete("gone")
        ctx.backend.provider.add_dependency("s", "y", "x")
        ctx.backend.provider.start_optimization("s", "y", "optimizer")
        assert ctx.call(double, name="x") == 6
        yield ctx


def numberless(version: VariableVersion) -> VariableVersion:
    """A version without the numbers of commits, which a move changes."""
    return version._replace(sequence=0, cause=re.sub("^exec_[0-9]+", "exec", version.cause))


def everything(ctx: Context) -> Any:
    """All that can be asked about a session, but for the numbers of commits."""
    provider = ctx.backend.provider
    return (
        Recordable.of(provider).content_hash("s"),
        provider.get_session("s"),
        provider.list_variables("s"),
        [
            [numberless(each) for each in provider.get_variable_history("s", variable.id)]
            for variable in provider.list_variables("s")
        ],
    )


def test_a_session_moves_to_a_file(ctx: Context, path: Path) -> None:
    before = everything(ctx)
    ctx.ensure_persistent(path)
    assert everything(ctx) == before
    assert (ctx.backend.kind, ctx.backend.url) == ("embedded", str(path))
    (switch,) = ctx.backend.switches
    assert (switch.source, switch.target) == ("local", f"embedded {path}")
    assert (switch.variables, switch.versions) == (2, 7)
    assert switch.took_s > 0
    # It goes on: versions, constraints, locks, keys, tools.
    assert ctx.set("x", 7) == 4
    with pytest.raises(StateError, match="min"):
        ctx.set("x", -1)
    with pytest.raises(VariableLockedError):
        ctx.set("y", "no")
    assert ctx.set("x", 3, idempotency_key="once") == 2
    assert ctx.call(double, name="x") == 14
    ctx.close()
    with Context("s", path, create=False) as again:
        assert again["x"] == 14
    assert maintenance.check(path).problems == ()


def test_it_moves_once(ctx: Context, path: Path) -> None:
    ctx.ensure_persistent(path)
    provider = ctx.backend.provider
    ctx.ensure_persistent(path)
    ctx.ensure_persistent(path.with_name("other.db"))
    assert ctx.backend.provider is provider
    assert len(ctx.backend.switches) == 1
    assert not path.with_name("other.db").exists()


def test_the_old_backend_is_closed_only_if_it_was_opened_by_the_context(path: Path) -> None:
    with connect("memory:") as state:
        with Context("s", state) as ctx, Context("other", state) as other:
            ctx.define("x", 1)
            other.define("y", 1)
            ctx.ensure_persistent(path)
            other["y"] = 2
            assert (ctx["x"], other["y"]) == (1, 2)
            with pytest.raises(SessionNotFoundError):
                state.get_value("s", "x")
        state.check_open()
        assert state.heartbeat("other")
    with Context("s", path, create=False) as again:
        assert again["x"] == 1


def test_from_a_file_to_another_one(path: Path) -> None:
    """Not by `ensure_persistent`, for which any file will do, but it is the same move."""
    with Context("s", path) as ctx:
        ctx.define("x", 1)
        moves._move(ctx._backend, "s", str(path.with_name("other.db")), {})
        ctx["x"] = 2
        assert [each.version for each in ctx.history("x")] == [1, 0]
    with connect(path) as state, Auditable.of(state).audit() as audit:
        assert not state.heartbeat("s")
        last = audit.page(CommitQuery(session="s", newest_first=True), most=1).rows[0]
        assert last.cause == "EndMovedSession"
    assert maintenance.check(path).problems == ()


def test_everything_keeps_its_options(path: Path) -> None:
    with Context("s", limits=Limits(variables_per_session=3)) as ctx:
        for name in "xyz":
            ctx.define(name, 0)
        ctx.ensure_persistent(path)
        with pytest.raises(StateError, match="variables_per_session"):
            ctx.define("w", 0)


def test_from_asyncio(path: Path) -> None:
    async def run() -> None:
        async with Context.aopen("s") as ctx:
            await ctx.define.aio("x", 0)
            writers = [asyncio.create_task(write(ctx)) for _ in range(4)]
            await asyncio.sleep(0)
            await ctx.ensure_persistent.aio(path)
            assert sum(await asyncio.gather(*writers)) == 40
            assert await ctx.get.aio("x") == 40
            assert ctx.backend.kind == "embedded"

    async def write(ctx: Context) -> int:
        for _ in range(10):
            await ctx.update.aio("x", lambda value: value + 1)
        return 10

    asyncio.run(asyncio.wait_for(run(), within(30)))


def test_on_an_event_loop_it_does_not_wait_for_itself(path: Path) -> None:
    async def run() -> None:
        async with Context.aopen("s") as ctx:
            await ctx.define.aio("x", 0)
            ctx._backend.gate.calls.append(None)
            with pytest.raises(UnsupportedError, match="await it"):
                ctx.ensure_persistent(path)
            ctx._backend.gate.calls.pop()
            ctx.ensure_persistent(path)

    asyncio.run(run())


def test_a_tool_cannot_move_its_own_session(path: Path) -> None:
    contexts: list[Context] = []

    @tool
    def move(ctx: ToolContext) -> None:
        contexts[0].ensure_persistent(path)

    with Context("s", tools=[move]) as ctx:
        contexts.append(ctx)
        with pytest.raises(ToolFailedError, match="move by a tool"):
            ctx.call(move)
        assert ctx.backend.kind == "local"
        assert not path.exists()


def test_a_transaction_cannot_move_its_own_session(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for its own end."""

    async def run(ctx: Context) -> None:
        async with ctx.transaction() as transaction:
            await transaction.set.aio("x", 2)
            with pytest.raises(UnsupportedError, match="own transaction; move it before the transaction"):
                await ctx.ensure_persistent.aio(path)

    monkeypatch.setattr(moves._Move, "carry_out", fail)
    with Context("s") as ctx:
        ctx.define("x", 0)
        with ctx.transaction() as transaction:
            transaction["x"] = 1
            for move in (ctx.ensure_persistent, ctx.move_to):
                with pytest.raises(UnsupportedError, match="own transaction; move it before the transaction"):
                    move(path)
        assert ctx["x"] == 1
        asyncio.run(run(ctx))
        assert ctx["x"] == 2
        assert not path.exists()
        monkeypatch.undo()
        ctx.ensure_persistent(path)


def test_a_move_waits_for_tools_and_no_tool_begins(path: Path) -> None:
    running, go_on = threading.Event(), threading.Event()

    @tool(retries=10)
    def slow(ctx: ToolContext) -> int:
        running.set()
        assert go_on.wait(within(30))
        ctx["x"] += 1
        return int(ctx["x"])

    with Context("s", tools=[slow]) as ctx:
        ctx.define("x", 0)
        results: list[Any] = []
        calls = [threading.Thread(target=lambda: results.append(ctx.call(slow)))]
        calls[0].start()
        assert running.wait(within(30))
        mover = threading.Thread(target=ctx.ensure_persistent, args=(path,))
        mover.start()
        # Variables are written as long as the tool runs.
        ctx.define("y", 0)
        go_on.set()
        calls += [threading.Thread(target=lambda: results.append(ctx.call(slow))) for _ in range(3)]
        for call in calls[1:]:
            call.start()
            call.join()
        mover.join(within(30))
        calls[0].join(within(30))
        assert sorted(results) == [1, 2, 3, 4]
        assert ctx.backend.kind == "embedded"


def test_a_tool_that_runs_for_too_long_keeps_it_where_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "TIMEOUT_S", 0.01)
    running, go_on = threading.Event(), threading.Event()

    @tool
    def slow(ctx: ToolContext) -> None:
        running.set()
        assert go_on.wait(within(30))

    with Context("s", tools=[slow]) as ctx:
        ctx.define("x", 0)
        caller = threading.Thread(target=ctx.call, args=(slow,))
        caller.start()
        assert running.wait(within(30))
        with pytest.raises(UnavailableError, match="still running"):
            ctx.ensure_persistent(path)
        ctx["x"] = 1
        go_on.set()
        caller.join(within(30))
        assert not path.exists()
        ctx.ensure_persistent(path)
        assert ctx["x"] == 1


def test_others_on_the_old_backend_wait_and_learn_where_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect("memory:") as state, Context("s", state) as ctx:
        ctx.define("x", 0)
        raised: list[BaseException] = []
        writers: list[threading.Thread] = []
        verify = moves._Move._verify

        def write() -> None:
            try:
                state.set_variable("s", "x", 1)
            except StateError as error:
                raised.append(error)

        def slowly(*arguments: Any) -> None:
            writers.append(threading.Thread(target=write))
            writers[0].start()
            verify(*arguments)

        monkeypatch.setattr(moves._Move, "_verify", slowly)
        ctx.ensure_persistent(path)
        writers[0].join(within(30))
        (error,) = raised
        assert isinstance(error, SessionMovedError | SessionNotFoundError)
        assert ctx["x"] == 0


def test_most_is_copied_before_anybody_waits(ctx: Context, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written meanwhile is copied, too, even in a session that began again."""
    hold, before = LogState.hold_session, everything(ctx)[0]
    late: list[Callable[[], object]] = [lambda: ctx.set("x", 9), lambda: ctx.define("late", 1)]

    def write_first(*arguments: Any, **options: Any) -> Any:
        for write in late:
            write()
        return hold(*arguments, **options)

    added: list[int] = []
    add = CheckedImport.add

    def note(begun: CheckedImport, commit: Any) -> None:
        added.append(commit.number)
        add(begun, commit)

    # The gate would have these calls wait for the move that makes them.
    monkeypatch.setattr(moves._Move, "_at_the_gate", lambda _: nullcontext())
    monkeypatch.setattr(LogState, "hold_session", write_first)
    monkeypatch.setattr(CheckedImport, "add", note)
    ctx.ensure_persistent(path)
    monkeypatch.undo()
    assert added == list(range(1, len(added) + 1))
    assert (ctx["x"], ctx["late"]) == (9, 1)
    assert everything(ctx)[0] != before
    assert ctx.backend.switches[0].versions == 9


def test_a_session_that_began_again_while_it_was_copied(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = LogState.hold_session
    with connect("memory:") as state, Context("s", state) as ctx:
        ctx.define("x", 1)

        def begin_again(*arguments: Any, **options: Any) -> Any:
            state.cleanup_session("s")
            state.initialize_session("s")
            state.register_variable("s", "x", "integer", 2)
            return hold(*arguments, **options)

        monkeypatch.setattr(LogState, "hold_session", begin_again)
        ctx.ensure_persistent(path)
        monkeypatch.undo()
        # The one that was there when everybody waited has moved.
        assert (ctx["x"], ctx.info("x").version) == (2, 0)


def test_tools_of_others_are_waited_for_and_no_new_ones_begin(path: Path) -> None:
    running, go_on = threading.Event(), threading.Event()

    @tool
    def slow(ctx: ToolContext) -> None:
        running.set()
        assert go_on.wait(within(30))
        ctx["x"] += 1

    with connect("memory:", tools=[slow]) as state, Context("s", state) as ctx, Context("s", state) as other:
        ctx.define("x", 0)
        raised: list[BaseException] = []

        def call() -> None:
            try:
                other.call("slow")
            except StateError as error:
                raised.append(error)

        first, late = threading.Thread(target=call), threading.Thread(target=call)
        first.start()
        assert running.wait(within(30))
        mover = threading.Thread(target=ctx.ensure_persistent, args=(path,))
        mover.start()
        held = state.engine._groups.held  # type: ignore[attr-defined]
        wait_until(lambda: "s" in held, "the move begins to hold the session")
        late.start()
        # The tool that runs may still write, and so may everybody else.
        other["x"] = other["x"]
        assert mover.is_alive()
        go_on.set()
        for thread in (first, late, mover):
            thread.join(within(30))
        # The first conflicts with the write in between; the other one never began.
        assert {type(error) for error in raised} == {ExecutionConflictError, SessionMovedError}
        assert (ctx["x"], ctx.backend.kind) == (0, "embedded")


# Failures


def fail(*_: object, **__: object) -> Any:
    raise ZeroDivisionError


def fail_in_storage(*_: object, **__: object) -> Any:
    raise StorageError("the disk is full")


def fail_after(owner: Any, name: str, error: BaseException) -> Callable[..., Any]:
    """A method that does its work, and raises nevertheless."""
    original = getattr(owner, name)

    def method(*arguments: Any, **options: Any) -> Any:
        original(*arguments, **options)
        raise error

    return method


STEPS: dict[str, tuple[Any, str, Callable[..., Any], type[BaseException]]] = {
    "hold": (LogState, "hold_session", fail, ZeroDivisionError),
    "record": (MemoryState, "record", fail, ZeroDivisionError),
    "begin": (LogState, "begin_import", fail, ZeroDivisionError),
    "check": (CheckedImport, "add", fail, ZeroDivisionError),
    "write": (CheckedImport, "finish", fail_in_storage, StorageError),
    "written": (
        CheckedImport,
        "finish",
        fail_after(CheckedImport, "finish", OutcomeUnknownError("the connection broke")),
        OutcomeUnknownError,
    ),
    "verify": (moves._Move, "_verify", fail, ZeroDivisionError),
    "differ": (Recordable, "content_hash", lambda *_, **__: "0", InternalError),
    "leave": (_Hold, "move", fail_in_storage, StorageError),
    "interrupt": (moves._Move, "_verify", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), KeyboardInterrupt),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("is_new", [True, False], ids=["new", "used"])
def test_a_move_that_fails_changes_nothing(
    ctx: Context, path: Path, monkeypatch: pytest.MonkeyPatch, step: str, is_new: bool
) -> None:
    if not is_new:
        with Context("other", path) as other:
            other.define("y", 1)
    files = sorted(path.parent.iterdir())
    before = everything(ctx)
    owner, name, replacement, error = STEPS[step]
    monkeypatch.setattr(owner, name, replacement)
    with pytest.raises(error):
        ctx.ensure_persistent(path)
    monkeypatch.undo()
    assert sorted(path.parent.iterdir()) == files
    assert (ctx.backend.kind, ctx.backend.switches) == ("local", ())
    assert everything(ctx) == before
    assert ctx.set("x", 7) == 4
    if not is_new:
        with connect(path) as state:
            assert not state.heartbeat("s")
            assert state.get_value("other", "y") == 1
        assert maintenance.check(path).problems == ()
    before = everything(ctx)
    ctx.ensure_persistent(path)
    assert everything(ctx) == before


def test_what_has_arrived_is_not_lost_when_the_last_step_fails(
    ctx: Context, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session has ended where it was, and the mover is interrupted: it is complete at the new place."""
    before = everything(ctx)
    monkeypatch.setattr(_Hold, "move", fail_after(_Hold, "move", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        ctx.ensure_persistent(path)
    assert ctx.backend.kind == "embedded"
    assert everything(ctx) == before


def test_what_cannot_move(ctx: Context, path: Path) -> None:
    with Context("s", path) as other:
        other.define("mine", 1)
        with pytest.raises(DatabaseInUseError):
            ctx.ensure_persistent(path)
    with pytest.raises(SessionExistsError):
        ctx.ensure_persistent(path)
    with Context("s", path) as other:
        assert other.variables == {"mine": 1}
    new = path.with_name("new.db")
    with pytest.raises(RecordingError, match="variables_per_session"):
        ctx.ensure_persistent(new, limits=Limits(variables_per_session=1))
    assert not new.exists()
    for wrong in ("grpc://127.0.0.1:1", "memory:", "local"):
        with pytest.raises(InvalidArgumentError, match="is not a file"):
            ctx.ensure_persistent(wrong)
    with pytest.raises(InvalidArgumentError, match="not the URL of a server"):
        ctx.ensure_bridged(str(path))
    with pytest.raises(InvalidArgumentError, match="must be a str or a path"):
        ctx.ensure_persistent(5)  # type: ignore[arg-type]
    assert ctx["x"] == 6


def test_two_who_move_it_at_the_same_time(ctx: Context, path: Path) -> None:
    raised: list[BaseException] = []

    def move() -> None:
        try:
            ctx.ensure_persistent(path)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            raised.append(error)

    movers = [threading.Thread(target=move) for _ in range(4)]
    for mover in movers:
        mover.start()
    for mover in movers:
        mover.join(within(30))
    assert raised == []
    assert len(ctx.backend.switches) == 1


def test_closed_while_it_moves(ctx: Context, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = moves._Move._verify

    def close(*arguments: Any) -> None:
        verify(*arguments)
        ctx.close()

    monkeypatch.setattr(moves._Move, "_verify", close)
    with suppress(StateError):
        ctx.ensure_persistent(path)
    # Nothing keeps the file open.
    with connect(path):
        pass


def test_positions_of_watches(ctx: Context, path: Path) -> None:
    source = ctx.backend.provider
    sequences = [each.sequence for each in ctx.backend.provider.get_variable_history("s", "x")][::-1]
    with Context("other", path) as other:
        other.define("y", 1)
    ctx.ensure_persistent(path)
    new = [each.sequence for each in ctx.backend.provider.get_variable_history("s", "x")][::-1]
    assert [ctx._backend.position_here(source, each) for each in sequences] == new
    assert ctx._backend.position_here(ctx.backend.provider, 5) == 5


# Tools that require more


@tool(requires="durable")
def needy(ctx: ToolContext) -> int:
    """Counts."""
    ctx["x"] += 1
    return int(ctx["x"])


@tool(requires="remote")
def distant(ctx: ToolContext) -> int:
    """Counts."""
    return int(ctx["x"])


@tool
def outer(ctx: ToolContext) -> Any:
    """Calls another one."""
    return ctx.call(needy)


def test_a_tool_that_requires_a_durable_session_moves_it(path: Path) -> None:
    with Context("s", tools=[needy, outer], durable_at=path) as ctx:
        ctx.define("x", 0)
        assert ctx.backend.kind == "local"
        # A tool cannot move the session that it runs in, so the inner one fails.
        with pytest.raises(ToolFailedError, match="requires a durable session"):
            ctx.call(outer)
        assert ctx.call("needy") == 1
        assert (ctx.backend.kind, ctx.backend.url) == ("embedded", str(path))
        assert ctx.call(needy) == 2
        assert ctx.call(outer) == 3
        assert len(ctx.backend.switches) == 1


def test_a_tool_whose_session_has_nowhere_to_go(path: Path) -> None:
    with Context("s", tools=[needy, distant]) as ctx:
        ctx.define("x", 0)
        for each, what in ((needy, "durable_at=path or remote_at=url"), (distant, "remote_at=url")):
            with pytest.raises(UnsupportedError, match=what):
                ctx.call(each)
        assert ctx["x"] == 0
        assert ctx.backend.kind == "local"
    with Context("s", tools=[needy, distant], durable_at=path, remote_at="grpc://127.0.0.1:1") as ctx:
        ctx.define("x", 0)
        with pytest.raises(UnavailableError):
            ctx.call(distant)
        assert (ctx["x"], ctx.backend.kind) == (0, "local")
        assert ctx.call(needy) == 1
    with Context("t", path, tools=[needy]) as ctx:
        ctx.define("x", 0)
        assert ctx.call(needy) == 1
        assert ctx.backend.switches == ()


def test_a_requirement_that_there_is_not() -> None:
    with pytest.raises(ToolDefinitionError, match="one of durable, remote, not 'fast'"):
        tool(name="quick", requires="fast")(lambda: None)


def test_a_tool_that_requires_more_from_asyncio(path: Path) -> None:
    async def run() -> None:
        async with Context.aopen("s", tools=[needy], durable_at=path) as ctx:
            await ctx.define.aio("x", 0)
            assert await ctx.call.aio(needy) == 1
            assert ctx.backend.kind == "embedded"

    asyncio.run(asyncio.wait_for(run(), within(30)))


# Watches


def test_watches_go_on_without_a_gap_or_a_repetition(path: Path) -> None:
    with Context("s") as ctx:
        ctx.define("x", 0)
        for number in range(1, 4):
            ctx["x"] = number
        seen: list[int] = []
        by_call: list[int] = []
        done = threading.Event()

        def note(change: Any) -> None:
            by_call.append(change.value)
            if change.value == 60:
                done.set()

        ctx.watch("x", on_change=note)
        with ctx.watch("x") as changes:
            stop = threading.Event()

            def write() -> None:
                for number in range(4, 61):
                    ctx["x"] = number
                    if number == 20:
                        stop.set()

            writer = threading.Thread(target=write)
            writer.start()
            assert stop.wait(within(30))
            ctx.ensure_persistent(path)
            for change in changes:
                seen.append(change.value)
                if change.value == 60:
                    break
            writer.join(within(30))
        assert done.wait(within(30))
        assert seen[-57:] == by_call[-57:] == list(range(4, 61))
        assert len(seen) <= 58


def test_watches_stay_where_the_session_stays(ctx: Context, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ctx.watch("x") as changes:
        for step in ("verify", "leave"):
            owner, name, replacement, error = STEPS[step]
            monkeypatch.setattr(owner, name, replacement)
            with pytest.raises(error):
                ctx.ensure_persistent(path)
            monkeypatch.undo()
        ctx["x"] = 7
        ctx.ensure_persistent(path)
        ctx["x"] = 8
        seen = []
        for change in changes:
            seen.append(change.value)
            if change.value == 8:
                break
        assert seen[-2:] == [7, 8]
        assert len(seen) <= 3
