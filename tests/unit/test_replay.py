"""Replays of sessions recorded in memory: clean ones, and the divergences that each kind of change causes."""

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from freezegun import freeze_time

import dspex_persist
from dspex_persist import ToolContext, clock, tool
from dspex_persist.replay import Aspect, Recording, ReplayOutcome, ReplayReport, load, replay
from dspex_persist.replay.recorded import find_executions
from dspex_persist.replay.tools import exception_like
from dspex_persist.state import commands
from dspex_persist.state.errors import InvalidArgumentError, RecordingError
from dspex_persist.state.model import Failure, Value
from tests.deadline import cpu_s_below, within
from tests.unit.replays import MemoryState, masked, recorded, session, with_start_value


def aspects(report: ReplayReport) -> list[Aspect]:
    return [each.what for each in report.divergences]


def only(report: ReplayReport, what: Aspect) -> str:
    """The text of the only divergence, which has this aspect."""
    assert aspects(report) == [what], report.describe()
    return str(report.divergences[0])


# A session with a bit of everything


@tool
def price(ctx: ToolContext, item: str) -> float:
    """A price that is looked up once."""
    if item == "gold":
        raise LookupError("no price of gold")
    ctx["lookups"] += 1
    return len(item) * 1.5


@tool
def order(ctx: ToolContext, items: list[str]) -> dict[str, Any]:
    """Add up prices."""
    total = 0.0
    for item in items:
        try:
            total += ctx.call(price, item=item)
        except LookupError:
            ctx.log("left out", item=item)
    ctx["total"] = total
    return {"id": str(ctx.uuid()), "luck": ctx.random.random(), "at": ctx.now().isoformat(), "total": total}


@tool
def rearrange(ctx: ToolContext) -> str:
    """Register, delete, read the history, roll back, lock."""
    made = ctx.define("note", "hello", constraints={"max_length": 20}, metadata={"owner": "me"})
    del ctx["old"]
    ctx.define("old", 1)
    ctx["old"] = 2
    ctx.rollback("total", 0)
    versions = [entry.version for entry in ctx.history("total")]
    return f"{made} {versions} {ctx.execution_id} {sorted(ctx)}"


@tool
def progress(ctx: ToolContext, to: int) -> Iterator[int]:
    """Publish while it streams."""
    for number in range(to):
        ctx.publish("progress", number)
        yield ctx["progress"]


@tool
async def later(ctx: ToolContext) -> AsyncIterator[str]:
    """Stream, asynchronously."""
    yield (ctx.now()).isoformat()
    yield str(await ctx.call(price, item="tea"))


@tool(retries=1)
def contested(ctx: ToolContext) -> int:
    """Conflict with others in the first attempt."""
    found: int = ctx["total_items"]
    if ctx.attempt == 1:
        meeting.set()
        assert gone_on.wait(within(10))
    ctx["total_items"] = found + 1
    return ctx.attempt


@tool
def breaks(ctx: ToolContext) -> None:
    """Fail, after a write."""
    ctx["total"] = 1e6
    raise ValueError("it broke")


meeting, gone_on = threading.Event(), threading.Event()
EVERYTHING = (price, order, rearrange, progress, later, contested, breaks)


def live(state: MemoryState) -> None:
    state.execute_tool("s", "order", {"items": ["tea", "gold", "milk"]})
    state.set_variable("s", "total", 7.5)
    state.execute_tool("s", "breaks")
    state.execute_tool("s", "rearrange")
    state.execute_tool("s", "progress", {"to": 3})
    state.execute_tool("s", "later")
    meeting.clear()
    gone_on.clear()
    contest = threading.Thread(target=state.execute_tool, args=("s", "contested"))
    contest.start()
    assert meeting.wait(within(10))
    state.set_variable("s", "total_items", 5)
    gone_on.set()
    contest.join(within(10))
    state.execute_tool("s", "order", {"items": ["bread"]})


@pytest.fixture(scope="module")
def everything() -> Recording:
    with session(*EVERYTHING, lookups=0, total=0.0, old="x", progress=-1, total_items=0) as state:
        live(state)
        return state.recording()


def test_a_session_with_everything_replays_clean(everything: Recording) -> None:
    report = replay(everything, EVERYTHING)
    assert report.ok, report.describe(50)
    assert report.count(ReplayOutcome.SAME) == 12
    assert [(each.tool, each.reason) for each in report.executions if each.outcome is ReplayOutcome.SKIPPED] == [
        ("contested", "it ended as conflict, which depends on other callers")
    ]


def test_a_replay_writes_nothing_and_may_be_repeated(everything: Recording) -> None:
    assert replay(everything, EVERYTHING) == replay(everything, EVERYTHING)


def test_a_replay_runs_in_a_caller_with_an_event_loop(everything: Recording) -> None:
    async def within_a_loop() -> ReplayReport:
        return replay(everything, EVERYTHING)

    assert asyncio.run(within_a_loop()) == replay(everything, EVERYTHING)


def test_the_package_lists_all_its_names_while_a_replay_runs_and_afterwards(everything: Recording) -> None:
    listed: list[list[str]] = []
    before = dir(dspex_persist)
    replay(everything, EVERYTHING, until=9, progress=lambda _done, _in_all: listed.append(dir(dspex_persist)))
    assert all(each == before for each in (*listed, dir(dspex_persist)))


def test_context_variables_of_the_caller_apply_to_its_tools() -> None:
    colour = ContextVar("colour", default="none")

    @tool
    def paint() -> str:
        return colour.get()

    @tool
    async def paint_later() -> str:
        return colour.get()

    with session(paint, paint_later) as state:
        for name in ("paint", "paint_later"):
            state.execute_tool("s", name)
        recording = state.recording()
    token = colour.set("red")
    try:
        report = replay(recording, [paint, paint_later])
    finally:
        colour.reset(token)
    assert [str(each).splitlines()[1:] for each in report.divergences] == 2 * [['-result = "none"', '+result = "red"']]


def test_a_tool_that_hangs_only_in_the_replay_times_out() -> None:
    hanging = threading.Event()

    # Long enough for a busy machine to return without it.
    @tool(timeout_s=0.5)
    def stalls(ctx: ToolContext) -> int:
        if ctx["hang"]:
            hanging.wait(within(10))
        return 1

    with session(stalls, hang=0) as state:
        state.execute_tool("s", "stalls")
        state.execute_tool("s", "stalls")
        recording = with_start_value(state.recording(), "hang", "1")
    try:
        report = replay(recording, [stalls])
    finally:
        hanging.set()
    assert aspects(report) == [Aspect.ERROR, Aspect.ERROR]
    assert "ToolTimedOutError" in report.describe()


def test_ctrl_c_ends_a_replay_whose_tool_hangs() -> None:
    hanging = threading.Event()

    @tool
    def stalls(ctx: ToolContext) -> int:
        if ctx["hang"]:
            os.kill(os.getpid(), signal.SIGINT)
            hanging.wait(within(10))
        return 1

    with session(stalls, hang=0) as state:
        state.execute_tool("s", "stalls")
        recording = with_start_value(state.recording(), "hang", "1")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            replay(recording, [stalls])
    finally:
        signal.signal(signal.SIGINT, before)
        hanging.set()


def test_the_recording_keeps_its_random_numbers_ids_and_times(everything: Recording) -> None:
    @tool(name="order")
    def ordered(ctx: ToolContext, items: list[str]) -> dict[str, Any]:
        total = order(ctx, items)["total"]
        # One draw more than recorded, so that the result differs.
        return {"id": str(ctx.uuid()), "luck": ctx.random.random(), "at": ctx.now().isoformat(), "total": total}

    report = replay(everything, [price, ordered], only_tools=["order"], until=30)
    assert aspects(report) == [Aspect.DRAWS, Aspect.RESULT]
    text = report.describe()
    assert "asks for the time 2 times, recorded are 1" in text
    assert '- "luck"' in text
    assert '+ "luck"' in text


# The divergences that each change causes


@tool
def discount(ctx: ToolContext, percent: float) -> float:
    """Lower the price."""
    ctx["price"] = ctx["price"] * (100 - percent) / 100
    return float(ctx["price"])


@pytest.fixture(scope="module")
def discounted() -> Recording:
    return recorded(discount, {"percent": 20}, price=10.0)


def test_changed_code_writes_and_returns_something_else(discounted: Recording) -> None:
    @tool(name="discount")
    def doubled(ctx: ToolContext, percent: float) -> float:
        ctx["price"] = ctx["price"] * (100 - 2 * percent) / 100
        return float(ctx["price"])

    report = replay(discounted, [doubled])
    assert aspects(report) == [Aspect.RESULT, Aspect.WRITES]
    (execution,) = report.executions
    assert execution.outcome is ReplayOutcome.DIVERGED
    assert execution.divergences == report.divergences
    assert report.describe() == (
        "session s: 2 divergences in 1 execution (1 diverged)\n\n"
        f"{execution.execution_id}: its result is not the recorded one\n-result = 8.0\n+result = 6.0\n\n"
        f"{execution.execution_id}: it writes something else than recorded\n-price v1 = 8.0\n+price v1 = 6.0"
    )


def test_another_initial_value_changes_the_result(discounted: Recording) -> None:
    report = replay(with_start_value(discounted, "price", "20.0"), [discount])
    assert "-price v1 = 8.0\n+price v1 = 16.0" in report.describe()


def test_each_execution_starts_from_the_recorded_state() -> None:
    @tool
    def add(ctx: ToolContext) -> None:
        ctx["n"] += 1

    with session(add, n=0) as state:
        for _ in range(5):
            state.execute_tool("s", "add")
        recording = state.recording()
    report = replay(with_start_value(recording, "n", "7"), [add])
    assert [each.outcome for each in report.executions] == [ReplayOutcome.DIVERGED, *[ReplayOutcome.SAME] * 4]


def test_calls_in_another_order_are_reported() -> None:
    @tool
    def step(ctx: ToolContext, name: str) -> str:
        return name

    @tool
    def walk(ctx: ToolContext) -> None:
        ctx.call(step, name="left")
        ctx.call(step, name="right")

    @tool(name="walk")
    def turned(ctx: ToolContext) -> None:
        ctx.call(step, name="right")
        ctx.call(step, name="left")

    text = only(replay(recorded(walk, {}, step), [turned, step]), Aspect.CALLS)
    assert 'it calls other tools than recorded\n+step(name="right")\n step(name="left")\n-step(name="right")' in text


def test_new_and_missing_calls_are_reported() -> None:
    @tool
    def step(ctx: ToolContext, name: str) -> str:
        return name

    @tool
    def walk(ctx: ToolContext) -> None:
        ctx.call(step, name="left")

    @tool(name="walk")
    def stays(ctx: ToolContext) -> None:
        pass

    with_call, without = recorded(walk, {}, step), recorded(stays)
    report = replay(with_call, [stays, step])
    assert only(report, Aspect.CALLS).endswith('\n-step(name="left")')
    assert [each.reason for each in report.executions] == ["", "it was not called this time"]
    assert only(replay(without, [walk, step]), Aspect.CALLS).endswith('\n+step(name="left")')


def test_another_order_of_writes_is_reported() -> None:
    @tool
    def both(ctx: ToolContext) -> None:
        ctx["a"] = 1
        ctx["b"] = 2

    @tool(name="both")
    def turned(ctx: ToolContext) -> None:
        ctx["b"] = 2
        ctx["a"] = 1

    only(replay(recorded(both, a=0, b=0), [turned]), Aspect.WRITES)


def test_registrations_deletions_and_dependencies_are_compared() -> None:
    def make(limit: int, delete: bool, kind: str) -> Any:
        @tool
        def make(ctx: ToolContext) -> None:
            ctx.define("made", 1, constraints={"max": limit})
            ctx["made"] = 2
            if delete:
                del ctx["old"]

        return make

    recording = recorded(make(5, True, ""), old=1)
    assert replay(recording, [make(5, True, "")]).ok
    text = only(replay(recording, [make(6, True, "")]), Aspect.WRITES)
    assert (
        '-made v0 registered as integer with {"max":5} = 1\n+made v0 registered as integer with {"max":6} = 1' in text
    )
    assert only(replay(recording, [make(5, False, "")]), Aspect.WRITES).endswith("\n-old v1 deleted")


def test_published_values_are_compared() -> None:
    @tool
    def show(ctx: ToolContext, by: int = 1) -> list[int]:
        return [ctx.publish("n", by), ctx.publish("n", 2 * by)]

    @tool(name="show")
    def shows_more(ctx: ToolContext, by: int = 1) -> list[int]:
        return [ctx.publish("n", 1), ctx.publish("n", 3)]

    recording = recorded(show, n=0)
    assert replay(recording, [show]).ok
    assert only(replay(recording, [shows_more]), Aspect.PUBLISHED).endswith("\n n = 1\n-n = 2\n+n = 3")


def test_writes_of_others_before_a_value_was_published_count() -> None:
    @tool
    def show(ctx: ToolContext) -> list[int]:
        first = ctx.publish("n", 1)
        meeting.set()
        assert gone_on.wait(within(10))
        return [first, ctx.publish("n", 2), *(entry.version for entry in ctx.history("n"))]

    meeting.clear()
    gone_on.clear()
    with session(show, n=0) as state:
        shown = threading.Thread(target=state.execute_tool, args=("s", "show"))
        shown.start()
        assert meeting.wait(within(10))
        for number in (7, 8):
            state.set_variable("s", "n", number)
        gone_on.set()
        shown.join(within(10))
        recording = state.recording()
    (execution,) = find_executions(recording.commits)
    assert execution.result == Value("[1,4,4,3,2,1,0]")
    report = replay(recording, [show])
    assert report.ok, report.describe()


def test_a_new_missing_or_different_error_is_reported(discounted: Recording) -> None:
    @tool(name="discount")
    def breaks(ctx: ToolContext, percent: float) -> float:
        ctx["price"] = 1.0
        raise ValueError("no discount")

    @tool(name="discount")
    def breaks_otherwise(ctx: ToolContext, percent: float) -> float:
        raise ValueError("none at all")

    text = only(replay(discounted, [breaks]), Aspect.ERROR)
    assert text.endswith("it fails, and did not when it was recorded\n+ValueError: no discount")
    broken = recorded(breaks, {"percent": 20}, price=10.0)
    assert replay(broken, [breaks]).ok
    assert only(replay(broken, [discount]), Aspect.ERROR).endswith("\n-ValueError: no discount")
    text = only(replay(broken, [breaks_otherwise]), Aspect.ERROR)
    assert text.endswith("\n-ValueError: no discount\n+ValueError: none at all")


def test_a_missing_tool_or_one_with_other_parameters_is_refused(discounted: Recording) -> None:
    @tool(name="discount")
    def renamed(ctx: ToolContext, rate: float) -> float:
        return rate

    @tool
    def discounts(ctx: ToolContext, percent: float) -> float:
        return percent

    assert "no such parameter" in only(replay(discounted, [renamed]), Aspect.ERROR)
    assert "did you mean discounts?" in only(replay(discounted, [discounts]), Aspect.ERROR)


def test_a_tool_that_became_asynchronous_is_the_same(discounted: Recording) -> None:
    @tool(name="discount")
    async def later(ctx: ToolContext, percent: float) -> float:
        return float(discount(ctx, percent))

    assert replay(discounted, [later]).ok


# Missing tools


def test_a_call_of_a_missing_tool_is_answered_from_the_recording() -> None:
    @tool
    def inner(ctx: ToolContext, n: int) -> int:
        ctx.publish("seen", n)
        ctx["n"] = n
        ctx.define("new", n)
        del ctx["old"]
        if n == 3:
            raise LookupError("no 3")
        return n * 2

    @tool
    def outer(ctx: ToolContext) -> list[Any]:
        found: list[Any] = [ctx.call("inner", n=2), ctx["n"], ctx["new"], sorted(ctx)]
        try:
            ctx.call("inner", n=3)
        except LookupError as error:
            found.append(str(error))
        return found

    recording = recorded(outer, {}, inner, n=0, seen=0, old=0)
    report = replay(recording, [outer])
    assert report.ok, report.describe()
    assert [each.outcome for each in report.executions] == [
        ReplayOutcome.SAME,
        ReplayOutcome.SKIPPED,
        ReplayOutcome.SKIPPED,
    ]
    assert report.executions[1].reason == "its code is not here: what it did was taken from the recording"

    @tool(name="outer")
    def calls_once_more(ctx: ToolContext) -> list[Any]:
        found = outer(ctx)
        ctx.call("inner", n=4)
        return found

    report = replay(recording, [calls_once_more])
    assert aspects(report) == [Aspect.CALLS, Aspect.ERROR]
    assert "+inner(n=4)" in report.describe()


# The clock


def test_leases_and_the_time_are_those_of_the_recording() -> None:
    @tool
    def when(ctx: ToolContext) -> list[bool]:
        at = ctx.now()
        return [ctx.info("n").updated_at <= at, datetime.now(at.tzinfo).date() == at.date()]  # noqa: TID251

    @tool
    def locked(ctx: ToolContext) -> None:
        ctx["n"] = 1

    with freeze_time("2020-02-02", tick=True, real_asyncio=True), session(when, locked, n=0) as state:
        state.start_optimization("s", "n", "me")
        state.execute_tool("s", "when")
        state.execute_tool("s", "locked")
        recording = state.recording()
    report = replay(recording, [when, locked])
    assert report.ok, report.describe()
    assert [each.status for each in report.executions] == ["committed", "failed"]


def test_a_clock_frozen_by_a_test_stays_frozen(everything: Recording) -> None:
    with freeze_time("2030-01-01", real_asyncio=True):
        assert replay(everything, EVERYTHING).ok
        assert clock.now() == datetime(2030, 1, 1, tzinfo=UTC)
    assert replay(everything, EVERYTHING, freeze=False).ok


@pytest.mark.parametrize("name", ["LookupError", "ExceptionGroup", "ToolFailedError", "OwnError", "UnicodeDecodeError"])
def test_a_recorded_error_is_raised_again_if_its_class_is_known(name: str) -> None:
    error = exception_like(Failure(name, "it says so"))
    assert (type(error).__name__, str(error)) == (name, "it says so")
    assert isinstance(error, LookupError) == (name == "LookupError")


# What is replayed


def test_ranges_and_names_select_executions(everything: Recording) -> None:
    whole = [each for each in replay(everything, EVERYTHING).executions if each.parent_id is None]
    second, fourth = whole[1], whole[3]

    def between(since: object, until: object) -> list[str]:
        report = replay(everything, EVERYTHING, since=since, until=until)  # type: ignore[arg-type]
        return [each.execution_id for each in report.executions if each.parent_id is None]

    expected = [each.execution_id for each in whole[1:4]]
    assert between(second.execution_id, fourth.execution_id) == expected
    assert between(second.commit, str(fourth.commit)) == expected
    # The number in an id differs between files; the rest does not.
    assert between("exec_9999_" + second.execution_id.rpartition("_")[2], fourth.commit) == expected
    assert {each.tool for each in replay(everything, EVERYTHING, only_tools=["later"]).executions} == {"later", "price"}


def test_an_execution_can_be_named_by_its_number_and_a_called_one_means_its_caller(everything: Recording) -> None:
    whole = replay(everything, EVERYTHING).executions
    first, called = whole[0], whole[1]
    assert called.parent_id == first.execution_id
    for point in (f"exec_{first.commit}", called.execution_id, f"exec_{called.commit}"):
        chosen = replay(everything, EVERYTHING, since=point, until=point).executions
        assert [each for each in chosen if each.parent_id is None] == [first]


@pytest.mark.parametrize(
    ("since", "until", "field", "message"),
    [
        ("99999", "", "since", "there is no commit 99999: session 's' has commits 1 to {last}"),
        ("9" * 5_000, "", "since", "session 's' has commits 1 to {last}"),
        ("", 0, "until", "there is no commit 0: session 's' has commits 1 to {last}"),
        ("exec_1", "", "since", "'exec_1' is not an execution in it; session 's' has commits 1 to {last}"),
        (20, 3, "until", "commit 3 is before commit 20, where the range begins; session 's' has commits 1 to {last}"),
        (1, 2, "since", "no execution began in commits 1 to 2: the first began with commit 7, the last with commit"),
        ("", 2, "until", "no execution began in commits 1 to 2"),
    ],
)
def test_a_range_in_which_nothing_is_replayed_is_refused(
    everything: Recording, since: str | int, until: str | int, field: str, message: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        replay(everything, EVERYTHING, since=since, until=until)
    assert caught.value.field == field
    assert message.format(last=len(everything.commits)) in caught.value.reason


def test_a_tool_that_did_not_run_in_the_range_is_refused(everything: Recording) -> None:
    with pytest.raises(InvalidArgumentError, match="no execution of 'breaks' began in commits 1 to 8"):
        replay(everything, EVERYTHING, until=8, only_tools=["breaks"])


@pytest.mark.parametrize("wrong", [{"since": "noon"}, {"until": "exec_1_none"}, {"only_tools": ["ordr"]}])
def test_selecting_nothing_is_refused(everything: Recording, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        replay(everything, EVERYTHING, **wrong)
    assert caught.value.field in wrong


def test_executions_that_cannot_be_replayed_are_skipped_with_the_reason() -> None:
    @tool(timeout_s=0.05)
    async def slow(ctx: ToolContext) -> None:
        await asyncio.sleep(30)

    @tool
    def hangs(ctx: ToolContext) -> None:
        meeting.set()
        gone_on.wait(within(10))

    meeting.clear()
    gone_on.clear()
    with session(slow, hangs) as state:
        state.execute_tool("s", "slow")
        thread = threading.Thread(target=state.execute_tool, args=("s", "hangs"))
        thread.start()
        assert meeting.wait(within(10))
        recording = state.recording()
        gone_on.set()
        thread.join(within(10))
    report = replay(recording, [slow, hangs])
    assert [(each.tool, each.reason) for each in report.executions] == [
        ("slow", "it ended as timed out, which depends on other callers"),
        ("hangs", "it had not ended when the recording was made"),
    ]
    assert report.ok


def test_a_transaction_of_a_client_is_skipped_with_the_tools_that_it_called() -> None:
    @tool
    def add(ctx: ToolContext) -> None:
        ctx["total"] += 1

    with session(add) as state:
        state.register_variable("s", "total", "integer", 0)
        with state.begin_transaction("s") as transaction:
            transaction.run(commands.ExecuteTool("s", "add"))
            transaction.run(commands.SetVariable("s", "total", Value("5")))
        state.execute_tool("s", "add")
        recording = state.recording()
    report = replay(recording, [add])
    assert [(each.tool, each.outcome, each.reason) for each in report.executions] == [
        *(
            (name, ReplayOutcome.SKIPPED, "it was a transaction of a client, whose code is not among the tools")
            for name in ("transaction", "add")
        ),
        ("add", ReplayOutcome.SAME, ""),
    ]
    assert report.ok


def test_an_execution_that_reads_a_masked_value_is_skipped() -> None:
    @tool
    def read(ctx: ToolContext, name: str) -> str:
        return str(ctx[name])

    @tool
    def read_all(ctx: ToolContext) -> int:
        return len(ctx.list("sec*"))

    @tool
    def announce(ctx: ToolContext) -> None:
        ctx.publish("secret", "z")

    @tool
    def call(ctx: ToolContext) -> None:
        ctx.call("announce")

    with session(read, read_all, announce, call, secret="x", open="y") as state:
        for name in ("secret", "open"):
            state.execute_tool("s", "read", {"name": name})
        for tool_name in ("read_all", "announce", "call"):
            state.execute_tool("s", tool_name)
        recording = masked(state.recording(), "secret")
    report = replay(recording, [read, read_all, announce, call])
    outcomes = [(each.tool, each.outcome) for each in report.executions]
    assert outcomes == [
        ("read", ReplayOutcome.SKIPPED),
        ("read", ReplayOutcome.SAME),
        ("read_all", ReplayOutcome.SKIPPED),
        ("announce", ReplayOutcome.SAME),
        ("call", ReplayOutcome.SAME),
        ("announce", ReplayOutcome.SAME),
    ]
    assert report.executions[0].reason == "it reads a variable whose values were kept out of the recording"
    # The value would be needed in place of the missing tool.
    report = replay(recording, [read, call], only_tools=["call"])
    assert {each.outcome for each in report.executions} == {ReplayOutcome.SKIPPED}
    assert (report.ok, report.checked) == (True, False)
    reason = "it reads a variable whose values were kept out of the recording"
    assert report.headline() == f"session s: nothing was checked in 2 executions (2 skipped): {reason}"


def test_a_session_without_executions_says_that_nothing_was_checked() -> None:
    with session(a=1) as state:
        report = replay(state.recording(), [])
    assert (report.ok, report.checked) == (True, False)
    assert report.headline() == "session s: nothing was checked: it has no executions"


def test_progress_is_reported_for_each_execution(everything: Recording) -> None:
    calls: list[tuple[int, int]] = []
    replay(everything, EVERYTHING, progress=lambda done, in_all: calls.append((done, in_all)))
    assert calls == [(done, 8) for done in range(9)]


def test_a_document_has_everything_as_json(discounted: Recording) -> None:
    report = replay(with_start_value(discounted, "price", "20.0"), [discount])
    document = json.loads(json.dumps(report.document()))
    (execution,) = document["executions"]
    assert document == {
        "format": "dspex-persist replay",
        "version": 1,
        "ok": False,
        "checked": True,
        "session_id": "s",
        "mode": "tools",
        "commits": 4,
        "same": 0,
        "diverged": 1,
        "skipped": 0,
        "executions": [execution],
        "divergences": execution["divergences"],
    }
    assert execution["divergences"][1] == {
        "what": "writes",
        "summary": "it writes something else than recorded",
        "commit": 3,
        "execution_id": execution["execution_id"],
        "diff": ["-price v1 = 8.0", "+price v1 = 16.0"],
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"format": "dspex-persist session", "version": 2, "session_id": "s", "commits": 0}\n', "version 2"),
        ("hello\n", "it is not a recording"),
        ("", "it is not a recording"),
    ],
)
def test_other_files_are_refused_with_a_sentence(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "tape.jsonl"
    path.write_text(content)
    with pytest.raises(RecordingError, match=reason):
        load(path)


def test_a_thousand_executions_take_a_moment() -> None:
    @tool
    def nothing() -> None:
        pass

    with session(nothing) as state:
        for _ in range(1_000):
            state.execute_tool("s", "nothing")
        recording = state.recording()
    with cpu_s_below(5):
        assert replay(recording, [nothing]).count(ReplayOutcome.SAME) == 1_000
