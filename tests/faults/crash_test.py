"""Kill a real server again and again while clients write, and check after each kill that all promises were kept.

    python -m tests.faults.crash_test --cycles 200 [--seed N] [--clients 8]

A tenth of the kills hit the start-up. Clients, watchers and the checker run in this process, the server in another.
Exit code 0: no problems. 1: problems, which are printed, and the files are kept.
"""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from dspex_persist.infra.process import ProcessFailedError, ServerProcess
from tests.deadline import within
from tests.faults.bridge import Bridge
from tests.faults.by_hand import run_by_hand
from tests.faults.checker import Checker, check_histories, copy_files, verify
from tests.faults.ledger import Ledger
from tests.faults.tools import TOOLS
from tests.faults.workload import SESSION, Client, Names, Watcher, set_up

_READY_S = within(60)
_ENDING_S = within(30)
_CATCH_UP_S = within(60)


def server_argv(database: Path, planted: str | None = None) -> list[str]:
    """Return the command that starts a server, optionally with a planted bug."""
    where = ["--db", str(database), "--listen", "127.0.0.1:0"]
    return [*program_argv(planted), "serve", *where, "--tools", TOOLS]


def program_argv(planted: str | None = None) -> list[str]:
    """Return the start of every command, optionally with a planted bug."""
    return [sys.executable, "-m", *(["dspex_persist"] if planted is None else ["tests.faults.planted_server", planted])]


@dataclass(slots=True)
class Report:
    """The report of a run; `problems` is empty if all is well."""

    seed: int
    cycles: int = 0
    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    took_s: float = 0.0

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts.items()))
        verdict = "nothing was lost or broken" if not self.problems else f"{len(self.problems)} PROBLEMS"
        return f"seed {self.seed}: {self.cycles} cycles in {self.took_s:.0f} s: {counts}: {verdict}"


class CrashTest:
    """A database, the servers that serve it one after the other, and their clients."""

    def __init__(self, folder: Path, seed: int, clients: int = 8, planted: str | None = None) -> None:
        self.database = folder / "crash.db"
        self.report = Report(seed)
        self._copies = folder / "copy"
        self._random = Random(seed)
        self._argv = server_argv(self.database, planted)
        self._ledger = Ledger()
        self._checker = Checker()
        self._count = clients
        self._clients: list[Client] = []
        self._watchers: list[Watcher] = []
        self._start_s = 1.0

    async def run(self, cycles: int, *, verbose: bool = False) -> Report:
        """Set up, kill `cycles` servers, and shut the last one down. Stops after the first cycle with a problem."""
        began = time.monotonic()
        names = await self._set_up()
        self._clients = [Client(number, self.report.seed, self._ledger, names) for number in range(self._count)]
        self._watchers = [Watcher(self._ledger, 0) for _ in range(2)]
        while self.report.cycles < cycles and not self.report.problems:
            self.report.cycles += 1
            starting = self.report.cycles % 10 == 5
            await (self._kill_while_it_starts() if starting else self._kill_while_it_works())
            self._check_files(started=not starting)
            if verbose and self.report.cycles % 10 == 0:
                print(f"  {self.report.cycles} cycles, {self._checker.head.sequence:,} commits", flush=True)
        if not self.report.problems:
            await self._finish()
        self._sum_up()
        self.report.took_s = time.monotonic() - began
        return self.report

    async def _set_up(self) -> Names:
        with await self._start() as process:
            async with Bridge(process.port) as bridge:
                names = await set_up(bridge, self._ledger, self._count)
            process.kill()
        self._check_files()
        return names

    async def _start(self) -> ServerProcess:
        began = time.monotonic()
        process = await asyncio.to_thread(ServerProcess.start, self._argv, ready_timeout_s=_READY_S)
        self._start_s = time.monotonic() - began
        return process

    async def _kill_while_it_starts(self) -> None:
        with ServerProcess(self._argv) as process:
            await asyncio.sleep(self._random.uniform(0, self._start_s))
            process.kill()
        self.report.counts["kills during start-up"] += 1

    async def _kill_while_it_works(self) -> None:
        try:
            process = await self._start()
        except ProcessFailedError as error:
            self.report.problems.append(f"the server does not restart: {error}")
            return
        with process:
            async with Bridge(process.port) as bridge:
                await self._compare_memory(bridge)
                users = [
                    *(asyncio.create_task(client.run(bridge)) for client in self._clients),
                    *(asyncio.create_task(watcher.run(bridge)) for watcher in self._watchers),
                ]
                await asyncio.sleep(self._random.uniform(0.02, 0.6))
                if process.exit_code is not None:
                    self.report.problems.append(f"the server ended by itself: {process.stderr_tail}")
                process.kill()
                await self._gather(users)

    async def _gather(self, users: Sequence[asyncio.Task[None]]) -> None:
        """Wait for all clients, which must notice the end of the server."""
        _, hanging = await asyncio.wait(users, timeout=_ENDING_S)
        for user in hanging:
            self.report.problems.append(f"{user.get_coro()} is still waiting {_ENDING_S} s after the server's end")
            user.cancel()
        for user in users:
            if user.done() and (error := user.exception()) is not None:
                raise error

    async def _compare_memory(self, bridge: Bridge) -> None:
        """Check that the new server has in memory what the file had when the old one was killed."""
        served = {
            variable.id: (variable.version, variable.value.value.decode()) for variable in await bridge.list(SESSION)
        }
        if served != self._checker.values(SESSION):
            self.report.problems.append(f"memory: the server has {served}, the file {self._checker.values(SESSION)}")

    def _check_files(self, *, started: bool = True) -> None:
        copy = copy_files(self.database, self._copies)
        before = len(self._checker.journal.running)
        self.report.problems += self._checker.check(copy, self._ledger, started=started)
        if started:
            self.report.counts["executions killed"] += before
        self.report.problems += self._ledger.complaints
        for watcher in self._watchers:
            self.report.problems += self._checker.check_watcher(SESSION, watcher.first, watcher.commits)

    async def _finish(self) -> None:
        """Use a last server: settle all unknown writes, let the watchers catch up, shut it down."""
        with await self._start() as process:
            async with Bridge(process.port) as bridge:
                for client in self._clients:
                    await client.settle(bridge)
                # A change after the last kill, which the watchers have to reach.
                await bridge.register(SESSION, "last", "integer", 1, {})
                users = [asyncio.create_task(watcher.run(bridge)) for watcher in self._watchers]
                self._checker.check(copy_files(self.database, self._copies), self._ledger)
                last = self._checker.head_of(SESSION)
                await self._catch_up(last)
                code = await asyncio.to_thread(process.terminate, _ENDING_S)
                await self._gather(users)
        if code != 0:
            self.report.problems.append(f"the server ended with exit code {code} after SIGTERM")
        self._checker = Checker()
        self._check_files()
        if self._checker.journal.running:
            self.report.problems.append(f"still running: {self._checker.journal.running} after the shutdown")
        self.report.problems += check_histories(self._ledger)
        self.report.problems += verify(copy_files(self.database, self._copies))

    async def _catch_up(self, last: int) -> None:
        """Wait until the watchers have caught up: each kill may have left them behind."""
        try:
            async with asyncio.timeout(_CATCH_UP_S):
                await asyncio.gather(*(watcher.reach(last) for watcher in self._watchers))
        except TimeoutError:
            positions = ", ".join(str(watcher.position) for watcher in self._watchers)
            self.report.problems.append(f"watch: after {_CATCH_UP_S} s watchers are at {positions}, not at {last}")

    def _sum_up(self) -> None:
        counts = self.report.counts
        counts["commits"] = self._checker.head.sequence
        for write in self._ledger.writes.values():
            counts[f"writes {write.status}"] += 1
        for status, count in self._checker.journal.statuses.items():
            counts[f"executions {status}"] += count
        counts["executions repeated"] = self._checker.journal.repeated
        counts["reads"] = sum(len(reads) for reads in self._ledger.reads.values())
        counts["commits received by watchers"] = sum(len(watcher.commits) for watcher in self._watchers)


async def _run(folder: Path, seed: int, clients: int, planted: str | None, cycles: int) -> Report:
    return await CrashTest(folder, seed, clients, planted).run(cycles, verbose=True)


if __name__ == "__main__":
    sys.exit(
        run_by_hand("crash-test", "kill a server again and again, and check its files", _run, unit="cycles", usual=200)
    )
