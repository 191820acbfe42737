"""What tracing costs: ExecuteTool of a server that sends its traces, compared with one that makes none.

The traces go to another process, `python -m benchmarks.traced`, which reads and forgets them.
"""

import asyncio
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from benchmarks.executing import SERVED, result_of, tool_request
from benchmarks.files import begin_session, make_file
from benchmarks.plan import CALLERS, Plan
from benchmarks.rpc import Rpc, start_server
from benchmarks.table import Row
from benchmarks.turns import call_in_turn, rows
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
            return [row for in_flight in _IN_FLIGHT for row in runner.run(_rows(plan, ports, in_flight))]


async def _rows(plan: Plan, ports: list[int], in_flight: int) -> list[Row]:
    print(f"tools: traced, {in_flight} in flight", file=sys.stderr, flush=True)
    both = await call_in_turn(plan, ports, _noop, in_flight)
    what = f"ExecuteTool, no-op, {in_flight} in flight"
    return rows("tools", f"traced.{in_flight}", what, "calls/s", "traces", both)


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
