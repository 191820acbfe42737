"""Replays of tools that call language models through DSPy."""

import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dspex_persist import Context, ToolContext, tool
from dspex_persist.replay import Aspect, Recording, ReplayOutcome, replay
from tests.deadline import within
from tests.late import Late
from tests.unit.replays import recorded, session, with_start_value

dspy, ours = Late("dspy"), Late("dspex_persist.dspy")


def qa() -> Any:
    return dspy.Predict("question -> answer")


def ask(question: str, *answers: str) -> str:
    """The answer of a model that knows these."""
    with dspy.context(lm=dspy.utils.DummyLM([{"answer": answer} for answer in answers])):
        return str(qa()(question=question).answer)


@pytest.fixture(scope="module")
def colour() -> Any:
    @tool(record_lm=True)
    def colour(ctx: ToolContext, of: str) -> str:
        """Ask, twice."""
        ctx["answer"] = ask(f"What colour is {of}, {ctx['tone']}?", "blue")
        return ask(f"Is {ctx['answer']} a colour?", "yes")

    return colour


@pytest.fixture(scope="module")
def recording(colour: Any) -> Recording:
    return recorded(colour, {"of": "the sky"}, tone="please", answer="")


def silent_model(*_args: Any, **_kwargs: Any) -> Any:
    raise AssertionError("no model may be called")


def test_a_program_gets_the_recorded_answers(
    colour: Any, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dspy.utils.DummyLM, "forward", silent_model)
    report = replay(recording, [colour])
    assert report.ok, report.describe()
    assert report.count(ReplayOutcome.SAME) == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_streaming_and_asynchronous_tools_get_them_too(is_async: bool) -> None:
    if is_async:

        @tool(record_lm=True)
        async def each(of: list[str]) -> AsyncIterator[str]:
            with dspy.context(lm=dspy.utils.DummyLM([{"answer": name.upper()} for name in of])):
                for name in of:
                    yield str((await qa().acall(question=name)).answer)

        @tool(record_lm=True)
        async def one(of: list[str]) -> str:
            with dspy.context(lm=dspy.utils.DummyLM([{"answer": "one"}])):
                return str((await qa().acall(question=of[0])).answer)

    else:

        @tool(record_lm=True)
        def each(of: list[str]) -> Iterator[str]:
            for name in of:
                yield ask(name, name.upper())

        @tool(record_lm=True)
        def one(of: list[str]) -> str:
            return ask(of[0], "one")

    with session(each, one) as state:
        state.execute_tool("s", "each", {"of": ["a", "b"]})
        state.execute_tool("s", "one", {"of": ["c"]})
        recording = state.recording()
    report = replay(recording, [each, one])
    assert report.ok, report.describe()
    assert report.count(ReplayOutcome.SAME) == 2


def test_another_prompt_is_reported_with_its_diff(recording: Recording) -> None:
    @tool(name="colour", record_lm=True)
    def hue(ctx: ToolContext, of: str) -> str:
        ctx["answer"] = ask(f"What hue is {of}, {ctx['tone']}?", "blue")
        return ask(f"Is {ctx['answer']} a colour?", "yes")

    report = replay(recording, [hue])
    first = report.divergences[0]
    assert first.what is Aspect.LM
    assert "LM call 0 was not recorded" in first.summary
    text = str(first)
    assert "What colour is the sky, please?" in text
    # Reported once, although the error of the execution contains it as well.
    assert report.describe().count("What hue is the sky, please?") == 1
    (error,) = [each for each in report.divergences if each.what is Aspect.ERROR]
    assert "UnexpectedLmCallError: LM call 0 was not recorded" in str(error)


def test_a_changed_prompt_is_told_once_in_a_replay() -> None:
    def version_of(text: str) -> Any:
        @tool(name="colour", record_lm=True)
        def colour(ctx: ToolContext, number: int) -> str:
            return ask(f"{text}\n{number}", "blue")

        return colour

    with Context("s", tools=[version_of("What colour?")]) as ctx:
        for number in range(3):
            ctx.call("colour", number=number)
        header, commits = ctx.backend.provider.record("s")
        recording = Recording(header, tuple(commits))
    report = replay(recording, [version_of("What hue?")])
    assert report.count(ReplayOutcome.DIVERGED) == 3
    assert report.describe().count("+What hue?") == 1
    first, *others = [each for each in report.divergences if each.what is Aspect.LM]
    assert {each.summary.rpartition(" ")[2] for each in others} == {first.execution_id}


def test_another_initial_value_shows_in_the_prompt(colour: Any, recording: Recording) -> None:
    report = replay(with_start_value(recording, "tone", '"now"'), [colour])
    assert report.divergences[0].what is Aspect.LM
    assert "What colour is the sky, now?" in report.describe()


def test_a_missing_call_is_reported(recording: Recording) -> None:
    @tool(name="colour", record_lm=True)
    def once(ctx: ToolContext, of: str) -> str:
        ctx["answer"] = ask(f"What colour is {of}, {ctx['tone']}?", "blue")
        return "yes"

    (divergence,) = replay(recording, [once]).divergences
    assert (divergence.what, divergence.summary) == (Aspect.LM, "recorded LM call 1 was not made")


def test_a_tool_recorded_without_its_calls_reaches_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    @tool
    def unrecorded() -> str:
        return ask("Is it?", "yes")

    recording = recorded(unrecorded)
    monkeypatch.setattr(dspy.utils.DummyLM, "forward", silent_model)
    report = replay(recording, [unrecorded])
    assert [each.what for each in report.divergences] == [Aspect.LM, Aspect.ERROR]


POOL = ThreadPoolExecutor(2)


def in_thread(question: str) -> str:
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(ask(question, question.upper())))
    thread.start()
    thread.join()
    return "".join(answers)


@tool
def delegate(of: str) -> str:
    """Recorded if its caller is, from whichever thread the caller calls it."""
    return in_thread(of)


def test_calls_from_a_tools_own_threads_are_recorded_and_played(monkeypatch: pytest.MonkeyPatch) -> None:
    @tool(record_lm=True)
    def spread(ctx: ToolContext, of: list[str]) -> list[str]:
        """Ask in a pool and in a thread, and let another tool ask in a thread."""
        pooled = list(POOL.map(lambda name: ask(name, name.upper()), of))
        delegated = POOL.submit(ctx.call, "delegate", of=of[0]).result()
        return [*pooled, in_thread(of[-1]), delegated]

    tools = [spread, delegate]
    with session(*tools) as state:
        done = state.execute_tool("s", "spread", {"of": ["a", "b"]})
        assert done.success, done
        recording = state.recording()
    ends = [event.body for commit in recording.commits for event in commit.events if "recorded" in event.body]
    assert sorted(len(body["recorded"]["lm"]) for body in ends) == [1, 3]
    monkeypatch.setattr(dspy.utils.DummyLM, "forward", silent_model)
    report = replay(recording, tools)
    assert report.ok, report.describe()
    assert report.count(ReplayOutcome.SAME) == 2


LATE = """
import sys
import threading

from dspex_persist import tool
from dspex_persist.replay import replay
from tests.unit.replays import recorded

is_recording = True


@tool
def late() -> str:
    if is_recording:
        return "yes"
    from dspy.utils import DummyLM

    answers = []

    def ask():
        try:
            answers.append(DummyLM([{"answer": "yes"}])("hello")[0])
        except Exception as error:
            answers.append(type(error).__name__)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    print(*answers)
    return "yes"


recording = recorded(late)
assert "dspy" not in sys.modules
is_recording = False
print([each.what.value for each in replay(recording, [late]).divergences])
finders = [type(finder).__name__ for finder in sys.meta_path]
assert not [name for name in finders if "Dspy" in name], finders
"""


def test_a_tool_that_imports_dspy_only_when_it_runs_reaches_no_model() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=False, timeout=within(60))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["UnexpectedLmCallError", "['lm']"]


def test_a_live_model_is_called_and_different_answers_are_reported(colour: Any, recording: Recording) -> None:
    assert replay(recording, [colour], live_lm=True).ok

    @tool(name="colour", record_lm=True)
    def green(ctx: ToolContext, of: str) -> str:
        ctx["answer"] = ask(f"What colour is {of}, {ctx['tone']}?", "green")
        return ask("Is blue a colour?", "yes")

    report = replay(recording, [green], live_lm=True)
    assert [each.what for each in report.divergences] == [Aspect.LM, Aspect.WRITES]
    assert "LM call 0 gets another answer than recorded call 0" in report.divergences[0].summary


def test_a_bound_program_reads_what_it_read_in_the_execution() -> None:
    program, lm = qa(), dspy.utils.DummyLM([{"answer": "blue"}])

    @tool(record_lm=True)
    def colour(ctx: ToolContext) -> str:
        with dspy.context(lm=lm):
            return str(program(question="What colour is the sky?").answer)

    with session(colour, temperature=0.3) as state, Context("s", state) as ctx:
        ours.bind(program, ctx, temperature="temperature")
        ctx.call("colour")
        recording = state.recording()
        ctx["temperature"] = 0.9
        report = replay(recording, [colour])
        assert report.ok, report.describe()
        assert report.count(ReplayOutcome.SAME) == 1
