"""The cost of a thousand idle connections for another client, compared with a server that has none."""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from itertools import chain
from pathlib import Path

import grpc

from benchmarks.crowd import Crowd, allow_connections
from benchmarks.files import begin_session, make_file
from benchmarks.load import Series, percentile_row
from benchmarks.plan import Plan
from benchmarks.proc import resident_bytes
from benchmarks.rpc import Calls, rpcs, start_server
from benchmarks.table import Row

_CALLED = ("Ping", "GetVariable", "SetVariable")


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Measure one caller of each server, in turn, and the memory of both servers."""
    import uvloop

    allow_connections(plan.idle_connections)
    with ExitStack() as stack:
        paths = [folder / name for name in ("unconnected.db", "connected.db")]
        for path in paths:
            make_file(path, begin_session(0))
        alone, crowded = (stack.enter_context(start_server(path)) for path in paths)
        crowd = stack.enter_context(Crowd(crowded.port))
        crowd.connect(plan.idle_connections)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            series = runner.run(_measure(plan, [alone.port, crowded.port]))
        memory_mib = [resident_bytes(server.pid) / 2**20 for server in (alone, crowded)]
    rows = [row for rpc in _CALLED for row in _rows(plan, rpc, *series[rpc])]
    for count, mib in zip((0, plan.idle_connections), memory_mib, strict=True):
        rows.append(Row(f"connections.memory.{count}", f"memory of the server, {_words(count)}", mib, "MiB"))
    return rows


async def _measure(plan: Plan, ports: Sequence[int]) -> dict[str, list[Series]]:
    """Return the series of both servers, by rpc."""
    async with AsyncExitStack() as stack:
        called: dict[str, list[Calls]] = {rpc: [] for rpc in _CALLED}
        for port in ports:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
            for rpc in rpcs(plan, {}):
                if rpc.name in called:
                    called[rpc.name].append(Calls(channel, rpc, 1))
        for calls in chain(*called.values()):
            await calls.run(plan.warm_s)
        for count in range(plan.rounds):
            print(f"connections: round {count + 1} of {plan.rounds}", file=sys.stderr, flush=True)
            for pair in called.values():
                for calls in pair:
                    calls.series.slices.append(await calls.run(plan.idle_slice_s))
    return {rpc: [calls.series for calls in pair] for rpc, pair in called.items()}


def _words(count: int) -> str:
    return f"{count:,} idle connections" if count else "no idle connections"


def _rows(plan: Plan, rpc: str, alone: Series, crowded: Series) -> list[Row]:
    key, many = f"connections.p99.{rpc}", plan.idle_connections
    return [
        percentile_row(f"{key}.0", 99, f"{rpc}, {_words(0)}", alone),
        percentile_row(f"{key}.{many}", 99, f"{rpc}, {_words(many)}", crowded, beside=alone, ratio_to=f"{key}.0"),
    ]
