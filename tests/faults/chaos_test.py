"""Servers with pools of workers, which are killed, stopped and starved at random under load.

    make chaos-test MINUTES=15          # or: python -m tests.faults.chaos_test --minutes 15 [--seed N] [--clients 6]

The clients are those of the crash test, and their tools run in workers: of the server's own, and in a pool of stand-ins
for existing ones. Besides, they call tools that misbehave, tools of one pool that call tools of the other, and give up
calls. A monkey kills workers, stops them, takes their memory and descriptors, and does the same to the server but for
its memory. Servers end by SIGKILL, and by SIGTERM.

The checks are those of the crash test. In addition: every caller hears in time; as soon as there is peace, all pools
have all of their workers, free; nothing is left of a server that has ended; the journal says why each execution failed.
Exit code 0: no problems. 1: problems, which are printed, and the files are kept.
"""

import asyncio
import json
import os
import re
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import grpc.aio

from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as audit_pb
from tests.deadline import within
from tests.faults import chaos_tools
from tests.faults.auditor import Auditor
from tests.faults.bridge import Bridge, ToolAnswer
from tests.faults.by_hand import run_by_hand
from tests.faults.checker import copy_files
from tests.faults.crash_test import CrashTest, Report
from tests.faults.ledger import Ledger, Write
from tests.faults.monkey import Monkey, mark_of, processes
from tests.faults.workload import Client, Names, Watcher
from tests.infra.test_helpers import is_gone

_LIFE_S = 20.0
_HEAR_S = within(10)
_REST_S = within(10)
# Longer than the pause after workers that failed at once.
_WHOLE_S = within(10)
_GONE_S = within(5)
_ENDING_S = within(15)
_ROOT = Path(__file__).parents[2]
_OWN_TOOLS = ("spread", "spread_async", "call_others", "chatter", "use_up_files", "leave_child")
_THERE = ("spread_there", "spread_and_call", "spread_further")
_POOLS = """
[pools.tools]
call_timeout_s = 8
kill_rss_bytes = "180MiB"
max_requests = 200
health_interval_s = 1
crash_pause_s = 1

[pools.there]
command = ["{python}", "-m", "tests.workers.stand_in", "--generation", "{generation}", "--port", "{{port}}",
  "--elixir-address", "{{address}}", "--snakepit-run-id", "{{run_id}}", "--ignores-term-s", "0.2"]
size = {size}
tools = {tools}
streaming = ["stream_there"]
call_timeout_s = 8
health_interval_s = 1
crash_pause_s = 1
env = {{ PYTHONPATH = "{path}" }}
"""


class NoAnswerError(Exception):
    """A caller has heard nothing in time. It is among the complaints."""


class ChaosClient(Client):
    """A client of the crash test whose server lives on when a call fails."""

    def __init__(self, number: int, seed: int, ledger: Ledger, names: Names) -> None:
        super().__init__(number, seed, ledger, names)
        self.is_gone: Callable[[], bool] = lambda: False
        self.resting = False
        self._actions = {
            **self._actions,
            self._spread: 4,
            self._spread_there: 6,
            self._misbehave: 3,
            self._give_up: 3,
        }

    async def run(self, bridge: Bridge) -> None:
        """Work until the server has gone, or a rest is due."""
        self._bridge = bridge
        actions, weights = list(self._actions), list(self._actions.values())
        while not self.resting and not self.is_gone():
            began = time.monotonic()
            try:
                if self._unsettled:
                    await self._send(self._unsettled[0])
                    self._unsettled.pop(0)
                    continue
                [action] = self._random.choices(actions, weights)
                await action()
            except NoAnswerError:
                return
            except grpc.aio.AioRpcError as error:
                self._ledger.endings[error.code().name] += 1
                # The server's own answer may have this status, too.
                if time.monotonic() - began > _HEAR_S * 0.9 and not self.is_gone():
                    self._ledger.complaints.append(f"no answer: client {self._number} waited: {error.details()}")
                    return
                await asyncio.sleep(0.01)

    async def _ask_tool(self, write: Write) -> ToolAnswer:
        try:
            async with asyncio.timeout(_HEAR_S):
                return await super()._ask_tool(write)
        except TimeoutError:
            self._ledger.complaints.append(f"no answer: {write} within {_HEAR_S:g} s")
        raise NoAnswerError

    def _targets(self) -> list[str]:
        """Variables that nobody else writes around one that all write."""
        shared = self._random.sample(self._names.texts, 1)
        return [self._names.own[self._number], *shared, self._names.rolled[self._number]]

    async def _spread(self) -> None:
        """Write by one of the server's tools."""
        tool = self._random.choice((*_OWN_TOOLS, "spread", "stream", "stream_async"))
        await self._try(self._new_execution(tool, self._targets()))

    async def _spread_there(self) -> None:
        """Write by a tool of an existing worker."""
        tool = self._random.choice((*_THERE, "stream_there"))
        await self._try(self._new_execution(tool, self._targets()))

    async def _misbehave(self) -> None:
        """Have a tool write and then end its worker, take all of its memory, or not return."""
        tool = self._random.choice(("die", "die", "hang", "grow"))
        await self._try(self._new_execution(tool, self._targets()))

    async def _give_up(self) -> None:
        """Cancel a call after a moment: whatever it has written is there as a whole or not at all."""
        tool = self._random.choice((*_OWN_TOOLS, *_THERE, "stream", "stream_there"))
        write = self._new_execution(tool, self._targets())
        try:
            async with asyncio.timeout(self._random.uniform(0, 0.2)):
                await self._send(write)
        except TimeoutError:
            self._leave_open(write)

    async def succeed(self, tool: str) -> Write:
        """Execute a tool to its end; returns what is known of it."""
        write = self._new_execution(tool, self._targets())
        await self._try(write)
        return write


class Chaos(CrashTest):
    """The crash test on servers with workers, and with a monkey."""

    def __init__(
        self, folder: Path, seed: int, clients: int = 6, planted: str | None = None, *, size: tuple[int, int] = (2, 2)
    ) -> None:
        super().__init__(folder, seed, clients, planted)
        self._config = folder / "pools.toml"
        self._log = folder / "server.log"
        self._log_read = 0
        self._sizes = dict(zip(("tools", "there"), size, strict=True))
        self._more = ["--tools", chaos_tools.TOOLS, "--workers", str(size[0]), "--config", str(self._config)]
        self._seen: set[int] = set()
        self._runs: set[bytes] = set()
        self._explained = 0

    async def chaos(self, seconds: float, lives: int | None = None, *, verbose: bool = False) -> Report:
        """Disturb servers for that long, check, and shut the last one down. Stops after the first with a problem."""
        try:
            return await self._chaos(seconds, lives, verbose=verbose)
        finally:
            # Of a server with a planted bug, something may be left.
            for pid in self._left():
                os.kill(pid, signal.SIGKILL)

    async def _chaos(self, seconds: float, lives: int | None, *, verbose: bool) -> Report:
        began = time.monotonic()
        lives = lives or max(2, round(seconds / _LIFE_S))
        names = await self._set_up()
        # What it has logged is read when it has ended.
        self._argv = ["sh", "-c", 'exec "$@" 2>>"$0"', str(self._log), *self._argv, *self._more]
        self._clients = [ChaosClient(number, self.report.seed, self._ledger, names) for number in range(self._count)]
        self._watchers = [Watcher(self._ledger, 0)]
        while self.report.cycles < lives and not self.report.problems:
            self.report.cycles += 1
            self._configure("old" if self.report.cycles % 2 else "new")
            with suppress(NoAnswerError):
                await self._live(seconds / lives, rest=self.report.cycles % 3 != 0)
            self._check_files()
            self._check_reasons()
            self._check_log()
            if verbose:
                done = ", ".join(f"{count} {what}" for what, count in self.report.counts.items())
                head = self._checker.head.sequence
                print(f"  {time.monotonic() - began:.0f} s, {head:,} commits, {done}", flush=True)
        if not self.report.problems:
            self._configure("old")
            await self._finish()
            await self._check_gone(everything=True)
            self._check_reasons()
            self._check_log()
        self._sum_up()
        self.report.took_s = time.monotonic() - began
        return self.report

    def _configure(self, generation: str) -> None:
        text = _POOLS.format(
            python=sys.executable,
            generation=generation,
            size=self._sizes["there"],
            tools=json.dumps(_THERE),
            path=f"{_ROOT}:{_ROOT / 'tests/assets/stubs'}",
        )
        self._config.write_text(text)

    async def _live(self, seconds: float, *, rest: bool) -> None:
        """Let a server live, and disturb it. It gets a rest before it ends, or ends in the middle of all."""
        with await self._start() as process:
            self._check_gone_before()
            monkey = Monkey(self._random, process.pid, self.report.counts)
            monkey.seen, monkey.runs = self._seen, self._runs
            monkey.look()
            disturbing = asyncio.create_task(monkey.run())
            async with Bridge(process.port) as bridge:
                watching = [asyncio.create_task(watcher.run(bridge)) for watcher in self._watchers]
                working = self._work(process, bridge)
                await asyncio.sleep(seconds)
                if rest:
                    await self._stop_disturbing(disturbing)
                    await self._rest(working)
                    await self._check_whole(process, bridge)
                    working = self._work(process, bridge)
                    await asyncio.sleep(seconds / 10)
                monkey.look()
                if process.exit_code is not None:
                    self.report.problems.append(f"the server ended by itself: {self._last_words()}")
                elif self.report.cycles % 2 and not self.report.problems:
                    process.kill()
                    await self._stop_disturbing(disturbing)
                else:
                    await self._stop_disturbing(disturbing)
                    await self._terminate(process)
                process.kill()
                await self._gather([*working, *watching])
            await self._check_gone()

    def _work(self, process: ServerProcess, bridge: Bridge) -> list[asyncio.Task[None]]:
        for client in self._clients:
            assert isinstance(client, ChaosClient)
            client.is_gone = lambda: process.exit_code is not None
            client.resting = False
        return [asyncio.create_task(client.run(bridge)) for client in self._clients]

    async def _rest(self, working: Sequence[asyncio.Task[None]]) -> None:
        for client in self._clients:
            assert isinstance(client, ChaosClient)
            client.resting = True
        _, hanging = await asyncio.wait(working, timeout=_REST_S)
        self.report.problems += [f"no answer: {each.get_coro()} still waits after {_REST_S:g} s" for each in hanging]
        for each in working:
            if each.done():
                each.result()

    @staticmethod
    async def _stop_disturbing(disturbing: asyncio.Task[None]) -> None:
        disturbing.cancel()
        with suppress(asyncio.CancelledError):
            await disturbing

    async def _terminate(self, process: ServerProcess) -> None:
        if (code := await asyncio.to_thread(process.terminate, _ENDING_S)) != 0:
            self.report.problems.append(f"the server ended with {code} after SIGTERM: {self._last_words()}")

    # The checks

    async def _check_whole(self, process: ServerProcess, bridge: Bridge) -> None:
        """All pools have all of their workers, which are free, and run tools."""
        deadline, pools = time.monotonic() + _WHOLE_S, list[Any]()
        client = self._clients[0]
        assert isinstance(client, ChaosClient)
        async with Auditor(process.port) as auditor:
            while not pools or any(not self._is_whole(pool) for pool in pools):
                if process.exit_code is not None:
                    return
                if time.monotonic() > deadline:
                    self.report.problems += [f"pool: {pool} after {_WHOLE_S:g} s of peace" for pool in pools]
                    return
                # A worker that has done a call is one that works: so a pool knows that others may be started.
                await asyncio.gather(client.succeed("increment"), client.succeed("spread_there"))
                [answer] = await auditor.ask("ListWorkers", audit_pb.ListWorkersRequest())
                pools = list(answer.pools)
        for tool in ("spread", "call_others", "spread_there", "spread_further", "stream_there", "stream"):
            if (write := await client.succeed(tool)).status != "ok":
                self.report.problems.append(f"pool: {write} in peace")

    def _is_whole(self, pool: Any) -> bool:
        return bool(pool.state == "running" and pool.idle - pool.spares == self._sizes[pool.pool] and not pool.queued)

    async def _check_gone(self, *, everything: bool = False) -> None:
        """Nothing is left of workers whose server has ended, or of what they have started, if that ended in peace."""
        deadline = time.monotonic() + _GONE_S
        while left := [pid for pid in self._left() if everything or pid in self._seen]:
            if time.monotonic() > deadline:
                self.report.problems.append(f"orphan: {left} still run {_GONE_S:g} s after the end of their server")
                return
            await asyncio.sleep(0.02)

    def _check_gone_before(self) -> None:
        """Nothing is left of earlier servers when the next one is ready."""
        if left := self._left():
            self.report.problems.append(f"orphan: {left} still run, and the next server is ready")

    def _left(self) -> list[int]:
        return [pid for pid in processes() if mark_of(pid) in self._runs and not is_gone(pid)] if self._runs else []

    def _check_reasons(self) -> None:
        """The journal says of each execution that failed why it did."""
        copy = copy_files(self.database, self._copies)
        with closing(sqlite3.connect(copy)) as connection:
            ends = [*connection.execute(_ENDS, (self._explained,))]
        for sequence, text in ends:
            self._explained = max(self._explained, sequence)
            end = json.loads(text)
            failure = end.get("failure") or {}
            # An exception such as MemoryError has no text, but says where it was.
            said = failure.get("type") and (failure.get("message") or failure.get("traceback"))
            if end["status"] in ("failed", "timed_out") and not said:
                self.report.problems.append(f"journal: {end['execution_id']} is {end['status']}, without a reason")
            if failure:
                self.report.counts[f"failed with {failure['type']}"] += 1

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-4_000:]

    def _check_log(self) -> None:
        """Nothing is in a server's log that nobody has foreseen."""
        text = self._log.read_bytes()
        lines, self._log_read = text[self._log_read :].splitlines(), len(text)
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                # What gRPC's core writes, it writes by itself: that there are no more descriptors, for example.
                if not _OF_CORE.match(line):
                    self.report.problems.append(f"log: {line!r}")
                continue
            if event["level"] in ("error", "critical") and event["event"] not in _FORESEEN:
                self.report.problems.append(f"log: {event['event']}: {event.get('exception', event)}")


_OF_CORE = re.compile(rb"[EWI][0-9]{4} [0-9:.]+ ")
_FORESEEN = ("workers fail at once; no other is started for a while",)
_ENDS = "SELECT sequence, body FROM events WHERE kind = 'execution_ended' AND sequence > ?"


async def _run(folder: Path, seed: int, clients: int, planted: str | None, minutes: float) -> Report:
    return await Chaos(folder, seed, clients, planted).chaos(minutes * 60, verbose=True)


if __name__ == "__main__":
    description = "disturb servers with workers at random, for a long time"
    sys.exit(run_by_hand("chaos-test", description, _run, unit="minutes", usual=15.0, clients=6, needs_proc=True))
