"""Recordings of LM calls whose process is killed, or whose session moves to a server."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest

from dspex_persist import (
    BridgedState,
    BudgetExceededError,
    Context,
    ToolContext,
    ToolFailedError,
    connect,
    open_audit,
    tool,
)
from dspex_persist.audit import AuditSource, ExecutionQuery
from dspex_persist.state.model import ExecutionStatus
from dspex_persist.testing.server import ServedDatabase
from tests.deadline import within
from tests.end_to_end.old_style import ROOT, environment
from tests.lms import Engine, ask, dspy, dummy, lm_calls, lm_on

PROGRAM = """
import sys
import dspy
from dspy.utils import DummyLM
import dspex_persist

answer = dspy.Predict("question -> answer")
ctx = dspex_persist.Context("s", sys.argv[1])
with dspy.context(lm=DummyLM([{"answer": "a"}] * 3)), ctx.recording(keep_after_s=0.05) as recording:
    for question in ("one", "two"):
        answer(question=question)
    print(recording.id, flush=True)
    sys.stdin.read()
"""


@tool(record_lm=True)
def asks(ctx: ToolContext) -> str:
    """Ask; returns the id of the execution."""
    ask("by a tool")
    return ctx.execution_id


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDatabase]:
    with ServedDatabase(tmp_path_factory.mktemp("lm") / "sessions.db") as served:
        yield served


def killed(place: str, wait: Callable[[str], object]) -> str:
    """Run a program that records two calls, and kill it in the middle of its recording; returns the recording's id."""
    argv = [sys.executable, "-c", PROGRAM, place]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    ) as client:
        assert client.stdout is not None
        recording_id = client.stdout.readline().strip()
        wait(recording_id)
        client.send_signal(signal.SIGKILL)
    return recording_id


def parts_of(audit: AuditSource, recording_id: str) -> list[Any]:
    query = ExecutionQuery(session="s", metadata={"dspex.recording": recording_id})
    return [audit.execution(each.execution_id) for each in audit.iterate(query)]


def questions(parts: list[Any]) -> list[str]:
    calls = [call for part in parts for call in part.recorded.get("lm", ())]
    calls.sort(key=lambda call: call["ordinal"])
    return [call["request"]["messages"][-1]["content"].split("\n")[1] for call in calls]


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + within(30)
    while not reached():
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.02)


def test_a_server_keeps_the_calls_of_a_client_that_is_killed(served: ServedDatabase) -> None:
    recording_id = killed(f"grpc://{served.target}", lambda _: None)
    with BridgedState(served.target) as state, state.audit() as audit:
        until(lambda: parts_of(audit, recording_id)[0].summary.status is not ExecutionStatus.RUNNING)
        (part,) = parts_of(audit, recording_id)
        assert (part.summary.status, part.summary.tool) == (ExecutionStatus.CANCELLED, "recording")
        assert questions([part]) == ["one", "two"]


def test_budgets_of_a_server(tmp_path: Path) -> None:
    with ServedDatabase(tmp_path / "sessions.db", {"max_tokens": 11, "max_cost": "none"}) as served:
        place = f"grpc://{served.target}"
        for restarted in (False, True):
            if restarted:
                served.restart()
            with Context("s", place) as ctx, ctx.recording():
                lm_on(Engine())("one")
                if not restarted:
                    continue
                lm_on(Engine())("two")
                with pytest.raises(BudgetExceededError, match="raise the server's setting max_tokens"):
                    lm_on(Engine())("three")
                with Context("s", place, max_tokens=3), pytest.raises(BudgetExceededError, match="of a budget of 3;"):
                    lm_on(Engine())("four")

                async def program() -> None:
                    with pytest.raises(BudgetExceededError):
                        await lm_on(Engine()).acall("five")

                asyncio.run(program())


@pytest.mark.parametrize("workers", [0, 1])
def test_budgets_of_tools_of_a_server(tmp_path: Path, workers: int) -> None:
    settings = {"tools": "tests.end_to_end.lm_tools", "workers": workers}
    served = ServedDatabase(tmp_path / "sessions.db", settings, import_from=ROOT)
    with served, Context("s", f"grpc://{served.target}") as ctx:
        assert ctx.call("spend", times=3) == 3
        with pytest.raises(ToolFailedError, match="tool 'spend' in this session have used 20 tokens"):
            ctx.call("spend", times=3)
        ctx.call("spend_later")
        Context("s", ctx.backend.provider, max_tokens=34)
        with pytest.raises(ToolFailedError, match="session 's' have used 35 tokens"):
            ctx.call("spend_later")
        query = ExecutionQuery(session="s")
        with ctx.backend.provider.audit() as audit:  # type: ignore[attr-defined]
            ended = [audit.execution(each.execution_id) for each in audit.iterate(query)]
    refused = [call for each in ended for call in each.recorded["lm"] if "error" in call]
    assert len(refused) == 2


def test_a_file_has_the_calls_that_were_old_enough(tmp_path: Path) -> None:
    path = tmp_path / "s.db"

    def are_kept(recording_id: str) -> None:
        with open_audit(path) as audit:
            until(lambda: len(questions(parts_of(audit, recording_id))) == 2)

    recording_id = killed(str(path), are_kept)
    with connect(path), open_audit(path) as audit:
        parts = parts_of(audit, recording_id)
        assert questions(parts) == ["one", "two"]
        assert {part.summary.status for part in parts} <= {ExecutionStatus.COMMITTED, ExecutionStatus.INTERRUPTED}


def test_a_recording_goes_on_when_its_server_is_shut_down_and_started_again(tmp_path: Path) -> None:
    with ServedDatabase(tmp_path / "sessions.db", {"grace_s": 600}) as served:
        ctx = Context("s", f"grpc://{served.target}")
        with ctx, dspy.context(lm=dummy(*"abc")), ctx.recording() as recording, ThreadPoolExecutor(1) as pool:
            ask("one")
            assert served.stop() == 0
            # It waits for the server.
            later = pool.submit(copy_context().run, ask, "two")
            served.restart()
            assert later.result(within(60)) == "b"
            ask("three")
        with BridgedState(served.target) as state, state.audit() as audit:
            parts = parts_of(audit, recording.id)
            assert [part.summary.status for part in parts] == [ExecutionStatus.COMMITTED] * 2
            assert questions(parts) == ["one", "two", "three"]


def test_a_recording_goes_along_to_a_server(served: ServedDatabase) -> None:
    with Context("moved", tools=[asks]) as ctx, dspy.context(lm=dummy(*"abcd")):
        with ctx.recording() as recording:
            ask("one")
            ctx.ensure_bridged(f"grpc://{served.target}")
            ask("two")
            with ctx.transaction() as tx:
                ask("three")
        with ctx.backend.provider.audit() as audit:  # type: ignore[attr-defined]
            query = ExecutionQuery(session="moved", metadata={"dspex.recording": recording.id})
            parts = [audit.execution(each.execution_id) for each in audit.iterate(query)]
            assert sorted(questions(parts)) == ["one", "two"]
            assert questions([audit.execution(tx.execution_id)]) == ["three"]
            # A tool of this process runs in a transaction of the server.
            calls = lm_calls.recorded_calls(ctx.call(asks), ctx)
            assert [call["request"]["messages"][-1]["content"].split("\n")[1] for call in calls] == ["by a tool"]
            Context("moved", ctx.backend.provider, max_tokens=0)
            with pytest.raises(ToolFailedError, match="BudgetExceededError"):
                ctx.call(asks)
