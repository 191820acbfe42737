"""`ctx.recording()`: LM calls of code that is no tool, in the journal."""

import asyncio
import functools
import gc
import json
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import Context, ToolContext, tool
from dspex_persist.extras import how_to_install
from dspex_persist.state import errors
from dspex_persist.state.abilities import Recordable
from tests.deadline import within
from tests.late import Late
from tests.lms import Engine, ask, dspy, dummy, lm15, lm_calls, lm_on

Ends = dict[str, dict[str, Any]]
KEY, TOKEN, ADDRESS = "sk-secret-1", "token-of-a-header", "https://me:hunter22@host.example/v1"
ours = Late("dspex_persist.dspy")


@tool(record_lm=True)
def asks(ctx: ToolContext) -> str:
    """Ask, and record it."""
    return ask("by a tool")


@tool
def asks_plainly(ctx: ToolContext) -> str:
    """Ask."""
    return ask("by a plain tool")


@tool
async def asks_later(ctx: ToolContext) -> str:
    """Ask asynchronously."""
    return str((await dspy.Predict("question -> answer").acall(question="by an async tool")).answer)


@tool(record_lm=True)
def asks_in_recording(ctx: ToolContext) -> str:
    """Record in a tool that records."""
    with Context("other") as other, other.recording() as recording:
        ask("in a tool")
        return recording.execution_id


@pytest.fixture
def ctx() -> Iterator[Context]:
    with (
        Context("s", tools=[asks, asks_plainly, asks_later, asks_in_recording, asks_a_bound_program]) as ctx,
        dspy.context(lm=dummy(*"abcdefghij")),
    ):
        ctx["x"] = 0
        yield ctx


def journal(ctx: Context) -> tuple[Ends, Ends]:
    """The beginnings and the ends of executions, by id."""
    _, commits = Recordable.of(ctx.backend.provider).record(ctx.session_id)
    bodies = [event.body for commit in commits for event in commit.events if "execution_id" in event.body]
    begun = {body["execution_id"]: body for body in bodies if "tool" in body}
    return begun, {body["execution_id"]: body for body in bodies if "recorded" in body}


def calls_in(ctx: Context, *execution_ids: str) -> list[dict[str, Any]]:
    ends = journal(ctx)[1]
    found = [call for each in execution_ids for call in ends[each]["recorded"].get("lm", [])]
    return sorted(found, key=lambda call: call["ordinal"])


def questions(ctx: Context, *execution_ids: str) -> list[str]:
    return [call["request"]["messages"][-1]["content"].split("\n")[1] for call in calls_in(ctx, *execution_ids)]


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + within(20)
    while not reached():
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.005)


def test_the_calls_of_a_block_are_one_execution_that_writes_nothing(ctx: Context) -> None:
    before = ctx.history("x")[0].version
    with ctx.recording("evaluate", metadata={"run": "7"}, reason="to see", actor="ada") as recording:
        ask("one")
        ask("two")
    ask("three")
    begun, ended = journal(ctx)
    ((execution_id, beginning),) = begun.items()
    assert (recording.execution_id, recording.execution_ids) == (execution_id, (execution_id,))
    assert (beginning["tool"], beginning["metadata"]["run"]) == ("evaluate", "7")
    end = ended[execution_id]
    assert (end["status"], end["writes"], end["reads"]) == ("committed", [], {})
    assert questions(ctx, execution_id) == ["one", "two"]
    assert [call["concurrent"] for call in calls_in(ctx, execution_id)] == [False, False]
    assert ctx.history("x")[0].version == before


def test_an_asynchronous_block(ctx: Context) -> None:
    qa = dspy.Predict("question -> answer")

    async def program() -> str:
        async with ctx.recording() as recording:
            await qa.acall(question="one")
            await asyncio.gather(qa.acall(question="two"), qa.acall(question="three"))
        await qa.acall(question="four")
        return recording.execution_id

    execution_id = asyncio.run(program())
    assert questions(ctx, execution_id) == ["one", "two", "three"]
    assert [call["concurrent"] for call in calls_in(ctx, execution_id)] == [False, True, True]
    assert journal(ctx)[0][execution_id]["tool"] == "recording"


def test_tasks_at_the_same_time_have_recordings_of_their_own(ctx: Context) -> None:
    qa = dspy.Predict("question -> answer")

    async def answer(question: str) -> str:
        async with ctx.recording() as recording:
            await asyncio.sleep(0)
            await qa.acall(question=question)
            await asyncio.sleep(0)
            await qa.acall(question=f"{question} again")
        return recording.execution_id

    async def program() -> list[str]:
        return await asyncio.gather(*map(answer, "abc"))

    found = [questions(ctx, each) for each in asyncio.run(program())]
    assert found == [[each, f"{each} again"] for each in "abc"]


def test_streams_are_recorded(ctx: Context) -> None:
    program = dspy.streamify(dspy.Predict("question -> answer"))

    async def consume() -> str:
        async with ctx.recording() as recording:
            async for _ in program(question="streamed"):
                pass
        return recording.execution_id

    assert questions(ctx, asyncio.run(consume())) == ["streamed"]


def test_calls_in_threads_belong_to_the_block_that_started_them(ctx: Context) -> None:
    with ctx.recording() as recording:
        dspy.Parallel(num_threads=2, disable_progress_bar=True)(
            [(dspy.Predict("question -> answer"), {"question": each}) for each in "ab"]
        )
        with ThreadPoolExecutor(1) as pool:
            pool.submit(dspy.settings.lm, "c").result()
    calls = calls_in(ctx, recording.execution_id)
    assert [call["ordinal"] for call in calls] == [0, 1, 2]
    assert all(call["concurrent"] for call in calls)


@pytest.mark.parametrize("own_run", [False, True])
def test_what_a_thread_was_given_goes_with_it(ctx: Context, own_run: bool) -> None:
    """Not only with the next garbage collection."""
    given, calls = lm_on(Engine()), list[str]()
    with ctx.recording() as recording:
        thread = threading.Thread(target=calls.append, args=(given,))
        if own_run:
            vars(thread)["run"] = functools.partial(given, "a")
        gc.disable()
        try:
            thread.start()
            thread.join()
            ended, kept = weakref.ref(thread), weakref.ref(given)
            del thread, given
            calls.clear()
            assert (ended(), kept()) == (None, None)
        finally:
            gc.enable()
    assert len(calls_in(ctx, recording.execution_id)) == own_run


def test_a_call_that_ends_after_the_block_is_not_recorded_and_answers(ctx: Context) -> None:
    reached, go = threading.Event(), threading.Event()

    class Slow(Engine):
        def complete(self, request: Any) -> Any:
            reached.set()
            assert go.wait(within(20))
            return super().complete(request)

    with ThreadPoolExecutor(1) as pool:
        with ctx.recording() as recording:
            late = pool.submit(lm_on(Slow()), "late")
            assert reached.wait(within(20))
        go.set()
        assert late.result() == ["LATE"]
    assert calls_in(ctx, recording.execution_id) == []


def test_the_innermost_recording_has_the_calls(ctx: Context) -> None:
    with ctx.recording("outer") as outer:
        ask("one")
        with ctx.recording("inner") as inner:
            ask("two")
        ask("three")
        with pytest.raises(errors.InvalidArgumentError, match="each block needs a new one"):
            inner.__enter__()
    assert questions(ctx, outer.execution_id) == ["one", "three"]
    assert questions(ctx, inner.execution_id) == ["two"]


def test_the_calls_of_a_transaction_are_in_the_transaction(ctx: Context) -> None:
    with ctx.transaction() as unrecorded:
        ask("unrecorded")
    with ctx.recording() as recording:
        ask("before")
        with ctx.transaction() as tx:
            tx["x"] = 1
            ask("within")
            with ctx.recording() as nested:
                ask("nested")
            ask("again")
        ask("after")
    with ctx.transaction() as other, ctx.recording() as third:
        ask("third")
    assert (nested.execution_id, third.execution_id) == (tx.execution_id, other.execution_id)
    assert questions(ctx, unrecorded.execution_id) == []
    assert questions(ctx, recording.execution_id) == ["before", "after"]
    assert questions(ctx, tx.execution_id) == ["within", "nested", "again"]
    assert [call["ordinal"] for call in calls_in(ctx, tx.execution_id)] == [0, 1, 2]
    assert questions(ctx, other.execution_id) == ["third"]

    async def program() -> tuple[str, str]:
        qa = dspy.Predict("question -> answer")
        async with ctx.recording() as recording:
            async with ctx.transaction() as tx:
                await qa.acall(question="async")
            await qa.acall(question="async after")
        return recording.execution_id, tx.execution_id

    outside, inside = asyncio.run(program())
    assert (questions(ctx, outside), questions(ctx, inside)) == (["async after"], ["async"])


def test_a_block_that_fails_keeps_its_calls(ctx: Context) -> None:
    with pytest.raises(ZeroDivisionError), ctx.recording() as recording:  # noqa: PT012
        ask("one")
        _ = 1 // 0
    end = journal(ctx)[1][recording.execution_id]
    assert (end["status"], end["failure"]["type"]) == ("failed", "ZeroDivisionError")
    assert questions(ctx, recording.execution_id) == ["one"]


@tool
def asks_a_bound_program(ctx: ToolContext) -> None:
    """Ask by a program that is bound to the tool's variables."""
    ours.bind(dspy.Predict("question -> answer"), ctx, temperature="warmth")(question="x")


@pytest.mark.parametrize("ends", ["recording", "asyncio", "transaction", "asks", "asks_a_bound_program"])
def test_keys_are_removed_from_what_an_execution_failed_with(ends: str, ctx: Context) -> None:
    ctx["warmth"] = 0.5
    said = f"refused {KEY}, {TOKEN} and {ADDRESS}"
    lm = lm_on(Engine(error=lm15.LM15Error(said)))
    lm.kwargs |= {"api_key": KEY, "extra_headers": {"Authorization": f"Bearer {TOKEN}"}, "api_base": ADDRESS}
    before = set(journal(ctx)[1])

    def fail() -> None:
        try:
            ask("x")
        except dspy.LMError as error:
            # What a program makes of an error quotes it, too.
            raise RuntimeError(f"no answer: {error}") from None

    async def fail_later() -> None:
        async with ctx.recording():
            await dspy.Predict("question -> answer").acall(question="x")

    def in_transaction() -> None:
        with ctx.recording(), ctx.transaction():
            fail()

    def in_recording() -> None:
        with ctx.recording():
            fail()

    blocks: dict[str, Callable[[], object]] = {
        "recording": in_recording,
        "asyncio": lambda: asyncio.run(fail_later()),
        "transaction": in_transaction,
    }
    fails = blocks.get(ends, lambda: ctx.call(ends))
    with dspy.context(lm=lm), pytest.raises((RuntimeError, dspy.LMError, errors.ToolFailedError)):
        fails()
    failed = [end for name, end in journal(ctx)[1].items() if name not in before]
    assert failed
    for end in failed:
        text = json.dumps(end)
        assert "refused ***" in text
        assert not [secret for secret in (KEY, TOKEN, ADDRESS, "hunter22") if secret in text]


def test_tools_that_a_block_calls_record_their_own(ctx: Context) -> None:
    with ctx.recording() as recording:
        ctx.call(asks)
        ctx.call(asks_plainly)
        ctx.call(asks_later)
        asyncio.run(ctx.call.aio(asks_later))
        ask("own")
    ctx.call(asks_plainly)
    begun = journal(ctx)[0]
    by_tool = [(body["tool"], questions(ctx, each)) for each, body in begun.items()]
    assert by_tool == [
        ("recording", ["own"]),
        ("asks", ["by a tool"]),
        ("asks_plainly", ["by a plain tool"]),
        ("asks_later", ["by an async tool"]),
        ("asks_later", ["by an async tool"]),
        ("asks_plainly", []),
    ]
    assert next(iter(begun)) == recording.execution_id


def test_in_a_tool_that_records_its_own_recording_stays(ctx: Context) -> None:
    execution_id = ctx.call(asks_in_recording)
    ((known, body),) = journal(ctx)[0].items()
    assert (known, body["tool"]) == (execution_id, "asks_in_recording")
    assert questions(ctx, execution_id) == ["in a tool"]


def test_a_playback_in_a_recording(ctx: Context) -> None:
    with ctx.recording() as first:
        ask("one")
    with dspy.context(lm=None), ctx.recording() as second, lm_calls.playing(calls_in(ctx, first.execution_id)):
        assert ask("one") == "a"
    assert [call["cached"] for call in calls_in(ctx, second.execution_id)] == [True]


def test_recorded_calls_can_be_played(ctx: Context) -> None:
    with ctx.recording() as recording:
        answers = [ask("one"), ask("two")]
    with dspy.context(lm=None), lm_calls.playing(calls_in(ctx, recording.execution_id)) as playback:
        assert [ask("one"), ask("two")] == answers
    assert playback.divergences == []


def test_a_recording_that_is_too_long_for_one_execution_goes_on_in_others() -> None:
    from dspex_persist.state.limits import Limits

    with (
        Context("s", limits=Limits(journal_size_bytes=4_000)) as ctx,
        dspy.context(lm=dummy(*"abcdef")),
        ctx.recording() as recording,
    ):
        for number in range(6):
            ask(f"{number}")
    with (
        Context("t", limits=Limits(journal_size_bytes=4_000)) as small,
        small.recording(),
        dspy.context(lm=dummy("a")),
        pytest.raises(errors.LimitExceededError, match="journal_size_bytes"),
    ):
        ask("x" * 5_000)
    assert len(recording.execution_ids) == len(set(recording.execution_ids)) > 1


def test_parts_know_each_other(tmp_path: Path) -> None:
    with Context("s", tmp_path / "s.db") as ctx, dspy.context(lm=dummy(*"abc")):
        with ctx.recording(keep_after_s=0.01) as recording:
            ask("one")
            # As soon as the first part is in the file, it survives the end of this process.
            until(lambda: len(journal(ctx)[1]) == 1)
            assert questions(ctx, recording.execution_id) == ["one"]
            ask("two")
            ask("three")
        begun = journal(ctx)[0]
        about = [body["metadata"] for body in begun.values()]
        assert [each["dspex.part"] for each in about[:2]] == ["1", "2"]
        assert {each["dspex.recording"] for each in about} == {recording.id}
        assert tuple(begun) == recording.execution_ids
        assert questions(ctx, *recording.execution_ids) == ["one", "two", "three"]


def test_a_recording_goes_along_when_its_session_moves(tmp_path: Path) -> None:
    with Context("s") as ctx, dspy.context(lm=dummy(*"abc")):
        with ctx.recording() as recording:
            ask("one")
            ctx.ensure_persistent(tmp_path / "s.db")
            ask("two")
        assert questions(ctx, *recording.execution_ids) == ["one", "two"]
        assert len(recording.execution_ids) == 2


def test_what_goes_wrong(ctx: Context) -> None:
    recording = ctx.recording()
    with pytest.raises(errors.InvalidArgumentError, match="it has not begun"):
        _ = recording.execution_id
    for wrong in ({"name": 5}, {"metadata": {"x": 1}}, {"keep_after_s": 0}, {"metadata": {"dspex.x": "y"}}):
        with pytest.raises(errors.InvalidArgumentError), ctx.recording(**wrong):
            pass
    ctx.end()
    with pytest.raises(errors.SessionNotFoundError), ctx.recording():
        pass


def test_the_session_ends_in_the_block(ctx: Context) -> None:
    with pytest.raises(errors.ToolInterruptedError, match="the session, or its server, ended"), ctx.recording():  # noqa: PT012
        ask("one")
        ctx.end()


def test_the_entries_are_json(ctx: Context) -> None:
    with ctx.recording() as recording:
        ask("one")
    json.dumps(calls_in(ctx, recording.execution_id), allow_nan=False)


# --- Bound programs ---


@pytest.fixture
def recording_ctx(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Context]:
    """A context that records what is bound to it, because of its argument or the environment."""
    if request.param == "environment":
        monkeypatch.setenv("DSPEX_PERSIST_RECORD_LM", "true")
        options = {}
    else:
        options = {"record_lm": True}
    with (
        Context("s", tools=[asks_plainly, asks_bound], **options) as ctx,
        dspy.context(lm=dummy(*"abcdefghij")),
    ):
        ctx["temperature"] = 0.3
        yield ctx


@tool
def asks_bound(ctx: ToolContext) -> None:
    """Ask by a program that is bound to a context that records."""
    _bound[0](question="in a tool")


_bound: list[Any] = []


@pytest.mark.parametrize("recording_ctx", ["argument", "environment"], indirect=True)
def test_each_outermost_call_of_a_bound_program_is_recorded(recording_ctx: Context) -> None:
    from dspex_persist.dspy import bind

    ctx = recording_ctx

    class Twice(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.first = dspy.Predict("question -> answer")
            self.second = dspy.ChainOfThought("question -> answer")

        def forward(self, question: str) -> Any:
            self.second(question=f"{question} again")
            return self.first(question=question)

        async def aforward(self, question: str) -> Any:
            return await self.first.acall(question=question)

    program = bind(Twice(), ctx, temperature="temperature")
    with dspy.context(adapter=dspy.ChatAdapter(), lm=dspy.utils.DummyLM([{"answer": "a", "reasoning": "r"}] * 20)):
        program(question="one")
        ctx["temperature"] = 0.9
        asyncio.run(program.acall(question="two"))
        ask("by an unbound program")
        program.batch([dspy.Example(question="b").with_inputs("question")] * 2, disable_progress_bar=True)
        with ctx.recording("mine") as mine:
            program(question="recorded anyway")
        with ctx.transaction() as tx:
            program(question="in a transaction")
        _bound[:] = [program]
        ctx.call(asks_bound)
    begun = journal(ctx)[0]
    assert [(body["tool"], len(calls_in(ctx, each))) for each, body in begun.items()] == [
        ("recording", 2),
        ("recording", 1),
        ("recording", 4),
        ("mine", 2),
        ("transaction", 2),
        ("asks_bound", 0),
    ]
    first, second, *_ = begun
    assert begun[first]["metadata"]["program"].endswith("Twice")
    facts = [[(call["predictor"], call["variables"]) for call in calls_in(ctx, each)] for each in (first, second)]
    assert facts == [
        [("second.predict", {"temperature": 0}), ("first", {"temperature": 0})],
        [("first", {"temperature": 1})],
    ]
    assert questions(ctx, mine.execution_id)[1] == "recorded anyway"
    assert questions(ctx, tx.execution_id)[1] == "in a transaction"


def test_a_context_that_does_not_say_so_records_nothing(ctx: Context) -> None:

    ctx["temperature"] = 0.3
    ours.bind(dspy.Predict("question -> answer"), ctx, temperature="temperature")(question="one")
    assert journal(ctx)[0] == {}


def test_without_dspy_and_with_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    from dspex_persist.cognitive.errors import DspyMissingError
    from dspex_persist.settings import SettingsError

    monkeypatch.setattr("dspex_persist.cognitive.context.find_spec", lambda _: None)
    with pytest.raises(DspyMissingError, match=re.escape(how_to_install("dspy"))):
        Context("s", record_lm=True)
    monkeypatch.setenv("DSPEX_PERSIST_RECORD_LM", "maybe")
    with pytest.raises(SettingsError, match="neither true nor false"):
        Context("s")
