"""Tools for `serve --tools tests.end_to_end.metered_tools`, that end in each way and record calls of models."""

from typing import Any

from dspex_persist import ToolContext, tool
from dspex_persist.state.tools.session import current_session

MODEL = "acme/large"


def recorded(**facts: Any) -> dict[str, Any]:
    """What is recorded of a call of a model."""
    usage = {MODEL: {"prompt_tokens": 100, "completion_tokens": 20}}
    call = {"model": MODEL, "response": {"usage": usage}, "cost": 0.25, "latency_us": 1_500_000, "cached": False}
    return {**call, **facts}


@tool
def ask(ctx: ToolContext, cached: bool = False) -> str:
    """Record a call of a model."""
    session = current_session.get()
    assert session is not None
    session.record("lm", {"model": MODEL, "cached": True} if cached else recorded())
    return "answered"


@tool
def ask_twice(ctx: ToolContext) -> None:
    """Have another tool ask."""
    ctx.call(ask)
    ctx.call(ask, cached=True)


@tool
def fail() -> None:
    """Raise an error."""
    raise ValueError("this is meant to fail")
