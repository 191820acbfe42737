"""Spans of executions, LM calls and commits, in this process."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState, use_span

from dspex_persist import LocalState, ToolContext, tool
from dspex_persist.cognitive.toolbox import Toolbox
from dspex_persist.infra import tracing
from dspex_persist.otel import OtelTracer, Tracing, TracingError
from dspex_persist.replay import replay
from dspex_persist.state.commands import SetVariable
from dspex_persist.state.errors import ExecutionConflictError
from dspex_persist.state.model import RECORDING
from dspex_persist.state.tools import traced
from dspex_persist.state.tools.session import ToolSession
from dspex_persist.state.values import encode

SESSION, SECRET = "traced", "a-value-that-no-span-has"


class Spans:
    """The spans that this process makes."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = OtelTracer(provider, "1")

    def all(self) -> tuple[ReadableSpan, ...]:
        return cast(tuple[ReadableSpan, ...], self._exporter.get_finished_spans())

    def one(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.all() if span.name == name]
        return found

    def around(self, span: ReadableSpan) -> str:
        parents = [each.name for each in self.all() if span.parent and each.context.span_id == span.parent.span_id]
        return parents[0] if parents else ""


@pytest.fixture
def spans() -> Iterator[Spans]:
    made = Spans()
    tracing.use(made.tracer)
    yield made
    tracing.use(None)


@contextmanager
def state_with(*tools: Any) -> Iterator[LocalState]:
    with LocalState(tools=Toolbox.of(tools)) as state:
        state.initialize_session(SESSION)
        state.register_variable(SESSION, "a", "integer", 0)
        yield state


def facts_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_attempts_are_events_of_one_span(spans: Spans) -> None:
    @tool(retries=1)
    def clash(ctx: ToolContext) -> int:
        before = int(ctx["a"])
        if ctx.attempt == 1:
            threading.Thread(target=state.set_variable, args=(SESSION, "a", 5)).run()
        ctx["a"] = before + 1
        return ctx.attempt

    with state_with(clash) as state:
        done = state.execute_tool(SESSION, "clash", {})
    span = spans.one("execute_tool clash")
    assert facts_of(span)["dspex.execution.attempts"] == done.attempts == 2
    assert facts_of(span)["dspex.execution.id"] == done.execution_id
    (event,) = span.events
    assert (event.name, (event.attributes or {})["dspex.execution.attempt"]) == ("retry", 2)
    assert span.status.is_ok or span.status.is_unset
    begun_and_ended = [each for each in spans.all() if each.name == "commit" and spans.around(each) == span.name]
    assert len(begun_and_ended) == 5  # The fifth is what the code itself has written.


def test_a_call_that_is_refused_says_so(spans: Spans) -> None:
    with state_with(_nothing) as state:
        assert not state.execute_tool(SESSION, "missing", {"word": SECRET}).success
    facts = facts_of(spans.one("execute_tool missing"))
    assert (facts["dspex.execution.status"], facts["error.type"]) == ("refused", "ToolNotFoundError")
    assert "dspex.execution.id" not in facts


@tool
def _nothing() -> None:
    """Do nothing."""


def test_a_tool_that_fails_tells_the_type_and_nothing_else(spans: Spans) -> None:
    @tool
    def outer(ctx: ToolContext, word: str) -> str:
        try:
            ctx.call("inner", word=word)
        except LookupError:
            return "caught"
        return ""

    @tool
    def inner(word: str) -> None:
        raise LookupError(word)

    with state_with(outer, inner) as state:
        assert state.execute_tool(SESSION, "outer", {"word": SECRET}).success
        assert not state.execute_tool(SESSION, "inner", {"word": SECRET}).success
    below, alone = [span for span in spans.all() if span.name == "execute_tool inner"]
    assert (spans.around(below), spans.around(alone)) == ("execute_tool outer", "")
    for span in (below, alone):
        facts = facts_of(span)
        assert (facts["error.type"], facts["dspex.execution.status"]) == ("LookupError", "failed")
        assert (span.status.is_ok, span.status.description) == (False, None)
    assert not any(SECRET in span.to_json() for span in spans.all())


def test_transactions_and_recordings_have_spans(spans: Spans) -> None:
    with state_with(_nothing) as state:
        one = state.begin_transaction(SESSION)
        one.submit(SetVariable(SESSION, "a", encode(1))).result()
        one.commit()
        other = state.begin_transaction(SESSION)
        other.submit(SetVariable(SESSION, "a", encode(2))).result()
        state.set_variable(SESSION, "a", 3)
        with pytest.raises(ExecutionConflictError):
            other.commit()
        state.begin_recording(SESSION, "mine").commit()
    committed, conflicted = [facts_of(span) for span in spans.all() if span.name == "transaction"]
    assert committed["dspex.execution.status"] == "committed"
    assert (conflicted["dspex.execution.status"], conflicted["error.type"]) == ("conflict", "ExecutionConflictError")
    recording = facts_of(spans.one(RECORDING))
    assert (recording["dspex.session.id"], recording["dspex.execution.status"]) == (SESSION, "committed")
    assert not any(name.startswith("gen_ai.tool") for name in recording)


def test_an_lm_call_that_a_client_has_recorded_becomes_a_span(spans: Spans) -> None:
    entry = {
        "ordinal": 0,
        "model": "azure/gpt-4o",
        "request": {"model_type": "text", "messages": [{"role": "user", "content": SECRET}]},
        "at": 1_000_000,
        "latency_us": 250_000,
        "error": {"type": "RateLimitError", "message": SECRET},
        "usage": {"azure/gpt-4o": {"prompt_tokens": 3, "completion_tokens": 4}},
        "cost": 0.5,
    }
    with spans.tracer.span("around", {}):
        session: Any = SimpleNamespace(place=tracing.here())
    traced.recorded(cast(ToolSession, session), entry)
    span = spans.one("text_completion gpt-4o")
    assert spans.around(span) == "around"
    assert ((span.start_time or 0) // 1000, (span.end_time or 0) // 1000) == (1_000_000, 1_250_000)
    assert facts_of(span) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "azure.ai.openai",
        "gen_ai.request.model": "gpt-4o",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "dspex.lm.cost_usd": 0.5,
        "error.type": "RateLimitError",
    }
    assert SECRET not in span.to_json()


@pytest.mark.parametrize(
    ("model", "provider", "name"),
    [
        ("gpt-4o", "unknown", "gpt-4o"),
        ("openai/gpt-4o", "openai", "gpt-4o"),
        ("openrouter/meta/llama", "openrouter", "meta/llama"),
        ("vertex_ai/gemini-pro", "gcp.vertex_ai", "gemini-pro"),
    ],
)
def test_models_are_named_by_provider_and_name(model: str, provider: str, name: str) -> None:
    named, facts = traced.asking(model, "chat")
    assert named == f"chat {name}"
    assert (facts["gen_ai.provider.name"], facts["gen_ai.request.model"]) == (provider, name)


def test_headers_name_the_span_of_any_tracer() -> None:
    assert (tracing.headers(), tracing.ids(), tracing.trace_id()) == ((), None, "")
    state = TraceState([("vendor", "1")])
    span = NonRecordingSpan(SpanContext(0xAB, 0xCD, is_remote=True, trace_flags=TraceFlags(1), trace_state=state))
    with use_span(span):
        assert tracing.headers() == (
            ("traceparent", "00-000000000000000000000000000000ab-00000000000000cd-01"),
            ("tracestate", "vendor=1"),
        )
        assert tracing.ids() == ("000000000000000000000000000000ab", "00000000000000cd")
        # The journal has the ids of traces that this process makes.
        assert tracing.trace_id() == ""


def test_a_place_goes_to_another_process_and_back(spans: Spans) -> None:
    with spans.tracer.span("here", {}):
        headers = tracing.headers()
    place = spans.tracer.sent((("x-other", b"1"), *headers))
    with spans.tracer.span("there", {}, below=place):
        pass
    assert spans.around(spans.one("there")) == "here"
    assert spans.tracer.sent((("traceparent", "nonsense"),)) is None
    assert spans.tracer.sent((("traceparent-bin", b"1"),)) is None


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "must be otlp, console or none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "must be grpc or http/protobuf"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", "needs opentelemetry-exporter-otlp-proto-http"),
    ],
)
def test_what_is_not_there_is_refused(name: str, text: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, text)
    if text == "http/protobuf":
        monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with pytest.raises(TracingError, match=reason):
        Tracing("1", 1.0)


def test_names_of_clients_are_shortened(spans: Spans) -> None:
    with state_with(_nothing) as state:
        state.execute_tool(SESSION, "x" * 10_000, {})
    (span,) = [span for span in spans.all() if span.name.startswith("execute_tool x")]
    assert len(span.name) < 300


def test_a_replay_knows_nothing_of_the_trace(spans: Spans) -> None:
    @tool
    def tell(ctx: ToolContext) -> dict[str, str]:
        return dict(ctx.metadata)

    with state_with(tell) as state:
        done = state.execute_tool(SESSION, "tell", {}, metadata={"user": "ada"})
        recording = state.record(SESSION)
        with state.audit() as audit:
            noted = dict(audit.execution(done.execution_id).metadata)
        tracing.use(None)
        report = replay(recording, Toolbox.of([tell]))
    assert done.result is not None
    assert done.result.json == '{"user":"ada"}'
    assert noted == {"user": "ada", "dspex.trace_id": f"{spans.one('execute_tool tell').context.trace_id:032x}"}
    assert (len(report.executions), list(report.divergences)) == (1, [])
