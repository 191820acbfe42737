"""The latency of SetVariable and GetVariable with and without slow tools in the same server.

Calls are sent at a fixed rate, whether or not earlier ones have been answered. Rounds without slow tools alternate with
rounds in which at least the planned number of them is running at any moment; the tools count themselves.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from benchmarks.executing import SERVED, result_of, tool_request
from benchmarks.files import NAMES, session_id
from benchmarks.load import Series, Slice, percentile_row
from benchmarks.plan import Plan
from benchmarks.rpc import caller_of, packed, start_server
from benchmarks.table import Row, Target
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb

_PATIENCE_S = 60
_RPCS = ("SetVariable", "GetVariable")


@dataclass(slots=True)
class _Probed:
    """The slices of one rpc, one per round, without slow tools (`alone`) and with them (`beside`)."""

    alone: Series = field(default_factory=Series)
    beside: Series = field(default_factory=Series)


def measure(plan: Plan, path: Path) -> list[Row]:
    """Measure on the database that `executing.prepare` has made."""
    import uvloop

    with start_server(path, *SERVED, "--tool-threads", str(plan.slow_callers)) as server:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            rows = runner.run(_measure(plan, f"127.0.0.1:{server.port}"))
        server.terminate(30)
    return rows


async def _measure(plan: Plan, target: str) -> list[Row]:
    probed = {rpc: _Probed() for rpc in _RPCS}
    async with grpc.aio.insecure_channel(target) as channel, grpc.aio.insecure_channel(target) as slow_channel:
        slow = _SlowTools(plan, slow_channel)
        probe = _Probe(plan, channel)
        await probe.run(plan.warm_s)
        for count in range(plan.slow_rounds):
            print(f"tools: slow ones, round {count + 1} of {plan.slow_rounds}", file=sys.stderr, flush=True)
            for rpc, part in (await probe.run(plan.slow_slice_s)).items():
                probed[rpc].alone.slices.append(part)
            async with slow.running():
                for rpc, part in (await probe.run(plan.slow_slice_s)).items():
                    probed[rpc].beside.slices.append(part)
    return [row for rpc, each in probed.items() for row in _rows_of(plan, rpc, each)]


def _rows_of(plan: Plan, rpc: str, probed: _Probed) -> list[Row]:
    key, count = f"tools.p99.{rpc}", plan.slow_tools
    target = Target("ratio", "at most", 1.5)
    what = f"{rpc}, {count} tools of {plan.slow_s:g} s running"
    return [
        percentile_row(f"{key}.0", 99, f"{rpc}, no tool running", probed.alone),
        percentile_row(
            f"{key}.{count}", 99, what, probed.beside, beside=probed.alone, ratio_to=f"{key}.0", target=target
        ),
    ]


class _Probe:
    """Few calls, at a fixed rate."""

    def __init__(self, plan: Plan, channel: grpc.aio.Channel) -> None:
        self._plan = plan
        self._invokes = {rpc: caller_of(channel, rpc) for rpc in _RPCS}
        self._versions: dict[int, int] = {}

    async def run(self, seconds: float) -> dict[str, Slice]:
        """Send SetVariable and GetVariable in turn; return their latencies, from sending on, by rpc."""
        plan, clock = self._plan, time.perf_counter
        tasks: dict[str, list[asyncio.Task[float]]] = {rpc: [] for rpc in _RPCS}
        began = clock()
        for number in range(int(seconds * plan.probes_per_s)):
            await asyncio.sleep(began + number / plan.probes_per_s - clock())
            for rpc, call in (("SetVariable", self._set(number)), ("GetVariable", self._get(number))):
                tasks[rpc].append(asyncio.create_task(call))
                # Sent separately, as if by different clients.
                await asyncio.sleep(0.5 / plan.probes_per_s)
        latencies = {rpc: list(await asyncio.gather(*own)) for rpc, own in tasks.items()}
        elapsed_s = clock() - began
        return {rpc: Slice(own, elapsed_s) for rpc, own in latencies.items()}

    def _session(self, number: int) -> int:
        """Return the session of a probe, which is not one of the slow tools'."""
        return self._plan.slow_callers + number % self._plan.probes

    async def _set(self, number: int) -> float:
        caller = self._session(number)
        request = pb.SetVariableRequest(
            session_id=session_id(caller), variable_identifier=NAMES[0], value=packed(number)
        )
        answer, elapsed_s = await self._call("SetVariable", request)
        if answer.new_version <= self._versions.get(caller, 0):
            raise RuntimeError(f"SetVariable answered {answer}")
        self._versions[caller] = answer.new_version
        return elapsed_s

    async def _get(self, number: int) -> float:
        request = pb.GetVariableRequest(session_id=session_id(self._session(number)), variable_identifier=NAMES[0])
        answer, elapsed_s = await self._call("GetVariable", request)
        if answer.variable.name != NAMES[0]:
            raise RuntimeError(f"GetVariable answered {answer}")
        return elapsed_s

    async def _call(self, rpc: str, request: Message) -> tuple[Any, float]:
        serialised = request.SerializeToString()
        called = time.perf_counter()
        answer = await self._invokes[rpc](serialised)
        return answer, time.perf_counter() - called


class _SlowTools:
    """Callers of the slow tool, each on its own session, and each calling again as soon as it is answered."""

    def __init__(self, plan: Plan, channel: grpc.aio.Channel) -> None:
        self._plan = plan
        self._execute = caller_of(channel, "ExecuteTool")
        self._count = plan.slow_callers

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep them running; raise RuntimeError if at any moment fewer than planned were running."""
        await self._ask("end_slow", ended=False)
        ended = asyncio.Event()
        callers = [asyncio.create_task(self._call(caller, ended)) for caller in range(self._count)]
        try:
            await self._until_running()
            yield
            _, fewest = await self._ask("look_at_slow")
            if fewest < self._plan.slow_tools:
                raise RuntimeError(f"{fewest} slow tools were running, not {self._plan.slow_tools}")
        finally:
            ended.set()
            await self._ask("end_slow", ended=True)
            await asyncio.gather(*callers)

    async def _until_running(self) -> None:
        deadline = time.perf_counter() + _PATIENCE_S
        running = 0
        while running < self._plan.slow_tools:
            if time.perf_counter() > deadline:
                raise RuntimeError(f"only {running} slow tools began within {_PATIENCE_S} s")
            # The last call before the load resets the count of the fewest.
            running, _ = await self._ask("look_at_slow")

    async def _call(self, caller: int, ended: asyncio.Event) -> None:
        # The first executions have different durations, so that from then on executions end and begin evenly over time.
        seconds = self._plan.slow_s * (0.25 + caller / self._count)
        while not ended.is_set():
            await self._ask("slow", caller, seconds=seconds)
            seconds = self._plan.slow_s

    async def _ask(self, tool: str, caller: int = 0, **parameters: object) -> Any:
        return result_of(await self._execute(tool_request(caller, tool, **parameters).SerializeToString()))
