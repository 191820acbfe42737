"""The monkey of the chaos test: kills, stops and starves the workers of a server at random, and disturbs the server.

What it does for a while it undoes by itself, and all of it when it is told to rest. It needs Linux.
"""

import asyncio
import contextlib
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from random import Random

from dspex_persist.infra.holder import fields_of

RUN, WORKER = b"DSPEX_RUN=", b"DSPEX_WORKER="
_LONGEST_S = 1.0
_STARTING_S = 1.0
_PATIENT = 0.9
_PAUSE_S = (0.02, 0.3)
# More than the worker has: its next large allocation fails, and small ones do not at once.
_ROOM_BYTES = 4 * 1024 * 1024


def processes() -> Iterator[int]:
    """The processes of this machine."""
    yield from [int(each) for each in os.listdir("/proc") if each.isdecimal()]  # noqa: PTH208 - names only


def mark_of(pid: int, name: bytes = RUN) -> bytes:
    """What the environment of a process says of its run; b"" without that, or without the process."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
    return next((each for each in environment.split(b"\0") if each.startswith(name)), b"")


def address_space_of(pid: int) -> int:
    """The size of what a process has mapped, in bytes."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None


def age_s_of(pid: int) -> float:
    """How long a process has been there, in seconds."""
    fields = fields_of(pid)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def workers_of(server: int) -> list[int]:
    """The workers of a server, those that are starting included."""
    return [pid for pid in processes() if fields_of(pid)[1:2] == [str(server)] and mark_of(pid, WORKER)]


class Monkey:
    """Disturbs one server.

    Args:
        random: Decides.
        server: The server's process.
        done: Counts what it does.

    Attributes:
        runs: What marks the processes of the server's workers.
        seen: The workers that it has seen.
    """

    def __init__(self, random: Random, server: int, done: Counter[str]) -> None:
        self.runs = set[bytes]()
        self.seen = set[int]()
        self._random = random
        self._server = server
        self._done = done
        self._for_a_while = set[asyncio.Task[None]]()
        self._acts: Mapping[Callable[[], Awaitable[None]], int] = {
            self._kill: 4,
            self._end: 1,
            self._stop: 4,
            self._starve_of_memory: 2,
            self._starve_of_files: 2,
            self._stop_the_server: 2,
            self._starve_the_server_of_files: 2,
        }

    async def run(self) -> None:
        """Disturb, until cancelled; then undo what would end by itself."""
        try:
            while True:
                [act] = self._random.choices(list(self._acts), list(self._acts.values()))
                # What is disturbed may have ended.
                with contextlib.suppress(ProcessLookupError, PermissionError, FileNotFoundError):
                    await act()
                await asyncio.sleep(self._random.uniform(*_PAUSE_S))
        finally:
            for each in self._for_a_while:
                each.cancel()
            await asyncio.gather(*self._for_a_while, return_exceptions=True)

    def look(self) -> list[int]:
        """Return the workers as they are now."""
        workers = workers_of(self._server)
        self.seen |= {*workers}
        self.runs |= {mark for pid in workers if (mark := mark_of(pid))}
        return workers

    def _one(self) -> int:
        workers = self.look()
        # Rarely one that is starting: a pool that cannot start workers takes a pause.
        ready = [pid for pid in workers if age_s_of(pid) > _STARTING_S]
        if self._random.random() < _PATIENT:
            workers = ready
        if not workers:
            raise ProcessLookupError
        return self._random.choice(workers)

    def _count(self, what: str) -> None:
        self._done[f"workers {what}"] += 1

    async def _kill(self) -> None:
        os.kill(self._one(), signal.SIGKILL)
        self._count("killed")

    async def _end(self) -> None:
        os.kill(self._one(), signal.SIGTERM)
        self._count("ended by SIGTERM")

    async def _stop(self) -> None:
        pid = self._one()
        os.kill(pid, signal.SIGSTOP)
        self._count("stopped")
        self._undo_later(lambda: os.kill(pid, signal.SIGCONT))

    async def _starve_of_memory(self) -> None:
        pid = self._one()
        self._limit(pid, resource.RLIMIT_AS, address_space_of(pid) + _ROOM_BYTES)
        self._count("starved of memory")

    async def _starve_of_files(self) -> None:
        self._limit(self._one(), resource.RLIMIT_NOFILE, self._random.randrange(3, 20))
        self._count("starved of files")

    async def _stop_the_server(self) -> None:
        os.kill(self._server, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._random.uniform(0.05, _LONGEST_S / 2))
        finally:
            # An error here would hide that this was cancelled.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._server, signal.SIGCONT)
        self._done["servers stopped"] += 1

    async def _starve_the_server_of_files(self) -> None:
        used = len(os.listdir(f"/proc/{self._server}/fd"))  # noqa: PTH208 - their number
        self._limit(self._server, resource.RLIMIT_NOFILE, used + self._random.randrange(-3, 6))
        self._done["servers starved of files"] += 1

    def _limit(self, pid: int, what: int, soft: int) -> None:
        before = resource.prlimit(pid, what)
        if before[0] != before[1] and before[0] != resource.RLIM_INFINITY and before[0] < 1_000:
            # It is limited already.
            return
        resource.prlimit(pid, what, (soft, before[1]))
        self._undo_later(lambda: resource.prlimit(pid, what, before))

    def _undo_later(self, undo: Callable[[], object]) -> None:
        task = asyncio.create_task(self._undo(undo, self._random.uniform(0.05, _LONGEST_S)))
        self._for_a_while.add(task)
        task.add_done_callback(self._for_a_while.discard)

    @staticmethod
    async def _undo(undo: Callable[[], object], after_s: float) -> None:
        try:
            await asyncio.sleep(after_s)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                undo()
