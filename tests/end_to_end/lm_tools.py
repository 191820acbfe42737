"""Tools that are DSPy programs, for `serve --tools tests.end_to_end.lm_tools`. Their LM gives prepared answers."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import dspy
from dspy.utils import DummyLM

from dspex_persist import ToolContext, tool
from tests.end_to_end.keys import SECRET
from tests.lms import Engine, lm_on


def lm_of(*answers: str) -> Any:
    """An LM that gives these answers, with an API key that must stay secret."""
    return DummyLM([{"answer": answer} for answer in answers]).copy(api_key=SECRET, temperature=0.3)


class Qa(dspy.Signature):  # type: ignore[misc]
    """Answer in one word."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


qa = dspy.Predict(Qa)


@tool(record_lm=True)
def remember(ctx: ToolContext, question: str, name: str) -> str:
    """Ask, and keep how long the answer is."""
    with dspy.context(lm=lm_of("blue")):
        answer = str(qa(question=question).answer)
    ctx[name] = len(answer)
    return answer


@tool(record_lm=True)
async def remember_later(ctx: ToolContext, question: str) -> str:
    """The same, asynchronously."""
    with dspy.context(lm=lm_of("green")):
        return str((await qa.acall(question=question)).answer)


@tool(record_lm=True)
def each(ctx: ToolContext, questions: list[str]) -> Iterator[str]:
    """An answer at a time."""
    with dspy.context(lm=lm_of(*questions)):
        for question in questions:
            yield str(qa(question=question).answer)


@tool(record_lm=True)
async def each_later(ctx: ToolContext, questions: list[str]) -> AsyncIterator[str]:
    """The same, asynchronously."""
    lm = lm_of(*questions)
    for question in questions:
        yield str((await qa.acall(question=question, lm=lm)).answer)


@tool
def ask(ctx: ToolContext, question: str) -> str:
    """Ask, without `record_lm`."""
    with dspy.context(lm=lm_of("red")):
        return str(qa(question=question).answer)


@tool(record_lm=True)
def delegate(ctx: ToolContext, question: str) -> str:
    """Ask, have another tool ask, ask again."""
    with dspy.context(lm=lm_of("one", "two")):
        first = qa(question=question).answer
        between = ctx.call("ask", question=question)
        return f"{first} {between} {qa(question=question).answer}"


@tool(record_lm=True)
def in_threads(ctx: ToolContext, questions: list[str]) -> int:
    """Ask all at once, on DSPy's own threads."""
    with dspy.context(lm=lm_of(*questions)):
        jobs = [(qa, {"question": question}) for question in questions]
        return len(dspy.Parallel(num_threads=2, disable_progress_bar=True)(jobs))


@tool(record_lm=True)
def fail(ctx: ToolContext) -> None:
    """Ask a server that is not there."""
    lm = dspy.LM("openai/gpt-4o-mini", api_key=SECRET, api_base="http://127.0.0.1:9/v1", num_retries=0, cache=False)
    lm("hello")


@tool(record_lm=True)
def chatter(ctx: ToolContext, size: int) -> None:
    """Ask something long."""
    with dspy.context(lm=lm_of("blue")):
        qa(question="x" * size)


@tool(record_lm=True, max_tokens=20)
def spend(ctx: ToolContext, times: int) -> int:
    """Use five tokens each time."""
    lm = lm_on(Engine())
    for number in range(times):
        lm(f"{number}")
    return times


@tool(record_lm=True)
async def spend_later(ctx: ToolContext) -> str:
    """Use five tokens asynchronously, and five in the old way."""
    lm = lm_on(Engine())
    return str((await lm.acall("later"))[0]) + str(lm("at once")[0])
