"""Three servers on one log, and clients that reach any of them, while all of it is killed, stopped and cut at random.

A balancer sends each action of a client to the next server. A monkey kills servers with SIGKILL, stops them for longer
than their lease, kills the database, and cuts the connections between them, before and after a commit has arrived.
Meanwhile clients write, with keys and without, and repeat what got no answer at the next server.

Checked at the end: what was acknowledged is there, once and as a whole; what was refused is not; what the clients saw
of each variable is linearizable; and each watcher got every commit, once, in order.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio

from dspex_persist.infra.process import ProcessFailedError, ServerProcess
from dspex_persist.state.commands import GetVariableHistory
from dspex_persist.state.errors import SessionNotFoundError, VariableNotFoundError
from dspex_persist.state.model import ChangeKind, VariableVersion
from dspex_persist.state.provider import StateProvider
from tests import engines
from tests.deadline import within
from tests.engines import Postgres, Server, Valkey
from tests.faults.bridge import Bridge
from tests.faults.by_hand import run_by_hand
from tests.faults.checker import Checker, Row, check_histories
from tests.faults.crash_test import Report
from tests.faults.cutting import Cut, CuttingProxy
from tests.faults.ledger import Ledger, Write
from tests.faults.places import Place, PostgresPlace, ValkeyPlace
from tests.faults.shared_server import LEASE_S
from tests.faults.tools import TOOLS
from tests.faults.workload import SESSION, Client, Names, Watcher, set_up

SERVERS = 3
# How long a client waits for an answer, in seconds, before it tries the next server.
_PATIENCE_S = 1.0
_READY_S = within(60)
_ENDING_S = within(30)
_KINDS = {ChangeKind.ROLLED_BACK: 2, ChangeKind.DELETED: 3}
# How often each act of the monkey comes, in proportion to the others.
_ACTS = {"killed": 3, "stopped": 4, "database killed": 2, "cut before": 2, "cut after": 2, "all cut": 1}
# Answers after which no earlier attempt of the same request can succeed, wherever it is.
_FINAL = frozenset(
    {
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
    }
)


class Balancer:
    """Knows the servers, and names the next one."""

    def __init__(self) -> None:
        self.bridges: list[Bridge | None] = [None] * SERVERS
        self._next = itertools.count()
        self._open = contextlib.AsyncExitStack()

    async def serve(self, index: int, port: int | None) -> None:
        """There is another server at this place, or none."""
        self.bridges[index] = None
        if port is not None:
            # Not closed with its server: that would cancel the calls, and they have to see their server end.
            self.bridges[index] = await self._open.enter_async_context(Bridge(port, _PATIENCE_S))

    async def close(self) -> None:
        await self._open.aclose()

    async def choose(self) -> Bridge:
        """Return the next server; wait if there is none."""
        while True:
            for _ in range(SERVERS):
                bridge = self.bridges[next(self._next) % SERVERS]
                if bridge is not None:
                    return bridge
            await asyncio.sleep(0.01)


class SharedClient(Client):
    """A client of the crash test that goes to another server for each action, and when it gets no answer."""

    def __init__(self, number: int, seed: int, ledger: Ledger, names: Names, balancer: Balancer) -> None:
        super().__init__(number, seed, ledger, names)
        self.resting = False
        self.last_error = ""
        """Of the write that is still unknown."""
        self._balancer = balancer
        # Many reads: each goes to another server than the write before it.
        self._actions = {**self._actions, self._read: 15}

    async def work(self) -> None:
        """Work until a rest is due."""
        actions, weights = list(self._actions), list(self._actions.values())
        while not self.resting:
            self._bridge = await self._balancer.choose()
            try:
                if self._unsettled:
                    await self._send_again()
                else:
                    [action] = self._random.choices(actions, weights)
                    await action()
            except grpc.aio.AioRpcError as error:
                self._ledger.endings[error.code().name] += 1
                await asyncio.sleep(0.01)

    @property
    def has_unknown(self) -> bool:
        return bool(self._unsettled)

    async def settle_all(self) -> None:
        """Repeat all writes with a key and an unknown outcome."""
        while self._unsettled:
            self._bridge = await self._balancer.choose()
            try:
                await self._send_again()
            except grpc.aio.AioRpcError as error:
                self.last_error = f"{self._unsettled[0]}: {error.code().name}: {error.details()}"
                await asyncio.sleep(0.05)

    async def _send_again(self) -> None:
        """Repeat a write at another server. Its first attempt may still be under way at the first one."""
        write = self._unsettled[0]
        try:
            versions = await (self._execute(write) if write.tool else self._ask(write))
        except grpc.aio.AioRpcError as error:
            if error.code() not in _FINAL:
                raise
            self._conclude(write, "refused", {})
        else:
            self._conclude(write, "ok" if versions else "refused", versions)
        self._unsettled.pop(0)

    async def _end_session(self) -> None:
        try:
            await super()._end_session()
        except grpc.aio.AioRpcError as error:
            # Somebody's repetition: the end itself may have got no answer.
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise


class Distributed:
    """A log, its servers and their clients.

    Args:
        folder: Where the servers keep files of their own.
        seed: Decides what happens when, but for the timing.
        clients: How many.
        planted: A bug of `tests.faults.shared_server`.
        kind: The database.
    """

    def __init__(
        self, folder: Path, seed: int, clients: int = 16, planted: str = "none", *, kind: type[Server] = Postgres
    ) -> None:
        self.report = Report(seed)
        self._folder = folder
        self._kind = kind
        self._planted = planted
        self._random = Random(seed)
        self._ledger = Ledger()
        self._count = clients
        self._balancer = Balancer()
        self._servers: list[ServerProcess | None] = [None] * SERVERS
        self._stopped = set[asyncio.Task[None]]()
        self._ended = False

    async def run(self, seconds: float, acts: Mapping[str, int] | None = None) -> Report:
        """Disturb for that long, then check.

        Args:
            seconds: How long.
            acts: How often each act of the monkey comes, in proportion to the others; all, by default.
        """
        began = time.monotonic()
        server = await asyncio.to_thread(self._kind.own)
        place: Place = PostgresPlace(server) if isinstance(server, Postgres) else ValkeyPlace(server)  # type: ignore[arg-type]
        try:
            with CuttingProxy(place.socket) as proxy:
                try:
                    await self._run(place, proxy, seconds, acts)
                finally:
                    await self._balancer.close()
                    for each in self._servers:
                        if each is not None:
                            each.close()
        finally:
            await asyncio.to_thread(server.end)
        self._sum_up()
        self.report.took_s = time.monotonic() - began
        return self.report

    async def _run(self, place: Place, proxy: CuttingProxy, seconds: float, acts: Mapping[str, int] | None) -> None:
        self._place, self._proxy = place, proxy
        # One after the other: the first one makes the tables.
        for index in range(SERVERS):
            await self._start(index)
        async with Bridge(self._port(0)) as bridge:
            names = await set_up(bridge, self._ledger, self._count)
        ids = (self._count, self.report.seed)
        self._clients = [SharedClient(number, ids[1], self._ledger, names, self._balancer) for number in range(ids[0])]
        self._watchers = [Watcher(self._ledger, 0) for _ in range(2)]
        working = [asyncio.create_task(client.work()) for client in self._clients]
        watching = [asyncio.create_task(self._watch(watcher)) for watcher in self._watchers]
        await self._disturb(seconds, acts)
        for client in self._clients:
            client.resting = True
        await self._gather(working)
        try:
            async with asyncio.timeout(_ENDING_S):
                await asyncio.gather(*(client.settle_all() for client in self._clients))
                last = await self._last_change()
        except TimeoutError:
            self.report.problems += [
                f"no answer: after {_ENDING_S:g} s of peace: {client.last_error}"
                for client in self._clients
                if client.has_unknown
            ]
        else:
            await self._catch_up(last)
        self._ended = True
        await self._end_servers()
        await self._gather(watching)
        await asyncio.to_thread(self._check)

    # The servers

    def _argv(self) -> list[str]:
        where = ["--db", self._place.url(self._proxy.socket), "--listen", "127.0.0.1:0", "--tools", TOOLS]
        return [sys.executable, "-m", "tests.faults.shared_server", self._planted, "serve", *where]

    async def _start(self, index: int) -> None:
        env = {**os.environ, "XDG_STATE_HOME": str(self._folder)}
        while True:
            try:
                process = await asyncio.to_thread(ServerProcess.start, self._argv(), env=env, ready_timeout_s=_READY_S)
            except ProcessFailedError as error:
                # The database may be away, or a connection cut: whoever starts it tries again.
                self.report.counts["failed starts"] += 1
                if self.report.counts["failed starts"] > 20:
                    self.report.problems.append(f"a server does not start: {error}")
                    return
                continue
            break
        self._servers[index] = process
        await self._balancer.serve(index, process.port)

    def _port(self, index: int) -> int:
        process = self._servers[index]
        assert process is not None
        return process.port

    async def _end_servers(self) -> None:
        for process in self._servers:
            assert process is not None
            code = await asyncio.to_thread(process.terminate, _ENDING_S)
            if code != 0:
                self.report.problems.append(f"a server ended with {code} after SIGTERM: {process.stderr_tail[-2000:]}")

    # What is done to them

    async def _disturb(self, seconds: float, given: Mapping[str, int] | None) -> None:
        acts: dict[str, Callable[[int], Awaitable[None]]] = {
            "killed": self._kill,
            "stopped": self._stop,
            "database killed": self._kill_database,
            "cut before": lambda _: self._cut(Cut.BEFORE),
            "cut after": lambda _: self._cut(Cut.AFTER),
            "all cut": self._cut_all,
        }
        weights = given or {
            "killed": 3,
            "stopped": 4,
            "database killed": 2,
            "cut before": 2,
            "cut after": 2,
            "all cut": 1,
        }
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.report.problems:
            [what] = self._random.choices(list(weights), list(weights.values()))
            self.report.counts[what] += 1
            self.report.cycles += 1
            await acts[what](self._random.randrange(SERVERS))
            await asyncio.sleep(self._random.uniform(0.1, 0.6))
        await asyncio.gather(*self._stopped)

    async def _kill(self, index: int) -> None:
        process = self._servers[index]
        if process is None or process.exit_code is not None:
            return
        self._servers[index] = None
        process.close()
        await self._balancer.serve(index, None)
        await self._start(index)

    async def _stop(self, index: int) -> None:
        process = self._servers[index]
        if process is None:
            return
        os.kill(process.pid, signal.SIGSTOP)
        task = asyncio.create_task(self._wake(process.pid, self._random.choice([0.3, LEASE_S / 2, LEASE_S * 1.7])))
        self._stopped.add(task)
        task.add_done_callback(self._stopped.discard)

    @staticmethod
    async def _wake(pid: int, after_s: float) -> None:
        try:
            await asyncio.sleep(after_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    async def _kill_database(self, _: int) -> None:
        number = signal.SIGKILL if isinstance(self._place, ValkeyPlace) else signal.SIGQUIT
        await asyncio.to_thread(self._place.server.restart, number)

    async def _cut(self, when: Cut) -> None:
        self._proxy.cut(when)

    async def _cut_all(self, _: int) -> None:
        self._proxy.cut_all()

    # The clients

    async def _watch(self, watcher: Watcher) -> None:
        while not self._ended:
            await watcher.run(await self._balancer.choose())
            await asyncio.sleep(0.02)

    async def _gather(self, users: Sequence[asyncio.Task[None]]) -> None:
        _, hanging = await asyncio.wait(users, timeout=_ENDING_S)
        for user in hanging:
            self.report.problems.append(f"{user.get_coro()} still waits")
            user.cancel()
        for user in users:
            if user.done() and not user.cancelled() and (error := user.exception()) is not None:
                raise error

    async def _last_change(self) -> int:
        """Make a change that the watchers have to reach; return its commit."""
        while True:
            bridge = await self._balancer.choose()
            try:
                await bridge.register(SESSION, "last", "integer", 1, {"token": "last"})
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                    await asyncio.sleep(0.05)
                    continue
            with self._opened() as state:
                last = state.get_variable_history(SESSION, "last", 1)[0]
            self._ledger.writes["last"] = Write("last", SESSION, (last.variable_id,), "1", settled=True)
            return last.sequence

    async def _catch_up(self, last: int) -> None:
        try:
            async with asyncio.timeout(_ENDING_S):
                await asyncio.gather(*(watcher.reach(last) for watcher in self._watchers))
        except TimeoutError:
            positions = ", ".join(str(watcher.position) for watcher in self._watchers)
            self.report.problems.append(f"watch: watchers are at {positions}, not at {last}")

    # The check

    def _opened(self) -> Any:
        return self._place.open()

    def _check(self) -> None:
        checker, ledger = Checker(), self._ledger
        with self._opened() as state:
            rows = _rows_of(state, ledger)
            ended = {session_id for session_id in ledger.ended if not _is_live(state, session_id)}
        problems = checker.check_rows(rows, ended, ledger) + ledger.complaints
        for watcher in self._watchers:
            problems += checker.check_watcher(SESSION, watcher.first, watcher.commits)
        self.report.problems += problems + check_histories(ledger)
        self.report.counts["versions"] = len(rows)

    def _sum_up(self) -> None:
        counts = self.report.counts
        for write in self._ledger.writes.values():
            counts[f"writes {write.status}"] += 1
        counts["reads"] = sum(len(reads) for reads in self._ledger.reads.values())
        counts["commits received by watchers"] = sum(len(watcher.commits) for watcher in self._watchers)
        for code, count in self._ledger.endings.items():
            counts[f"calls ended with {code}"] = count


def _is_live(state: StateProvider, session_id: str) -> bool:
    try:
        state.get_session(session_id)
    except SessionNotFoundError:
        return False
    return True


def _rows_of(state: StateProvider, ledger: Ledger) -> list[Row]:
    """All versions of the variables that the clients know, deleted ones too, in the order of their commits."""
    known = {target for write in ledger.writes.values() for target in write.targets}
    # Whoever got no answer to a registration has a name alone.
    known |= {f"short-{write.token}" for write in ledger.writes.values() if not write.targets}
    rows = set[Row]()
    for identifier in known:
        rows |= {_row_of(version) for version in _history_of(state, identifier)}
    return sorted(rows, key=lambda row: (row.sequence, row.variable_id, row.version))


def _history_of(state: StateProvider, identifier: str) -> Iterator[VariableVersion]:
    before: int | None = None
    while True:
        try:
            page = state.run(GetVariableHistory(SESSION, identifier, 1_000, before))
        except VariableNotFoundError:
            return
        yield from page
        if len(page) < 1_000:
            return
        before = page[-1].version


def _row_of(each: VariableVersion) -> Row:
    value = None if each.value is None else each.value.json
    token = each.metadata.get("token")
    return Row(each.sequence, SESSION, each.variable_id, each.version, _KINDS.get(each.kind, 1), value, token)


async def _run(folder: Path, seed: int, clients: int, planted: str | None, minutes: float) -> Report:
    engines.begin_run()
    first, last = [
        await Distributed(folder, seed, clients, planted or "none", kind=kind).run(minutes * 30)
        for kind in (Postgres, Valkey)
    ]
    print(f"PostgreSQL: {first}; Valkey:")
    last.problems[:0] = first.problems
    return last


if __name__ == "__main__":
    sys.exit(
        run_by_hand(
            *("distributed-test", "kill, stop and cut servers on one database, and the database", _run),
            unit="minutes",
            usual=5.0,
            clients=16,
        )
    )
