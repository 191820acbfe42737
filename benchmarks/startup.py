"""How long the server takes to be ready, and to answer for a session for the first time, with few and many sessions."""

import statistics
import sys
import time
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from benchmarks.files import NAMES, begin_session, make_file, session_id
from benchmarks.load import ratios_of
from benchmarks.plan import Plan
from benchmarks.rpc import caller_of, start_server
from benchmarks.table import Row, Target
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb

_TOUCHED = 10
"""The number of sessions that are read after each start, spread over the file."""


@dataclass(slots=True)
class _Starts:
    """The measurements with this many sessions in the file, round by round."""

    sessions: int
    ready_s: list[float] = field(default_factory=list)
    touch_s: list[float] = field(default_factory=list)


def prepare(folder: Path, sessions: int) -> None:
    """Create a database with this many live sessions, of which every tenth has a variable."""
    step = min(10, sessions // _TOUCHED)
    all_sessions = (begin_session(number, NAMES[: number % step == 0]) for number in range(sessions))
    make_file(_path(folder, sessions), chain.from_iterable(all_sessions))


def _path(folder: Path, sessions: int) -> Path:
    return folder / f"sessions-{sessions}.db"


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Start the server on each file in turn, round by round. By then the files are in the system's cache."""
    all_starts = [_Starts(sessions) for sessions in plan.session_counts]
    # The first start writes the bytecode, if it is missing.
    with start_server(_path(folder, plan.session_counts[0])) as server:
        server.terminate(30)
    for count in range(plan.start_rounds):
        print(f"startup: round {count + 1} of {plan.start_rounds}", file=sys.stderr, flush=True)
        for starts in all_starts:
            _start(starts, _path(folder, starts.sessions))
    first, *_ = all_starts
    return [
        *(_ready_row(starts, first) for starts in all_starts),
        *(_touch_row(starts, first) for starts in all_starts),
    ]


def _start(starts: _Starts, path: Path) -> None:
    began = time.perf_counter()
    with start_server(path) as server:
        starts.ready_s.append(time.perf_counter() - began)
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            _call(channel, "Ping", pb.PingRequest(message="hello"))
            touches = [_touch(channel, number * starts.sessions // _TOUCHED) for number in range(_TOUCHED)]
        # The first one also pays for one-time work of the process, such as preparing the statements.
        starts.touch_s.append(statistics.median(touches[1:]))
        server.terminate(30)


def _touch(channel: grpc.Channel, number: int) -> float:
    request = pb.GetVariableRequest(session_id=session_id(number), variable_identifier=NAMES[0])
    began = time.perf_counter()
    answer = _call(channel, "GetVariable", request)
    elapsed_s = time.perf_counter() - began
    if answer.variable.name != NAMES[0]:
        raise RuntimeError(f"{session_id(number)} answered {answer}")
    return elapsed_s


def _call(channel: grpc.Channel, rpc: str, request: Message) -> Any:
    return caller_of(channel, rpc)(request.SerializeToString(), timeout=30)


def _ready_row(starts: _Starts, first: _Starts) -> Row:
    compared = starts is not first
    return Row.of_rounds(
        f"startup.{starts.sessions}",
        f"start of the server, {starts.sessions:,} sessions in the file",
        "s",
        starts.ready_s,
        ratios_of(starts.ready_s, first.ready_s) if compared else (),
        ratio_to=f"startup.{first.sessions}" if compared else "",
        target=Target("ratio", "at most", 1.2) if compared else Target("value", "at most", 0.5),
    )


def _touch_row(starts: _Starts, first: _Starts) -> Row:
    compared = starts is not first
    return Row.of_rounds(
        f"startup.touch.{starts.sessions}",
        f"first touch of one of {starts.sessions:,} sessions",
        "ms",
        [1000 * touch_s for touch_s in starts.touch_s],
        ratios_of(starts.touch_s, first.touch_s) if compared else (),
        ratio_to=f"startup.touch.{first.sessions}" if compared else "",
    )
