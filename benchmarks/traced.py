"""What tracing costs: ExecuteTool of a server that sends its traces, compared with one that makes none.

The traces go to another process, `python -m benchmarks.traced`, which reads and forgets them.
"""

import asyncio
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from benchmarks.executing import SERVED, result_of, tool_request
from benchmarks.files import begin_session, make_file
from benchmarks.load import Series, ratios_of
from benchmarks.metered import take, turns
from benchmarks.plan import CALLERS, Plan
from benchmarks.rpc import Calls, Rpc, start_server
from benchmarks.table import Row
from dspex_persist.infra.process import ServerProcess

_IN_FLIGHT: Final = (1, CALLERS)


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Measure without and with traces in turn, round by round."""
    import uvloop

    with ExitStack() as stack:
        collector = stack.enter_context(ServerProcess.start([sys.executable, "-m", "benchmarks.traced"]))
        # Its own default is at a port that may be somebody's.
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}"}
        ports = []
        for name, options in (("untraced", ()), ("traced", ("--otel",))):
            path = folder / f"{name}.db"
            make_file(path, chain(*(begin_session(number) for number in range(CALLERS))))
            ports.append(stack.enter_context(start_server(path, *SERVED, *options, variables=variables)).port)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return [
                row for in_flight in _IN_FLIGHT for row in _rows(in_flight, runner.run(_call(plan, ports, in_flight)))
            ]


def _rows(in_flight: int, series: tuple[Series, Series]) -> list[Row]:
    without, traced = series
    what, ratios = f"ExecuteTool, no-op, {in_flight} in flight", ratios_of(traced.rates, without.rates)
    base = Row.of_rounds(f"tools.untraced.{in_flight}", what, "calls/s", without.rates)
    key = f"tools.traced.{in_flight}"
    return [base, Row.of_rounds(key, "... with traces", "calls/s", traced.rates, ratios, ratio_to=base.key)]


async def _call(plan: Plan, ports: list[int], in_flight: int) -> tuple[Series, Series]:
    series = Series(), Series()
    print(f"tools: traced, {in_flight} in flight", file=sys.stderr, flush=True)
    async with AsyncExitStack() as stack:
        calls = []
        for port in ports:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
            calls.append(Calls(channel, _noop(), in_flight))
            if plan.warm_s:
                await calls[-1].run(plan.warm_s)
        for _ in range(plan.rounds):
            take(series, [(which, await calls[which].run(seconds)) for which, seconds in turns(plan)])
    return series


def _noop() -> Rpc:
    def request(caller: int, _number: int) -> Message:
        return tool_request(caller, "noop")

    return Rpc("ExecuteTool", "ExecuteTool, no-op", request, lambda _, answer: result_of(answer) is None, "noop")


def _collect() -> None:
    """Take traces until the end of the process."""
    export: Any = grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": export}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"GRPC_READY:{port}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    _collect()
