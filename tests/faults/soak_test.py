"""Servers used in every way at once, for a long time, with restarts.

    make soak MINUTES=15                # or: python -m tests.faults.soak_test --minutes 15 [--seed N] [--clients 8]

The crash test's clients and watchers work all the time. At the same time, others query the history, prune, make
backups, connect and leave, and watch for a moment. Servers end by SIGTERM and SIGKILL alternately. The checks are those
of the crash test; in addition, memory and file descriptors of a warm server must not grow. Exit code 0: no problems.
1: problems, which are printed, and the files are kept.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as audit_pb
from dspex_persist.state.bridge.generated import snakepit_bridge_pb2 as pb
from dspex_persist.state.store import maintenance
from tests.deadline import within
from tests.faults.auditor import Auditor
from tests.faults.bridge import Bridge, wire
from tests.faults.by_hand import run_by_hand
from tests.faults.crash_test import CrashTest, Report
from tests.faults.workload import SESSION, Client, Watcher

_PRUNED = "pruned"
_LIFE_S = 150.0
_ENDING_S = 30.0
_ROUND_S = 30.0
_BACKUP_EVERY_S, _PRUNE_EVERY, _PAUSE_S = 20.0, 10, 0.02
_MOST_GROWTH_MIB, _MOST_MORE_FILES = 40, 20


@dataclass(frozen=True, slots=True)
class Usage:
    """The resources that a process uses."""

    rss_mib: int
    files: int

    @classmethod
    def of(cls, pid: int) -> "Usage":
        status = Path(f"/proc/{pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
        return cls(int(line.split()[1]) // 1024, len(list(Path(f"/proc/{pid}/fd").iterdir())))


class Soak(CrashTest):
    """The crash test with longer lives, and with all other kinds of clients."""

    def __init__(self, folder: Path, seed: int, clients: int = 8, planted: str | None = None) -> None:
        super().__init__(folder, seed, clients, planted)
        self._argv.append("--audit-prune")
        self._folder = folder
        self.usages: list[Usage] = []

    async def soak(self, seconds: float, *, verbose: bool = False) -> Report:
        """Use servers for that long, check, and shut the last one down. Stops after the first one with a problem."""
        began = time.monotonic()
        names = await self._set_up()
        self._clients = [Client(number, self.report.seed, self._ledger, names) for number in range(self._count)]
        self._watchers = [Watcher(self._ledger, 0) for _ in range(2)]
        lives = max(2, round(seconds / _LIFE_S))
        while self.report.cycles < lives and not self.report.problems:
            self.report.cycles += 1
            await self._live(seconds / lives, kill=self.report.cycles % 2 == 0)
            self._check_files()
            if verbose:
                head = self._checker.head.sequence
                print(f"  {time.monotonic() - began:.0f} s, {head:,} commits, {self.usages[-2:]}", flush=True)
        if not self.report.problems:
            await self._finish()
        self._sum_up()
        self.report.took_s = time.monotonic() - began
        return self.report

    async def _live(self, seconds: float, *, kill: bool) -> None:
        with await self._start() as process:
            async with Bridge(process.port) as bridge:
                await self._compare_memory(bridge)
                users = [asyncio.create_task(user.run(bridge)) for user in (*self._clients, *self._watchers)]
                rounds = [asyncio.Event() for _ in self._others()]
                others = [
                    asyncio.create_task(self._repeat(other, process.port, ended))
                    for other, ended in zip(self._others(), rounds, strict=True)
                ]
                await asyncio.sleep(seconds / 3)
                warm = Usage.of(process.pid)
                await asyncio.sleep(seconds * 2 / 3)
                self._compare(warm, Usage.of(process.pid))
                await self._end_rounds(rounds, others)
                for other in others:
                    other.cancel()
                await asyncio.wait(others)
                await self._end(process, kill)
                await self._gather(users)
        for other in others:
            if not other.cancelled() and (error := other.exception()) is not None:
                self.report.problems.append(f"another client failed: {error!r}")

    async def _end_rounds(self, rounds: Sequence[asyncio.Event], others: Sequence[asyncio.Task[None]]) -> None:
        """Wait until all other clients have finished a round, or one has failed, however short the life is."""
        all_ended = asyncio.ensure_future(asyncio.gather(*(ended.wait() for ended in rounds)))
        await asyncio.wait((all_ended, *others), timeout=within(_ROUND_S), return_when=asyncio.FIRST_COMPLETED)
        if not all_ended.done() and not any(other.done() for other in others):
            self.report.problems.append(f"a round does not end: {[ended.is_set() for ended in rounds]}")
        all_ended.cancel()
        await asyncio.wait((all_ended,))

    async def _end(self, process: ServerProcess, kill: bool) -> None:
        if process.exit_code is not None:
            self.report.problems.append(f"the server ended by itself: {process.stderr_tail}")
        elif kill:
            process.kill()
        elif (code := await asyncio.to_thread(process.terminate, _ENDING_S)) != 0:
            self.report.problems.append(f"the server ended with {code} after SIGTERM: {process.stderr_tail}")

    def _compare(self, warm: Usage, last: Usage) -> None:
        self.usages += [warm, last]
        if last.rss_mib > warm.rss_mib + _MOST_GROWTH_MIB:
            self.report.problems.append(f"memory: {warm.rss_mib} MiB when it was warm, {last.rss_mib} at the end")
        if last.files > warm.files + _MOST_MORE_FILES:
            self.report.problems.append(f"files: {warm.files} open when it was warm, {last.files} at the end")

    # The other clients

    def _others(self) -> list[Callable[[int], Awaitable[None]]]:
        return [self._ask_history, self._prune, self._visit, self._glance, self._back_up]

    async def _repeat(self, other: Callable[[int], Awaitable[None]], port: int, ended: asyncio.Event) -> None:
        while True:
            await other(port)
            self.report.counts[f"rounds of {other.__name__.strip('_')}"] += 1
            ended.set()
            await asyncio.sleep(_BACKUP_EVERY_S if other == self._back_up else _PAUSE_S)

    async def _ask_history(self, port: int) -> None:
        """Run every query on a session."""
        newest = audit_pb.Range(limit=50)
        async with Auditor(port) as auditor:
            await auditor.ask("ListHistory", audit_pb.ListHistoryRequest(session=SESSION, range=newest))
            await auditor.ask("ListCommits", audit_pb.ListCommitsRequest(session=SESSION, range=newest))
            await auditor.ask("ListSessions", audit_pb.ListSessionsRequest(range=newest))
            await auditor.ask("GetState", audit_pb.GetStateRequest(session=SESSION))
            for part in await auditor.ask("ListExecutions", audit_pb.ListExecutionsRequest(range=newest)):
                for execution in part.executions[:3]:
                    request = audit_pb.GetExecutionRequest(execution_id=execution.execution_id)
                    await auditor.ask("GetExecution", request)

    async def _prune(self, port: int) -> None:
        """Write some versions, and prune them."""
        async with Bridge(port) as bridge, Auditor(port) as auditor:
            await bridge.begin(_PRUNED)
            await bridge.register(_PRUNED, "x", "string", "", {})
            for count in range(_PRUNE_EVERY):
                await bridge.set(_PRUNED, "x", wire("string", f"{count}" + "x" * 1_500), {})
            self.report.counts["versions pruned"] += await auditor.prune(_PRUNED, keep_versions=3)

    async def _visit(self, port: int) -> None:
        """Connect, ping, be refused, disconnect."""
        async with Bridge(port) as bridge:
            await bridge.call("Ping", pb.PingRequest(message="here"))
            try:
                await bridge.get(SESSION, "nobody")
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise

    async def _glance(self, port: int) -> None:
        """Watch until the first update, and disconnect."""
        async with Bridge(port) as bridge:
            async for _ in bridge.watch(SESSION, 0):
                break

    async def _back_up(self, port: int) -> None:
        """Make a backup while the server works; it has to be sound."""
        target = self._folder / "backup.db"
        argv = (sys.executable, "-m", "dspex_persist", "db", "backup", str(target), "--db", str(self.database))
        command = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.DEVNULL)
        try:
            if (code := await command.wait()) != 0:
                self.report.problems.append(f"a backup ended with {code}")
            elif problems := (await asyncio.to_thread(maintenance.check, target)).problems:
                self.report.problems.append(f"a backup has problems: {problems[:2]}")
            self.report.counts["backups"] += 1
        finally:
            if command.returncode is None:
                command.kill()
                await command.wait()
            target.unlink(missing_ok=True)


async def _run(folder: Path, seed: int, clients: int, planted: str | None, minutes: float) -> Report:
    return await Soak(folder, seed, clients, planted).soak(minutes * 60, verbose=True)


if __name__ == "__main__":
    description = "use servers in every way at once, for a long time"
    sys.exit(run_by_hand("soak-test", description, _run, unit="minutes", usual=15.0, needs_proc=True))
