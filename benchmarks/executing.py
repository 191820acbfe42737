"""Tools executed by the real server, compared with Ping, and the throughput of streamed chunks.

The tools are in `benchmarks/tools.py`; the server runs them on its default number of threads.
"""

import asyncio
import json
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

import dspex_persist
from benchmarks.files import NAMES, begin_session, make_file, session_id
from benchmarks.plan import Plan
from benchmarks.rpc import PING, Calls, Rpc, row_of, run_rounds, start_server
from benchmarks.table import Row
from dspex_persist.state.bridge.codec import BRIDGE_SERVICE
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.commands import SetVariable
from dspex_persist.state.model import Value

SERVED = ("--tools", "benchmarks.tools")
"""The flags for a server with the tools of the benchmarks."""

_READ, _WRITTEN = NAMES[:3], NAMES[3:5]
_VALUES = (1, 2, 4)
_WRITER = "read_3_write_2"
_TARGETS = {_WRITER: {1: 0.3, 64: 0.4}}


def prepare(plan: Plan, path: Path) -> None:
    """Make the database: a session for each caller, with values for the tools to read."""
    callers = range(max(*plan.in_flight, plan.slow_callers + plan.probes))
    sessions = (begin_session(number) for number in callers)
    values = (
        SetVariable(session_id(number), name, Value(json.dumps(value)))
        for number in callers
        for name, value in zip(_READ, _VALUES, strict=True)
    )
    make_file(path, chain(*sessions, values))


def measure(plan: Plan, path: Path) -> list[Row]:
    """Measure, then check that the file has the writes of every acknowledged execution."""
    import uvloop

    before = _versions(path, plan)
    with start_server(path, *SERVED) as server:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            rows, executed = runner.run(_measure(plan, f"127.0.0.1:{server.port}"))
        server.terminate(30)
    after = _versions(path, plan)
    for caller, count in enumerate(executed):
        if after[caller] != [version + count for version in before[caller]]:
            raise RuntimeError(
                f"{session_id(caller)}: versions {before[caller]} before and {after[caller]} after {count} executions"
            )
    return rows


def tool_request(caller: int, tool: str, **parameters: object) -> pb.ExecuteToolRequest:
    """Return a request to execute a tool on the caller's session."""
    wires = {
        name: AnyMessage(type_url="type.googleapis.com/snakepit.any", value=json.dumps(value).encode())
        for name, value in parameters.items()
    }
    return pb.ExecuteToolRequest(session_id=session_id(caller), tool_name=tool, parameters=wires)


def result_of(answer: pb.ExecuteToolResponse) -> Any:
    """Return the result of the tool; raise RuntimeError if the execution did not commit."""
    if not (answer.success and answer.metadata["commit_sequence"]):
        raise RuntimeError(f"ExecuteTool answered {answer}")
    return json.loads(answer.result.value)


def _versions(path: Path, plan: Plan) -> list[list[int]]:
    """Return, by caller, the versions of the variables that the tool writes."""
    with dspex_persist.connect(path) as provider:
        return [
            [provider.get_variable(session_id(caller), name).version for name in _WRITTEN]
            for caller in range(max(plan.in_flight))
        ]


async def _measure(plan: Plan, target: str) -> tuple[list[Row], list[int]]:
    rows: list[Row] = []
    executed = [0] * max(plan.in_flight)
    async with grpc.aio.insecure_channel(target) as channel:
        for in_flight in plan.in_flight:
            print(f"tools: {in_flight} in flight", file=sys.stderr, flush=True)
            all_calls = [Calls(channel, rpc, in_flight) for rpc in _rpcs()]
            await run_rounds(plan, all_calls)
            rows += (row_of("tools", calls, _TARGETS) for calls in all_calls)
            for caller, count in enumerate(all_calls[-1].answered):
                executed[caller] += count
        rows += [await _stream(plan, channel, streams) for streams in plan.streams]
    return rows, executed


def _rpcs() -> list[Rpc]:
    """Return the measured calls: Ping first, the tool that writes last."""

    def noop(caller: int, _number: int) -> Message:
        return tool_request(caller, "noop")

    def read_and_write(caller: int, number: int) -> Message:
        return tool_request(caller, _WRITER, number=number)

    def is_a_sum(_caller: int, answer: Any) -> bool:
        total: float = result_of(answer)
        return total >= sum(_VALUES)

    return [
        PING,
        Rpc("ExecuteTool", "ExecuteTool, no-op", noop, lambda _, answer: result_of(answer) is None, "noop"),
        Rpc("ExecuteTool", "ExecuteTool, read 3, write 2", read_and_write, is_a_sum, _WRITER),
    ]


async def _stream(plan: Plan, channel: grpc.aio.Channel, streams: int) -> Row:
    """Measure this many concurrent executions that stream chunks."""
    parse = pb.ToolChunk.FromString
    invoke: Any = channel.unary_stream(f"/{BRIDGE_SERVICE.full_name}/ExecuteStreamingTool", response_deserializer=parse)
    most = plan.stream_chunks
    requests = [tool_request(caller, "count", most=most).SerializeToString() for caller in range(streams)]

    async def read(caller: int, deadline: float) -> int:
        chunks = 0
        while time.perf_counter() < deadline or not chunks:
            received = [chunk async for chunk in invoke(requests[caller])]
            if [int(chunk.data) for chunk in received[:-1]] != list(range(most)) or not received[-1].is_final:
                raise RuntimeError(f"{len(received)} chunks, the last of them {received[-1]}")
            chunks += most
        return chunks

    rates: list[float] = []
    for _ in range(plan.rounds):
        began = time.perf_counter()
        counts = await asyncio.gather(*(read(caller, began + plan.slice_s) for caller in range(streams)))
        rates.append(sum(counts) / (time.perf_counter() - began))
    what = f"chunks of {streams} stream{'s' if streams > 1 else ''} of {most:,}"
    return Row.of_rounds(f"tools.chunks.{streams}", what, "chunks/s", rates)
