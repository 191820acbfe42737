"""The cost of thousands of watchers of a variable for the client that sets it, and for a call right after that.

Two servers: the variable of one has that many watchers, in a separate process, the variable of the other has none. One
caller sets each variable in turn, and waits until all watchers have received the update, so that no call meets a busy
server.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from benchmarks.crowd import Crowd, allow_connections
from benchmarks.files import NAMES, begin_session, make_file, session_id
from benchmarks.load import Series, Slice, percentile_row
from benchmarks.plan import Plan
from benchmarks.rpc import caller_of, packed, start_server
from benchmarks.table import Row, Target
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb

_PATIENCE_S = 60
_SESSION, _NAME = session_id(0), NAMES[0]
_TARGETS = {("SetVariable", 99): Target("ratio", "at most", 3)}


class _Server:
    """A client of one of the servers. `series`: the measurements by rpc, one slice per round."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.version = 0
        self.series = {"SetVariable": Series(), "Ping": Series()}
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._latencies: dict[str, list[float]] = {rpc: [] for rpc in self.series}

    def call(self) -> None:
        """Set the variable, then Ping; raise RuntimeError if the version is not the next one."""
        request = pb.SetVariableRequest(session_id=_SESSION, variable_identifier=_NAME, value=packed(self.version))
        answer = self._timed("SetVariable", request)
        self._timed("Ping", pb.PingRequest(message="hello"))
        if answer.new_version != self.version + 1:
            raise RuntimeError(f"version {answer.new_version} came after {self.version}")
        self.version += 1

    def _timed(self, rpc: str, request: Message) -> Any:
        call, serialised = caller_of(self._channel, rpc), request.SerializeToString()
        called = time.perf_counter()
        answer = call(serialised, timeout=_PATIENCE_S)
        self._latencies[rpc].append(time.perf_counter() - called)
        return answer

    def end_round(self, *, counts: bool = True) -> None:
        """Add the measurements since the last round as slices, if they count."""
        for rpc, latencies in self._latencies.items():
            if counts:
                self.series[rpc].slices.append(Slice(latencies, sum(latencies)))
            self._latencies[rpc] = []

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Measure both servers in turn, call by call."""
    allow_connections(plan.watchers)
    with ExitStack() as stack:
        unwatched, watched = (stack.enter_context(_serving(folder / name)) for name in ("unwatched.db", "watched.db"))
        crowd = stack.enter_context(Crowd(watched.port))
        crowd.watch(plan.watchers, _SESSION, _NAME)
        # One-time work of each process, such as preparing statements, happens before the first round.
        _run_round(unwatched, watched, crowd, 2, counts=False)
        for count in range(plan.rounds):
            print(f"watchers: round {count + 1} of {plan.rounds}", file=sys.stderr, flush=True)
            _run_round(unwatched, watched, crowd, plan.watched_writes, counts=True)
    return [
        row for rpc in watched.series for percent in (50, 99) for row in _rows(plan, rpc, percent, unwatched, watched)
    ]


@contextmanager
def _serving(path: Path) -> Iterator[_Server]:
    make_file(path, begin_session(0))
    with start_server(path) as process:
        server = _Server(process.port)
        yield server
        server.close()
        process.terminate(_PATIENCE_S)


def _run_round(unwatched: _Server, watched: _Server, crowd: Crowd, writes: int, *, counts: bool) -> None:
    for _ in range(writes):
        unwatched.call()
        watched.call()
        crowd.wait_received(watched.version)
    unwatched.end_round(counts=counts)
    watched.end_round(counts=counts)


def _rows(plan: Plan, rpc: str, percent: int, unwatched: _Server, watched: _Server) -> list[Row]:
    key = f"watchers.p{percent}.{rpc}"
    what = {"SetVariable": "SetVariable", "Ping": "Ping right after it"}[rpc]
    alone, beside = unwatched.series[rpc], watched.series[rpc]
    return [
        percentile_row(f"{key}.0", percent, f"{what}, no watchers", alone),
        percentile_row(
            f"{key}.{plan.watchers}",
            percent,
            f"{what}, {plan.watchers:,} watchers",
            beside,
            beside=alone,
            ratio_to=f"{key}.0",
            target=_TARGETS.get((rpc, percent)),
        ),
    ]
