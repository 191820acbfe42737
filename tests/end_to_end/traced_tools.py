"""Tools whose code makes spans of its own, for servers that make traces."""

import dspy
from dspy.utils import DummyLM
from opentelemetry import trace

from dspex_persist import ToolContext, tool
from tests.end_to_end.keys import ANSWER, PROMPT


class Qa(dspy.Signature):  # type: ignore[misc]
    """Answer in one word."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


@tool(record_lm=True)
def plan(ctx: ToolContext, word: str) -> str:
    """Write, ask a model, and call another tool, in a span of its own."""
    with trace.get_tracer("tools").start_as_current_span("think"):
        ctx["a"] = word
        lm = DummyLM([{"answer": ANSWER}])
        lm.model = "openai/gpt-4o-mini"
        with dspy.context(lm=lm):
            dspy.Predict(Qa)(question=PROMPT)
        ctx.call("step", amount=2)
    return word


@tool
def step(amount: int) -> int:
    """Make a span of its own."""
    with trace.get_tracer("tools").start_as_current_span("inner"):
        return amount


@tool
def refuse(word: str) -> None:
    """Raise an error that quotes an argument."""
    raise LookupError(f"no {word}")
