"""A session whose tools have asked a model: their LM calls are written to the journal as DSPy's hook writes them."""

from pathlib import Path
from typing import Any, Final

import dspex_persist
from dspex_persist import Toolbox, ToolContext, tool
from dspex_persist.state.masking import hash_of

SESSION: Final = "asks"
SECRET: Final = 'sk-\nplanted\t "quoted"'
"""A sensitive value, which a prompt may quote indented or in JSON."""
PIN: Final = 70451993
LONG: Final = " why?" * 400
AT: Final = 1_772_366_400_000_000
"""2026-03-01T12:00:00Z in microseconds."""


def entry(ordinal: int = 0, question: str = "Which colour?", answer: str = "blue", **fields: Any) -> dict[str, Any]:
    """A recorded call; `fields` replace some of it, and those that are None are left out."""
    model = fields.pop("model", "openai/gpt-4o-mini")
    system = fields.pop("system", "Answer in one word.\nBe brief.")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    request = {"model_type": "chat", "messages": messages, "options": {"temperature": 0.3}}
    usage = {model: {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}}
    whole = {
        "ordinal": ordinal,
        "hash": hash_of(model, request),
        "model": model,
        "request": request,
        "lm": {"class": "dspy.clients.lm.LM", "defaults": {"temperature": 0.3}},
        "concurrent": False,
        "at": AT + ordinal * 1_000_000,
        "latency_us": 250_000,
        "cost": 0.0005,
        "cached": False,
        "variables": {"prompt": 0},
        "predictor": "generate.predict",
        "response": {"outputs": [answer], "usage": usage},
    }
    return {name: field for name, field in (whole | fields).items() if field is not None}


FAILED: Final = {"response": None, "error": {"type": "dspy.utils.exceptions.LMTransportError", "message": "no route"}}
HOSTILE: Final = (None, 1, -2.5, True, "x", [], [None, [1], {"prompt_tokens": 1}], {}, {"x": {"y": []}}, 2**70, 10**400)
"""What an import may bring instead of any part of a call."""


@tool
def ask(ctx: ToolContext, question: str, calls: list[Any] | None = None) -> str:
    """Record a call with this question, or these."""
    for each in [entry(question=question)] if calls is None else calls:
        ctx._session.record("lm", each)
    return "blue"


@tool
def ask_twice(ctx: ToolContext, question: str) -> str:
    """Record a call, and have another tool record one."""
    ctx._session.record("lm", entry(question=question, model="anthropic/claude"))
    return str(ctx.call("ask", question=f"{question} Again!"))


def toolbox() -> Toolbox:
    """The tools."""
    tools = Toolbox()
    for each in (ask, ask_twice):
        tools.add(each)
    return tools


def tell(path: Path | str) -> Any:
    """Begin a session with some calls in a database, and return the open provider."""
    state = dspex_persist.connect(path, tools=toolbox())
    context = dspex_persist.Context(SESSION, state)
    context.define("prompt", "Answer in one word.\nBe brief.")
    context.define("key", SECRET, metadata={"sensitive": "true"})
    context.define("pin", PIN, metadata={"sensitive": "true"})
    state.execute_tool(SESSION, "ask", {"question": f"Which colour?{LONG}"})
    state.execute_tool(SESSION, "ask_twice", {"question": "Which size?"})
    quoting = entry(question=f'The key:\n    sk-\n    planted "quoted"; the pin is {PIN:,}.', answer=f"It is {PIN}.")
    calls = [quoting, entry(1, **FAILED), entry(2, cached=True, cost=0.0, response={"outputs": ["red"], "usage": {}})]
    state.execute_tool(SESSION, "ask", {"question": "", "calls": calls})
    context["prompt"] = "Answer in two words.\nBe brief."
    return state
