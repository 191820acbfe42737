"""Traces of a real server, as a collector gets them."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from dspex_persist.infra.process import ProcessFailedError, ServerProcess
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.commands import RegisterTools
from dspex_persist.state.model import RegisteredTool, ToolOutcome, ToolSpec
from tests.collector import Collector, HangingCollector, Received, collecting
from tests.end_to_end.gates import DEADLINE_S
from tests.end_to_end.keys import ANSWER, PROMPT
from tests.end_to_end.old_style import ROOT, STUBS, environment, target_of, wait_until
from tests.end_to_end.telling_worker import telling
from tests.outcomes import result_of

TOOLS = ("--tools", "tests.end_to_end.traced_tools", "--otel")
SESSION, SECRET = "traced", "w0rd-that-is-nobodys"
NOBODY = "http://127.0.0.1:1"
POOL = """
[pools.old]
command = ["{python}", "-m", "tests.end_to_end.telling_worker", "{{port}}"]
size = 1
tools = ["tell"]
env = {{ PYTHONPATH = "{path}" }}
"""


@contextmanager
def serving(folder: Path, *arguments: str, **variables: str) -> Iterator[ServerProcess]:
    argv = [sys.executable, "-m", "dspex_persist", "serve", "--db", str(folder / "traced.db"), *arguments]
    env = environment(**variables)
    with ServerProcess.start(
        [*argv, "--listen", "127.0.0.1:0"], env=env, cwd=folder, ready_timeout_s=DEADLINE_S
    ) as server:
        yield server


@contextmanager
def client_of(server: ServerProcess) -> Iterator[BridgedState]:
    with BridgedState(target_of(server), timeout_s=DEADLINE_S) as state:
        state.initialize_session(SESSION)
        state.register_variable(SESSION, "a", "string", "")
        yield state


def trace_of(span: Received, spans: list[Received]) -> list[str]:
    """The names of the spans around a span, without those of rpcs."""
    by_id = {each.span_id: each for each in spans}
    names = []
    while (parent := by_id.get(span.parent_id)) is not None:
        if "rpc.system" not in parent.attributes:
            names.append(parent.name)
        span = parent
    return names


def one(spans: list[Received], name: str, kind: str = "") -> Received:
    (found,) = [span for span in spans if span.name == name and kind in ("", span.kind)]
    return found


def events_in(server: ServerProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.stderr_tail.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collector_gets_the_same_spans_wherever_the_tools_run(tmp_path: Path, workers: int) -> None:
    (tmp_path / "pools.toml").write_text(POOL.format(python=sys.executable, path=f"{ROOT}:{STUBS}"))
    config = ("--config", str(tmp_path / "pools.toml")) if workers else ()
    with collecting(Collector()) as collector:
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_SERVICE_NAME": "shop"}
        with serving(tmp_path, *TOOLS, "--workers", str(workers), *config, **variables) as server:
            told, done = use(server, tells="tell" if workers else "told")
            # Sent at the end, as the next batch would come in seconds.
            server.terminate(DEADLINE_S)
        spans = collector.spans
    check_tools(spans, done)
    check_places(spans, told)
    assert {span.schema_url for span in spans if span.scope == "dspex-persist"} == {
        "https://opentelemetry.io/schemas/1.37.0"
    }
    assert {span.resource["service.name"] for span in spans} == {"shop"}
    for kept_back in (SECRET, PROMPT, ANSWER):
        assert not any(kept_back.encode() in message for message in collector.raw)
    failed = next(event for event in events_in(server) if event["event"] == "tool failed")
    assert failed["trace_id"] == one(spans, "execute_tool refuse").trace_id


def use(server: ServerProcess, *, tells: str) -> tuple[dict[str, Any], ToolOutcome]:
    """Call tools, in a trace of this program; returns what a worker was told, and an outcome."""
    with client_of(server) as state, telling() as port:
        tool = RegisteredTool(ToolSpec("told"), "worker", f"127.0.0.1:{port}")
        state.run(RegisterTools(SESSION, "worker", (tool,)))
        with TracerProvider().get_tracer("program").start_as_current_span("program") as around:
            done = state.execute_tool(SESSION, "plan", {"word": SECRET})
            told = result_of(state.execute_tool(SESSION, tells, {}))
        assert not state.execute_tool(SESSION, "refuse", {"word": SECRET}).success
        assert result_of(done) == SECRET
        with state.audit() as audit:
            noted = audit.execution(done.execution_id).metadata["dspex.trace_id"]
        assert noted == f"{around.get_span_context().trace_id:032x}"
        return {"program": noted, **told}, done


def check_tools(spans: list[Received], done: ToolOutcome) -> None:
    outer, inner = one(spans, "execute_tool plan"), one(spans, "execute_tool step")
    assert outer.attributes == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "plan",
        "gen_ai.tool.type": "function",
        "gen_ai.tool.call.id": done.execution_id,
        "gen_ai.conversation.id": SESSION,
        "dspex.session.id": SESSION,
        "dspex.execution.id": done.execution_id,
        "dspex.execution.status": "committed",
        "dspex.execution.attempts": 1,
        "dspex.commit.sequence": done.commit_sequence,
    }
    assert (inner.attributes["gen_ai.tool.name"], inner.attributes["dspex.execution.status"]) == ("step", "returned")
    chat = one(spans, "chat gpt-4o-mini")
    assert chat.kind == "client"
    assert chat.attributes["gen_ai.provider.name"] == "openai"
    assert chat.attributes["gen_ai.request.model"] == "gpt-4o-mini"
    assert {"gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"} <= chat.attributes.keys()
    assert trace_of(one(spans, "inner"), spans) == ["execute_tool step", "think", "execute_tool plan"]
    assert trace_of(chat, spans) == ["think", "execute_tool plan"]
    commits = [span for span in spans if span.name == "commit" and span.parent_id == outer.span_id]
    assert [span.attributes["dspex.commit.group_size"] for span in commits] == [1, 1]
    assert max(span.attributes["dspex.commit.last_sequence"] for span in commits) == done.commit_sequence
    refused = one(spans, "execute_tool refuse")
    assert (refused.failed, refused.message, refused.events) == (True, "", [])
    assert (refused.attributes["error.type"], refused.attributes["dspex.execution.status"]) == ("LookupError", "failed")


def check_places(spans: list[Received], told: dict[str, Any]) -> None:
    """The program's trace goes through the server to the worker, by either kind of metadata."""
    by_id = {span.span_id: span for span in spans}
    tool = next(span for span in spans if span.name.startswith("execute_tool t"))
    (client,) = [span for span in spans if span.parent_id == tool.span_id and span.kind == "client"]
    assert told["call"]["traceparent"] == told["request"]["traceparent"] == f"00-{client.trace_id}-{client.span_id}-01"
    server = by_id[tool.parent_id]
    assert server.trace_id == client.trace_id == told["program"]
    assert server.parent_id not in by_id  # It is the program's own span.
    facts = ("rpc.system", "rpc.service", "rpc.method", "rpc.grpc.status_code")
    for span in (client, server):
        assert span.name == "snakepit.bridge.BridgeService/ExecuteTool"
        assert [span.attributes[name] for name in facts] == ["grpc", "snakepit.bridge.BridgeService", "ExecuteTool", 0]
    assert client.attributes["server.address"] == "127.0.0.1"
    # Where there is no such trace, each call begins one.
    assert one(spans, "execute_tool refuse").trace_id != told["program"]


def test_a_server_whose_collector_is_down_says_so_once_and_keeps_working(tmp_path: Path) -> None:
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": NOBODY,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.05",
        "OTEL_BSP_SCHEDULE_DELAY": "20",
    }
    with serving(tmp_path, "--otel", **variables) as server:
        with client_of(server) as state:
            wait_until(lambda: "traces cannot be sent" in server.stderr_tail, "the line")
            for number in range(50):
                state.set_variable(SESSION, "a", str(number))
        server.terminate(DEADLINE_S)
    warnings = [event for event in events_in(server) if event["level"] == "warning"]
    assert [event["event"] for event in warnings] == ["traces cannot be sent"]
    assert "127.0.0.1:1" in warnings[0]["endpoint"]
    assert "UNAVAILABLE" in warnings[0]["reason"]
    assert server.exit_code == 0


def test_a_collector_that_does_not_answer_delays_the_end_for_a_moment_only(tmp_path: Path) -> None:
    with collecting(HangingCollector()) as collector:
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_EXPORTER_OTLP_TIMEOUT": "1000"}
        with serving(tmp_path, "--otel", **variables) as server:
            with client_of(server):
                pass
            server.terminate(DEADLINE_S)
        collector.goes_on.set()
    assert [event["event"] for event in events_in(server)][-1] == "the last traces were not sent in time"
    assert server.exit_code == 0


@pytest.mark.parametrize("disabled", [False, True])
def test_nothing_is_traced_unless_it_is_asked_for(tmp_path: Path, disabled: bool) -> None:
    tools = ("--tools", "tests.end_to_end.pool_tools")
    with collecting(Collector()) as collector:
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
        how = (["--otel"], {"OTEL_SDK_DISABLED": "true"}) if disabled else ([], {})
        with serving(tmp_path, *tools, *how[0], **variables, **how[1]) as server:
            with client_of(server) as state:
                imported = result_of(state.execute_tool(SESSION, "loaded", {"package": "opentelemetry"}))
            server.terminate(DEADLINE_S)
        assert collector.spans == []
    assert bool(imported) is disabled
    assert [event["event"] for event in events_in(server)].count("no traces are made") == disabled


def test_variables_of_opentelemetry_that_ask_for_what_is_not_there_end_the_start(tmp_path: Path) -> None:
    asked = {"OTEL_TRACES_EXPORTER": "zipkin", "DSPEX_PERSIST_OTEL": "true"}
    with pytest.raises(ProcessFailedError) as failed, serving(tmp_path, **asked):
        pass
    assert "'zipkin': it must be otlp, console or none" in failed.value.stderr_tail
