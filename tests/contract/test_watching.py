"""Watches of a context are the same on every backend: in memory, on a file, and on a real server."""

import asyncio
import gc
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from freezegun import freeze_time
from pydantic import BaseModel

from dspex_persist import Context, EmbeddedState, LocalState, ToolContext, tool
from dspex_persist.cognitive.changes import Change
from dspex_persist.cognitive.errors import ContextClosedError
from dspex_persist.cognitive.watching import Changes
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.errors import EngineClosedError, InvalidArgumentError, VariableNotFoundError
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.server import ServedDatabase
from tests.deadline import within
from tests.logs import capture_logs

DEADLINE_S = within(20)


@pytest.fixture(scope="module", params=["memory", "file", "server"])
def provider(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StateProvider]:
    path = tmp_path_factory.mktemp("watching") / "watched.db"
    if request.param == "memory":
        with LocalState() as state:
            yield state
    elif request.param == "file":
        with EmbeddedState(path) as state:
            yield state
    else:
        with ServedDatabase(path) as served, BridgedState(served.target) as state:
            yield state


@pytest.fixture
def ctx(provider: StateProvider) -> Iterator[Context]:
    with Context(f"watching-{uuid.uuid4().hex}", provider) as ctx:
        ctx.define("x", 0)
        ctx.define("y", "")
        yield ctx


def taken(changes: Changes[Any], count: int) -> list[Change[Any]]:
    """The next changes, exactly as many."""
    found = []
    while len(found) < count:
        change = changes.next(DEADLINE_S)
        assert change is not None, f"only {found}"
        found.append(change)
    return found


def values(changes: list[Change[Any]]) -> list[Any]:
    return [change.value for change in changes]


class Calls:
    """A function to be called with changes."""

    def __init__(self, act: Callable[[Change[Any]], object] = str) -> None:
        self.changes: list[Change[Any]] = []
        self._act = act
        self._there = threading.Condition()

    def __call__(self, change: Change[Any]) -> None:
        with self._there:
            self.changes.append(change)
            self._there.notify_all()
        self._act(change)

    def first(self, count: int) -> list[Change[Any]]:
        """Wait for this many calls."""
        with self._there:
            assert self._there.wait_for(lambda: len(self.changes) >= count, DEADLINE_S), self.changes
            return self.changes[:count]


class TestIteration:
    def test_a_change_says_what_was_what_is_and_who(self, ctx: Context) -> None:
        with ctx.watch("x") as changes:
            ctx.set("x", 1, reason="because", actor="user:ada")
            (change,) = taken(changes, 1)
        version = ctx.history("x", 1)[0]
        assert (change.name, change.old, change.value, change.version) == ("x", 0, 1, 1)
        assert (change.actor, change.reason, change.cause) == ("user:ada", "because", "SetVariable")
        assert (change.commit, change.at, change.kind) == (version.commit, version.at, version.kind)
        assert (change.execution_id, change.is_initial, change.is_deletion, change.count) == (None, False, False, 1)

    def test_definitions_and_deletions(self, ctx: Context) -> None:
        with ctx.watch() as changes:
            ctx.define("z", 5)
            ctx.delete("z")
            born, gone = taken(changes, 2)
        assert (born.old, born.value, born.kind) == (None, 5, "registered")
        assert (gone.old, gone.value, gone.kind, gone.is_deletion) == (5, None, "deleted", True)

    def test_what_depends_on_a_change_is_told(self, ctx: Context, provider: StateProvider) -> None:
        provider.add_dependency(ctx.session_id, "y", "x")
        with ctx.watch("y") as changes:
            ctx["x"] = 1
            (change,) = taken(changes, 1)
        assert (change.kind, change.dependency, change.old, change.value) == ("dependency_changed", "x", None, "")
        assert change.actor

    def test_names_globs_and_filters(self, ctx: Context) -> None:
        ctx.define("temperature", 0.5)
        with ctx.watch("temp*", "x", filter=lambda change: change.value != 2) as changes:
            for value in (1, 2, 3):
                ctx["x"] = value
                ctx["y"] = f"{value}"
            ctx["temperature"] = 0.7
            ctx.define("temporary", 1)
            assert values(taken(changes, 4)) == [1, 3, 0.7, 1]
        with pytest.raises(VariableNotFoundError):
            ctx.watch("unknown")
        assert ctx.watch("unknown*").next(0) is None

    def test_an_error_of_the_filter_is_the_users_and_nothing_is_lost(self, ctx: Context) -> None:
        with ctx.watch("x", filter=lambda change: 1 / (change.value - 1)) as changes:
            for value in (1, 2, 3):
                ctx["x"] = value
            with pytest.raises(ZeroDivisionError):
                taken(changes, 1)
            assert values(taken(changes, 2)) == [2, 3]

    def test_the_values_as_they_are_come_first(self, ctx: Context) -> None:
        with ctx.watch("x", include_initial=True) as changes:
            ctx["x"] = 1
            first, second = taken(changes, 2)
        assert (first.is_initial, first.value, first.old, first.actor) == (True, 0, None, "")
        assert (second.is_initial, second.value) == (False, 1)

    def test_a_handle_is_watched_with_its_type(self, ctx: Context) -> None:
        ctx.define("limit", 1.0)
        with ctx.handle("limit", float).watch(include_initial=True) as changes:
            ctx["limit"] = 2
            assert [(change.old, change.value) for change in taken(changes, 2)] == [(None, 1.0), (1.0, 2.0)]

    def test_it_goes_on_after_a_commit(self, ctx: Context) -> None:
        with ctx.watch("x") as changes:
            for value in (1, 2, 3):
                ctx["x"] = value
            (first,) = taken(changes, 1)
            assert changes.position == first.commit
        assert changes.position == first.commit, "closed"
        for after in (first.commit, changes.position):
            with ctx.watch("x", after=after) as changes:
                assert values(taken(changes, 2)) == [2, 3]
        with pytest.raises(InvalidArgumentError):
            ctx.watch("x", after=first.commit, include_initial=True)

    def test_a_watch_that_has_delivered_nothing_goes_on_from_its_beginning(self, ctx: Context) -> None:
        with ctx.watch("x", include_initial=True) as changes:
            ctx["x"] = 1
        with ctx.watch("x", after=changes.position) as again:
            assert values(taken(again, 1)) == [1]

    def test_closing_ends_the_iteration_at_once_also_for_one_who_waits(self, ctx: Context) -> None:
        changes = ctx.watch("x")
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(list, changes)
            ctx["x"] = 1
            changes.close()
            assert len(waiting.result(DEADLINE_S)) <= 1
        changes.close()
        assert list(changes) == []
        with ctx.watch("x") as changes:
            ctx["x"] = 2
        assert list(changes) == []
        assert changes.ended

    def test_the_end_of_the_session_ends_it(self, ctx: Context) -> None:
        with ctx.watch("x") as changes, ctx.watch("x", debounce_s=1000) as slow:
            ctx["x"] = 1
            ctx["x"] = 2
            ctx.end()
            assert values(list(changes)) == [1, 2]
            assert values(list(slow)) == [2], "what waits is delivered before"

    def test_closing_the_context_ends_it_with_an_error(self, provider: StateProvider) -> None:
        ctx = Context(None, provider)
        ctx.define("x", 0)
        changes = ctx.watch("x")
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(list, changes)
            ctx.close()
            assert isinstance(waiting.exception(DEADLINE_S), ContextClosedError)
        with pytest.raises(ContextClosedError):
            next(changes)
        with pytest.raises(ContextClosedError):
            ctx.watch("x")

    def test_one_that_nobody_uses_any_more_is_closed(self, ctx: Context) -> None:
        for value in range(3):
            for _ in ctx.watch("x", include_initial=True):
                break
            ctx["x"] = value
        gc.collect()
        dropped = ctx._watchers._dropped
        assert len(dropped) > 0
        ctx.watch("x").close()
        assert len(dropped) <= 1, "opening another one closes those before"

    def test_a_slow_consumer_gets_everything(self, ctx: Context) -> None:
        writes = 700
        with ctx.watch("x") as changes:
            with ThreadPoolExecutor(8) as threads:
                list(threads.map(lambda value: ctx.set("x", value), range(writes)))
            found = taken(changes, writes)
        assert [change.version for change in found] == list(range(1, writes + 1))
        assert [change.old for change in found[1:]] == values(found)[:-1]


class TestAsync:
    def run(self, test: Callable[[], Any]) -> None:
        async def limited() -> None:
            await asyncio.wait_for(test(), DEADLINE_S)

        asyncio.run(limited())

    def test_async_for(self, ctx: Context) -> None:
        async def test() -> None:
            found = []
            async with ctx.watch("x") as changes:
                writing = asyncio.gather(*(ctx.set.aio("x", value) for value in range(1, 301)))
                async for change in changes:
                    found.append(change.version)
                    if len(found) == 300:
                        break
                await writing
            assert found == list(range(1, 301))
            assert [change async for change in changes] == []

        self.run(test)

    def test_it_goes_on_after_a_commit_that_memory_has_forgotten(self, ctx: Context) -> None:
        async def test() -> None:
            async with ctx.watch("x") as changes:
                after = changes.position
            for value in range(1, 400):
                await ctx.set.aio("x", value)
            found = []
            async for change in ctx.watch("x", after=after):
                found.append(change.value)
                if len(found) == 399:
                    break
            assert found == list(range(1, 400))

        self.run(test)

    def test_a_step_that_is_cancelled_loses_nothing(self, ctx: Context) -> None:
        async def test() -> None:
            async with ctx.watch("x") as changes:
                for value in range(1, 20):
                    step = asyncio.ensure_future(anext(changes))
                    await asyncio.sleep(0)
                    writing = asyncio.ensure_future(ctx.set.aio("x", value))
                    if value % 2:
                        step.cancel()
                    await writing
                    if not step.cancelled() and not step.cancelling():
                        assert (await step).value <= value
                found = [change.value async for change in _until(changes, 19)]
                assert found == sorted(set(found))
                assert found[-1] == 19

        self.run(test)

    def test_closing_the_context_ends_it_with_an_error(self, provider: StateProvider) -> None:
        async def test() -> None:
            ctx = await Context.aopen(None, provider)
            await ctx.define.aio("x", 0)
            async with ctx.watch("x") as changes:
                step = asyncio.ensure_future(anext(changes))
                await asyncio.sleep(0)
                await ctx.aclose()
                with pytest.raises(ContextClosedError):
                    await step

        self.run(test)

    def test_waiting_for_a_value(self, ctx: Context) -> None:
        async def test() -> None:
            waiting = asyncio.ensure_future(ctx.wait_for.aio("x", lambda value: value >= 3, DEADLINE_S))
            for value in range(5):
                await ctx.set.aio("x", value)
            assert await waiting >= 3
            assert await ctx.wait_for.aio("x", lambda value: value == 4) == 4
            with pytest.raises(TimeoutError, match="'x'"):
                await ctx.wait_for.aio("x", lambda value: value == 5, 0.01)

        self.run(test)


async def _until(changes: Changes[Any], value: Any) -> Any:
    async for change in changes:
        yield change
        if change.value == value:
            return


class TestWaiting:
    def test_the_value_may_fit_already(self, ctx: Context) -> None:
        assert ctx.wait_for("x", lambda value: value == 0) == 0

    def test_or_come_later(self, ctx: Context) -> None:
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(ctx.wait_for, "x", lambda value: value == 2, DEADLINE_S)
            ctx["x"] = 1
            ctx["x"] = 2
            assert waiting.result(DEADLINE_S) == 2

    def test_or_never(self, ctx: Context) -> None:
        with pytest.raises(TimeoutError, match=r"no value of 'x' has fitted within 0\.01 s"):
            ctx.wait_for("x", lambda value: value == 1, 0.01)
        with pytest.raises(VariableNotFoundError):
            ctx.wait_for("unknown", bool)

    def test_a_deletion_does_not_fit(self, ctx: Context) -> None:
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(ctx.wait_for, "y", lambda value: value != "", DEADLINE_S)
            ctx.delete("y")
            ctx.define("y", "again")
            assert waiting.result(DEADLINE_S) == "again"


class TestCallbacks:
    def test_each_change_once_and_in_order_on_one_thread(self, ctx: Context) -> None:
        threads: set[str] = set()
        calls = [Calls(lambda _: threads.add(threading.current_thread().name)) for _ in range(5)]
        for call in calls:
            ctx.watch("x", on_change=call)
        for value in range(1, 51):
            ctx["x"] = value
        for call in calls:
            assert values(call.first(50)) == list(range(1, 51))
        assert threads == {"dspex-persist-callbacks"}

    def test_one_that_comes_later_gets_what_comes_after_it(self, ctx: Context) -> None:
        first, later = Calls(), Calls()
        ctx.watch("x", on_change=first)
        ctx["x"] = 1
        ctx.watch("x", on_change=later, include_initial=True)
        ctx["x"] = 2
        assert values(first.first(2)) == [1, 2]
        assert values(later.first(2)) == [1, 2]
        assert [change.is_initial for change in later.changes] == [True, False]

    def test_an_error_is_logged_and_not_fatal(self, ctx: Context) -> None:
        failing, other = Calls(lambda change: 1 / (change.value - 1)), Calls()
        with capture_logs() as logged:
            ctx.watch("x", on_change=failing)
            ctx.watch("x", on_change=other)
            for value in (1, 2):
                ctx["x"] = value
            assert values(failing.first(2)) == values(other.first(2)) == [1, 2]
        (line,) = [each for each in logged if each["event"] == "a callback of a watch failed"]
        assert "ZeroDivisionError" in line["traceback"]
        assert line["variable"] == "x"

    def test_a_slow_one_delays_no_writer_and_no_iteration(self, ctx: Context) -> None:
        go_on = threading.Event()
        slow = Calls(lambda _: go_on.wait(DEADLINE_S))
        ctx.watch("x", on_change=slow)
        with ctx.watch("x") as changes:
            for value in range(1, 11):
                ctx["x"] = value
            assert values(taken(changes, 10)) == list(range(1, 11))
        assert len(slow.first(1)) == 1
        go_on.set()
        assert values(slow.first(10)) == list(range(1, 11))

    def test_closing_delivers_what_has_arrived_and_no_more(self, ctx: Context, provider: StateProvider) -> None:
        calls, other = Calls(), Calls()
        with ctx.watch("x", on_change=calls) as subscription, ctx.watch("x", on_change=other):
            ctx["x"] = 1
            other.first(1)
            subscription.close()
            assert values(calls.changes) == [1]
            ctx["x"] = 2
            other.first(2)
        assert values(calls.changes) == [1]
        assert subscription.ended
        assert subscription.error is None

    def test_closing_the_context_delivers_what_waits(self, provider: StateProvider) -> None:
        calls, seen = Calls(), Calls()
        with Context(None, provider) as ctx:
            ctx.define("x", 0)
            ctx.watch("x", on_change=calls, debounce_s=1000)
            ctx.watch("x", on_change=seen)
            ctx["x"] = 1
            ctx["x"] = 2
            seen.first(2)
        assert [(change.old, change.value, change.count) for change in calls.changes] == [(0, 2, 2)]

    def test_one_may_write_watch_and_close(self, ctx: Context) -> None:
        def act(change: Change[Any]) -> None:
            if change.value == 2:
                subscription.close()
            ctx["y"] = f"{change.value}"

        subscription = ctx.watch("x", on_change=act)
        with ctx.watch("y") as changes:
            for value in (1, 2, 3):
                ctx["x"] = value
            assert values(taken(changes, 2)) == ["1", "2"]
            ctx["y"] = "end"
            assert values(taken(changes, 1)) == ["end"]

    def test_the_end_of_the_session_ends_it(self, ctx: Context) -> None:
        calls = Calls()
        ctx.watch("x", on_change=calls, throttle_s=1000)
        for value in (1, 2, 3):
            ctx["x"] = value
        ctx.end()
        assert values(calls.first(2)) == [1, 3]


class TestTime:
    """With a clock that only the test moves."""

    def take(self, ctx: Context, changes: Changes[Any], pulled: list[int], value: int) -> list[Change[Any]]:
        """Write a value, wait until it has been pulled, and return what is delivered by then."""
        ctx["x"] = value
        found = []
        while value not in pulled:
            changes._news.is_there.wait(DEADLINE_S)
            while (change := changes.next(0)) is not None:
                found.append(change)
        return found

    def test_debounce(self, ctx: Context) -> None:
        pulled: list[int] = []
        with freeze_time() as clock, ctx.watch("x", debounce_s=10, filter=noting(pulled)) as changes:
            for value in (1, 2, 3):
                assert self.take(ctx, changes, pulled, value) == []
                clock.tick(timedelta(seconds=9))
            assert changes.next(0) is None
            assert changes.position < ctx.history("x")[2].commit, "what waits has not been delivered"
            clock.tick(timedelta(seconds=1))
            change = changes.next(0)
            assert change is not None
            assert (change.old, change.value, change.count) == (0, 3, 3)
            assert changes.position == change.commit

    def test_throttle(self, ctx: Context) -> None:
        pulled: list[int] = []
        with freeze_time() as clock, ctx.watch("x", throttle_s=10, filter=noting(pulled)) as changes:
            found = []
            for value in range(1, 31):
                found += values(self.take(ctx, changes, pulled, value))
                clock.tick(timedelta(seconds=1))
            clock.tick(timedelta(seconds=10))
            change = changes.next(0)
            assert change is not None
            assert change.value == 30
            assert found == [1, 11, 21]


def noting(pulled: list[int]) -> Callable[[Change[Any]], object]:
    """A filter that keeps everything, and notes the values."""

    def keep(change: Change[Any]) -> bool:
        pulled.append(change.value)
        return True

    return keep


class Profile(BaseModel):
    name: str


def test_values_are_read_as_their_models() -> None:
    with Context() as ctx:
        ctx.define("profile", Profile(name="Ada"))
        with ctx.watch("profile") as changes:
            ctx["profile"] = Profile(name="Bob")
            (change,) = taken(changes, 1)
    assert (change.old, change.value) == (Profile(name="Ada"), Profile(name="Bob"))


@tool
def twice(ctx: ToolContext) -> None:
    """Write two variables."""
    ctx["x"] = 1
    ctx["x"] = 2
    ctx["y"] = "2"


def test_the_execution_of_a_tool_is_one_commit(tmp_path: Path) -> None:
    with Context(backend=tmp_path / "tools.db", tools=[twice]) as ctx:
        ctx.define("x", 0)
        ctx.define("y", "")
        with ctx.watch() as changes:
            ctx.call(twice)
            found = taken(changes, 3)
    assert len({change.commit for change in found}) == 1
    (execution_id,) = {change.execution_id for change in found}
    assert execution_id is not None
    assert [(change.name, change.old, change.value) for change in found] == [("x", 0, 1), ("x", 1, 2), ("y", "", "2")]


def test_closing_the_state_ends_an_iteration_with_an_error() -> None:
    state = LocalState()
    ctx = Context(None, state)
    ctx.define("x", 0)
    changes = ctx.watch("x")
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(list, changes)
        state.close()
        assert isinstance(waiting.exception(DEADLINE_S), EngineClosedError)
    ctx.close()


class TestMoves:
    """Watches go on when their context moves to another backend."""

    def test_nothing_is_missed_and_nothing_repeated(self, tmp_path: Path) -> None:
        path = tmp_path / "target.db"
        with Context("other", path) as other:
            # So that commits have other numbers there.
            other.define("z", 0)
        ctx = Context("moves")
        ctx.define("x", 0)
        calls, slow_calls, late_calls = Calls(), Calls(), Calls()
        changes, behind, paced = ctx.watch("x"), ctx.watch("x"), ctx.watch("x", debounce_s=1000)
        closed = ctx.watch("x")
        ctx.watch("x", on_change=calls)
        ctx.watch("x", on_change=slow_calls, throttle_s=1000)
        for value in (1, 2, 3):
            ctx["x"] = value
        assert values(taken(changes, 2)) == [1, 2]
        assert values(taken(closed, 1)) == [1]
        closed.close()
        calls.first(3)
        assert paced.next(0) is None
        ctx.ensure_persistent(path)
        assert ctx.backend.kind == "embedded"
        # The numbers of commits are those of the backend that the context is on.
        for after, rest in ((closed.position, [2, 3]), (changes.position, [3]), (behind.position, [1, 2, 3])):
            with ctx.watch("x", after=after) as again:
                assert values(taken(again, len(rest))) == rest
                assert again.next(0) is None
        ctx["x"] = 4
        calls.first(4)
        ctx.watch("x", on_change=late_calls)
        ctx["x"] = 5
        assert values(taken(changes, 3)) == [3, 4, 5]
        assert values(calls.first(5)) == [1, 2, 3, 4, 5]
        assert values(late_calls.first(1)) == [5]
        assert changes.position == ctx.history("x", 1)[0].commit
        ctx.end()
        assert values(list(behind)) == [1, 2, 3, 4, 5], "all of it, although it has not been read since"
        assert [(change.old, change.value, change.count) for change in paced] == [(0, 5, 5)]
        assert values(slow_calls.first(2)) == [1, 5]
        assert list(changes) == []
        ctx.close()

    def test_a_filter_that_uses_the_context_does_not_hold_up_a_move(self, tmp_path: Path) -> None:
        inside, may_go_on = threading.Event(), threading.Event()

        def keep(change: Change[Any]) -> bool:
            if change.value == 1:
                inside.set()
                may_go_on.wait(DEADLINE_S)
            return bool(ctx["x"] >= change.value)

        with Context("moves") as ctx, ThreadPoolExecutor(2) as threads:
            ctx.define("x", 0)
            changes = ctx.watch("x", filter=keep)
            ctx["x"] = 1
            taking = threads.submit(changes.next, DEADLINE_S)
            assert inside.wait(DEADLINE_S)
            moving = threads.submit(ctx.ensure_persistent, tmp_path / "target.db")
            while not ctx._backend.gate.held and not moving.done():
                threading.Event().wait(0.001)
            may_go_on.set()
            moving.result(DEADLINE_S)
            change = taking.result(DEADLINE_S)
            assert change is not None
            assert change.value == 1
            assert changes.position == ctx.history("x", 1)[0].commit
            ctx["x"] = 2
            assert values(taken(changes, 1)) == [2]

    def test_to_a_server(self, tmp_path: Path) -> None:
        calls = Calls()
        with ServedDatabase(tmp_path / "served.db") as served, Context("moves") as ctx:
            ctx.define("x", 0)
            changes, paced = ctx.watch("x"), ctx.watch("x", debounce_s=1000)
            ctx.watch("x", on_change=calls)
            ctx["x"] = 1
            calls.first(1)
            ctx.ensure_bridged(served.url)
            assert ctx.backend.kind == "bridged"
            ctx["x"] = 2
            assert values(taken(changes, 2)) == values(calls.first(2)) == [1, 2]
            ctx.end()
            assert values(list(paced)) == [2]
            assert list(changes) == []

    def test_one_who_waits_is_not_disturbed(self, tmp_path: Path) -> None:
        async def test() -> None:
            async with Context.aopen() as ctx:
                await ctx.define.aio("x", 0)
                async with ctx.watch("x") as changes:
                    step = asyncio.ensure_future(anext(changes))
                    waiting = asyncio.ensure_future(ctx.wait_for.aio("x", lambda value: value == 2))
                    await asyncio.sleep(0)
                    await ctx.ensure_persistent.aio(tmp_path / "target.db")
                    await ctx.set.aio("x", 1)
                    assert (await step).value == 1
                    await ctx.set.aio("x", 2)
                    assert await waiting == 2

        asyncio.run(asyncio.wait_for(test(), DEADLINE_S))
