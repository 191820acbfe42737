"""Spans of executions and LM calls, by the semantic conventions for generative AI: their names, and what they say.

They have names, ids and counts, never values, arguments, prompts or answers.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any, Final

from dspex_persist.infra import tracing
from dspex_persist.infra.tracing import Attributes, Kind, Tracer
from dspex_persist.state.errors import ToolFailedError
from dspex_persist.state.lm_calls import LmCall, lm_call_of
from dspex_persist.state.model import RECORDING, RECORDING_ID, TRANSACTION, ExecutionStatus, ToolOutcome, Value
from dspex_persist.state.tools.failures import RaisedError, status_of
from dspex_persist.state.tools.requests import ToolRequest
from dspex_persist.state.tools.session import ToolSession

_EXECUTION_ID: Final = "dspex.execution.id"
_STATUS: Final = "dspex.execution.status"
_CALL_ID: Final = "gen_ai.tool.call.id"
# Clients may ask for anything.
_NAME_LENGTH: Final = 255


async def executing(
    tracer: Tracer, execute: Callable[[], Awaitable[ToolOutcome]], request: ToolRequest, *, is_tool: bool
) -> ToolOutcome:
    """Run an execution, from its request to its outcome, in a span.

    Args:
        tracer: Makes the span.
        execute: Runs the execution.
        request: What is executed.
        is_tool: Whether it is a tool, and not a client's transaction or recording.
    """
    name, facts = _tool(request) if is_tool else _block(request)
    with tracer.span(name, facts) as span:
        try:
            outcome = await execute()
        except asyncio.CancelledError:
            span.set({_STATUS: ExecutionStatus.CANCELLED.value})
            raise
        span.set(
            {
                _STATUS: "refused" if outcome.status is None else outcome.status.value,
                "dspex.execution.attempts": outcome.attempts,
                **({} if outcome.commit_sequence is None else {"dspex.commit.sequence": outcome.commit_sequence}),
                **({"dspex.execution.repeated": True} if outcome.repeated else {}),
                **({_EXECUTION_ID: outcome.execution_id} if outcome.execution_id else {}),
                **({_CALL_ID: outcome.execution_id} if outcome.execution_id and is_tool else {}),
            }
        )
        if outcome.error is not None:
            span.fail(kind_of(outcome.error))
    return outcome


async def called(tracer: Tracer, execute: Callable[[], Awaitable[Value]], request: ToolRequest) -> Value:
    """Run a tool that another one calls, in a span."""
    name, facts = _tool(request)
    with tracer.span(name, facts, judges=False) as span:
        try:
            result = await execute()
        except BaseException as error:
            raised = error.error if isinstance(error, RaisedError) else error
            status = status_of(raised) if isinstance(raised, Exception) else ExecutionStatus.CANCELLED
            span.set({_STATUS: status.value})
            # What was raised in a worker is known by its description only.
            span.fail(error.failure.type if isinstance(error, RaisedError) else kind_of(error))
            raise
        # It is committed, or not, with its caller.
        span.set({_STATUS: "returned"})
        return result


def begun(session: ToolSession) -> None:
    """Note in the current span that the execution, or another attempt of it, has begun."""
    tracer = tracing.tracer()
    if tracer is None:
        return
    session.place = tracer.here()
    span, facts = tracer.current, {_EXECUTION_ID: session.execution_id}
    span.set(facts if session.execution.parent is None else {**facts, _CALL_ID: session.execution_id})
    if session.attempt > 1:
        span.event("retry", {**facts, "dspex.execution.attempt": session.attempt})


def kind_of(error: BaseException) -> str:
    """Return the type of an error; for a `ToolFailedError`, the type of what the tool's code raised."""
    return (error.kind if isinstance(error, ToolFailedError) else "") or type(error).__name__


def _tool(request: ToolRequest) -> tuple[str, dict[str, str]]:
    name = request.tool[:_NAME_LENGTH]
    facts = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": name, "gen_ai.tool.type": "function"}
    return f"execute_tool {name}", facts | _session(request)


def _block(request: ToolRequest) -> tuple[str, dict[str, str]]:
    return RECORDING if RECORDING_ID in request.metadata else TRANSACTION, _session(request)


def _session(request: ToolRequest) -> dict[str, str]:
    session_id = request.session_id[:_NAME_LENGTH]
    return {"gen_ai.conversation.id": session_id, "dspex.session.id": session_id}


# LM calls

_PROVIDERS: Final[Mapping[str, str]] = {
    "azure": "azure.ai.openai",
    "azure_ai": "azure.ai.inference",
    "bedrock": "aws.bedrock",
    "gemini": "gcp.gemini",
    "mistral": "mistral_ai",
    "vertex_ai": "gcp.vertex_ai",
    "watsonx": "ibm.watsonx.ai",
    "xai": "x_ai",
}
"""The names that the conventions have for some of LiteLLM's providers; the others have the same name in both."""
_UNKNOWN: Final = "unknown"


def asking(model: str, model_type: str) -> tuple[str, dict[str, str]]:
    """Return the name of the span of an LM call, and its attributes at the beginning.

    Args:
        model: The model, as DSPy names it: "openai/gpt-4o-mini".
        model_type: Its type, as DSPy names it; "text" for completions of plain text.
    """
    model = model[:_NAME_LENGTH]
    provider, _, name = model.rpartition("/") if model.count("/") < 2 else model.partition("/")
    operation = "text_completion" if model_type == "text" else "chat"
    facts = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _PROVIDERS.get(provider, provider) or _UNKNOWN,
        "gen_ai.request.model": name,
    }
    return f"{operation} {name}", facts


def answered(entry: Mapping[str, Any]) -> tuple[Attributes, str | None]:
    """Return the attributes of an LM call that has ended, and the type of its error; None if it has not failed.

    Args:
        entry: The call, as an execution records it.
    """
    return _answered(_without_texts(entry))


def _without_texts(entry: Mapping[str, Any]) -> LmCall:
    response = entry.get("response")
    usage = response.get("usage") if isinstance(response, Mapping) else None
    kept = {name: part for name, part in entry.items() if name not in ("request", "response", "variables")}
    return lm_call_of({**kept, "response": {"usage": usage}})


def _answered(call: LmCall) -> tuple[Attributes, str | None]:
    facts: dict[str, str | int | float | bool] = {
        "gen_ai.usage.input_tokens": call.input_tokens,
        "gen_ai.usage.output_tokens": call.output_tokens,
    }
    if call.cached is not None:
        facts["dspex.lm.cached"] = call.cached
    if call.cost is not None:
        facts["dspex.lm.cost_usd"] = call.cost
    return facts, (call.error_type or _UNKNOWN) if call.failed else None


def recorded(session: ToolSession, entry: Mapping[str, Any]) -> None:
    """Make the span of an LM call that a client has made, and recorded in its transaction or recording."""
    tracer = tracing.tracer()
    if tracer is None or session.place is None:
        return
    call, request = _without_texts(entry), entry.get("request")
    if call.at is None:
        return
    name, asked = asking(call.model, str(request.get("model_type", "")) if isinstance(request, Mapping) else "")
    facts, error_type = _answered(call)
    ended = call.at + timedelta(microseconds=call.latency_us or 0)
    tracer.past(name, {**asked, **facts}, session.place, call.at, ended, kind=Kind.CLIENT, error_type=error_type)
