"""Hostile requests to a real server: every rpc of both services, then the transport below them.

    make fuzz MESSAGES=20000            # or: python -m tests.fuzz.fuzz_test --messages 20000 [--seed N]

It sends one request after the other, and reads the head of the log in between: a refused request must change nothing.
The server has to keep answering, must not use ever more memory, and its errors must neither reveal its internals nor be
unexplained. Exit code 0: no problems. 1: problems, which are printed.
"""

import argparse
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as audit_pb
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.store import maintenance
from tests.faults.bridge import wire
from tests.faults.crash_test import server_argv
from tests.fuzz.http2 import Connection
from tests.fuzz.messages import METHODS, SESSIONS, VARIABLES, Request, request

SENTINEL = "sentinel"
_READY_S, _ENDING_S = 60.0, 30.0
_CALL_S, _WATCH_S = 20.0, 0.05
_MOST_ANSWERS = 20
_MEASURE_EVERY = 200
_MOST_GROWTH_MIB = 100
# gRPC keeps up to this much memory for connections that misuse it, however many there are.
_MOST_GROWTH_BY_MISUSE_MIB = 400
_ENDLESS = ("WatchVariables", "BeginTransaction")
"""Streams that last until the client ends them."""
_INTERNALS = ("Traceback", "site-packages", 'File "', "sqlite3.", "sqlalchemy", "Error(")
# Commits of the server itself, and events of executions that failed.
_HOUSEKEEPING = frozenset({"expiry", "recovery", "pruning"})
_JOURNAL = frozenset({"execution_started", "execution_ended", "execution_began"})
_PING: Final = "/snakepit.bridge.BridgeService/Ping"


@dataclass(slots=True)
class Report:
    """The report of a run; `problems` is empty if all is well."""

    seed: int
    problems: list[str] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    """The accepted calls, by rpc."""
    rss_mib: list[int] = field(default_factory=list)
    took_s: float = 0.0

    def __str__(self) -> str:
        answers = ", ".join(f"{count:,} {code}" for code, count in self.answers.most_common())
        verdict = "no problems" if not self.problems else f"{len(self.problems)} PROBLEMS"
        return (
            f"seed {self.seed}: {self.answers.total():,} requests ({answers}),"
            f" memory {min(self.rss_mib, default=0)} to {max(self.rss_mib, default=0)} MiB,"
            f" in {self.took_s:.0f} s: {verdict}"
        )


class Fuzz:
    """One server, and the client that sends it hostile requests."""

    def __init__(self, folder: Path, seed: int, planted: str | None = None) -> None:
        self.report = Report(seed)
        self._database = folder / "fuzz.db"
        self._planted = planted
        self._process: ServerProcess
        self._calls: dict[str, Callable[..., Any]]

    def run(self, messages: int, *, verbose: bool = False) -> Report:
        """Send the messages, misuse the transport, and check the database."""
        began = time.monotonic()
        argv = [*server_argv(self._database, self._planted), "--audit-prune"]
        with ServerProcess.start(argv, ready_timeout_s=_READY_S) as self._process:
            with grpc.insecure_channel(f"127.0.0.1:{self._process.port}") as channel:
                self._calls = {
                    method.full_name: (channel.unary_stream if method.server_streaming else channel.unary_unary)(
                        f"/{method.containing_service.full_name}/{method.name}"
                    )
                    for method in METHODS
                }
                self._send_all(messages, verbose=verbose)
                if not self.report.problems:
                    self._misuse_http2()
                self._check_sentinel()
            if (code := self._process.terminate(_ENDING_S)) != 0:
                self.report.problems.append(f"the server ended with {code}: {self._process.stderr_tail[-500:]}")
        self.report.problems += [f"unsound: {problem}" for problem in maintenance.check(self._database).problems]
        self.report.took_s = time.monotonic() - began
        return self.report

    # Requests

    def _send_all(self, messages: int, *, verbose: bool) -> None:
        self._set_up(SENTINEL)
        for number in range(messages):
            if number % _MEASURE_EVERY == 0:
                self._set_up_all()
                self._measure()
            self._send(number, request(self.report.seed, number))
            if self._process.exit_code is not None:
                self.report.problems.append(f"request {number}: the server ended: {self._process.stderr_tail[-500:]}")
            if len(self.report.problems) >= 10:
                return
            if verbose and number % 5_000 == 4_999:
                print(f"  {number + 1:,} requests, {max(self.report.rss_mib, default=0)} MiB", flush=True)
        self._measure()

    def _send(self, number: int, sent: Request) -> None:
        name, before = sent.method.name, self._head()
        code, details = self._call(sent)
        self.report.answers[code] += 1
        if code == "OK":
            self.report.methods[name] += 1
            if name in ("CleanupSession", "DeleteVariable"):
                self._set_up_all()
        elif (after := self._head()) != before and (written := self._written(before)):
            self._complain(number, sent, f"{code}, but commits {before + 1} to {after} were written: {written}")
        if code in ("INTERNAL", "UNKNOWN", "DATA_LOSS") or (code == "DEADLINE_EXCEEDED" and name not in _ENDLESS):
            self._complain(number, sent, f"{code}: {details}")
        if revealed := [mark for mark in _INTERNALS if mark in details]:
            self._complain(number, sent, f"{code} reveals {revealed}: {details}")

    def _call(self, sent: Request) -> tuple[str, str]:
        """Send a request; returns the status code and its details."""
        endless = sent.method.name in _ENDLESS
        try:
            answer = self._calls[sent.method.full_name](
                sent.content, timeout=_WATCH_S if endless else _CALL_S, metadata=sent.headers
            )
            if sent.method.server_streaming:
                for count, _ in enumerate(answer):
                    if count > _MOST_ANSWERS:
                        answer.cancel()
                        return "OK", ""
        except grpc.RpcError as error:
            code = error.code().name  # type: ignore[attr-defined]
            if endless and code == "DEADLINE_EXCEEDED":
                return "OK", ""
            return code, error.details() or ""  # type: ignore[attr-defined]
        return "OK", ""

    def _complain(self, number: int, sent: Request, what: str) -> None:
        self.report.problems.append(f"request {number}, {sent.method.name} {sent.headers}: {what[:500]}")

    def _ask(self, name: str, message: Any, answer: Any) -> Any:
        [method] = [method for method in METHODS if method.name == name]
        return answer.FromString(self._calls[method.full_name](message.SerializeToString(), timeout=_CALL_S))

    def _head(self) -> int:
        return int(self._ask("GetHead", audit_pb.GetHeadRequest(), audit_pb.GetHeadResponse).sequence)

    def _written(self, after: int) -> list[str]:
        """The changes in the commits since then that a refused call must not have made."""
        message = audit_pb.ListCommitsRequest(range=audit_pb.Range(since=str(after), oldest_first=True))
        [method] = [method for method in METHODS if method.name == "ListCommits"]
        stream = self._calls[method.full_name](message.SerializeToString(), timeout=_CALL_S)
        commits = [commit for part in stream for commit in audit_pb.ListCommitsResponse.FromString(part).commits]
        return [
            f"{commit.cause} {len(commit.versions)} versions {list(commit.events)}"
            for commit in commits
            if commit.cause not in _HOUSEKEEPING and (commit.versions or not set(commit.events) <= _JOURNAL)
        ]

    def _set_up_all(self) -> None:
        for session_id in SESSIONS:
            self._set_up(session_id)

    def _set_up(self, session_id: str) -> None:
        self._ask("InitializeSession", pb.InitializeSessionRequest(session_id=session_id), pb.InitializeSessionResponse)
        listed = self._ask("ListVariables", pb.ListVariablesRequest(session_id=session_id), pb.ListVariablesResponse)
        present = {variable.name for variable in listed.variables}
        for name, (type_name, value, constraints) in VARIABLES.items():
            if name in present:
                continue
            content = wire(type_name, None)
            content.value = value.encode()
            registration = pb.RegisterVariableRequest(
                session_id=session_id, name=name, type=type_name, initial_value=content, constraints_json=constraints
            )
            self._ask("RegisterVariable", registration, pb.RegisterVariableResponse)

    def _check_sentinel(self) -> None:
        """Check that the session that no request names is unchanged."""
        message = pb.ListVariablesRequest(session_id=SENTINEL)
        variables = self._ask("ListVariables", message, pb.ListVariablesResponse).variables
        values = {variable.name: (variable.version, variable.value.value.decode()) for variable in variables}
        if set(values) != set(VARIABLES) or any(version for version, _ in values.values()):
            self.report.problems.append(f"the session that no request names has changed: {values}")

    def _measure(self, most_growth_mib: int = _MOST_GROWTH_MIB) -> None:
        """Check that the server answers and has not grown."""
        try:
            self._ask("Ping", pb.PingRequest(message="x"), pb.PingResponse)
        except grpc.RpcError as error:
            self.report.problems.append(f"no answer to Ping: {error}")
        if sys.platform == "linux":
            self.report.rss_mib.append(_rss_mib(self._process.pid))
            if self.report.rss_mib[-1] > self.report.rss_mib[0] + most_growth_mib:
                self.report.problems.append(f"the server has grown: {self.report.rss_mib} MiB")

    # The transport

    def _misuse_http2(self) -> None:
        for misuse in (_reset_at_once, _open_many, _bomb, _half_open):
            misuse(self._process.port)
            self._measure(_MOST_GROWTH_BY_MISUSE_MIB)
            self.report.answers[misuse.__name__.strip("_")] += 1


def _reset_at_once(port: int) -> None:
    """Reset calls before the server can answer."""
    with Connection(port) as connection:
        connection.open_streams(_PING, 20_000, reset=True)


def _open_many(port: int) -> None:
    """Open calls without ever sending the request."""
    with Connection(port) as connection:
        connection.open_streams(_PING, 5_000)


def _bomb(port: int) -> None:
    """Send compressed messages that are a thousand times larger when inflated."""
    message = pb.PingRequest(message="a" * 30_000_000).SerializeToString()
    connections = [Connection(port) for _ in range(5)]
    for connection in connections:
        connection.call(_PING, message, compressed=True)
    for connection in connections:
        connection.close()


def _half_open(port: int) -> None:
    """Open connections without completing the handshake."""
    connections = [Connection.half_open(port) for _ in range(200)]
    for connection in connections:
        connection.close()


def _rss_mib(pid: int) -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) // 1024


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="send hostile requests to a real server")
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000))
    parser.add_argument("--plant", help="a bug to plant in the server (see tests/faults/planted_server.py)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        print(f"seed {arguments.seed}, {arguments.messages:,} messages", flush=True)
        report = Fuzz(Path(folder), arguments.seed, arguments.plant).run(arguments.messages, verbose=True)
    print(report)
    for problem in report.problems[:20]:
        print(f"  {problem}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
