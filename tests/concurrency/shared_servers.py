"""Servers that share a log in memory, to which things happen: they stop for a while, or an answer is lost.

What happens is what happens to processes on a database. A server that is stopped does nothing at all until it goes
on, by when others may have fenced it. A group whose answer is lost was stored, or was not, or is stored after the
server has given up waiting for it: the server has to find out.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from random import Random
from typing import Any

from dspex_persist.state.errors import OutcomeUnknownError, StorageError
from dspex_persist.state.log_store import News
from dspex_persist.state.options import SessionOptions
from dspex_persist.state.shared import SharedGroups, SharedState
from dspex_persist.testing.shared_memory_log import SharedMemory, SharedMemoryLog
from tests.deadline import within


class Fate(Enum):
    """What becomes of a group whose server hears nothing of it."""

    NOT_SENT = "it is not stored"
    ANSWER_LOST = "it is stored"
    LATE = "it is stored once its server has given up"
    UNKNOWN = "it is stored, and nobody can tell the server"


class ChaoticLog(SharedMemoryLog):
    """A log that can be stopped, and that loses answers.

    Attributes:
        fate: Returns what is to become of the next group; None for nothing out of the ordinary.
        hints: Whether the others are told of news at once.
        settles_safely: Whether it makes sure that a group which it has given up cannot be stored any more.
    """

    settles_safely = True

    def __init__(self, memory: SharedMemory, **options: Any) -> None:
        self.fate: Callable[[], Fate | None] = lambda: None
        self.hints = True
        self._goes_on = threading.Event()
        self._goes_on.set()
        super().__init__(memory, **options)

    def stop(self) -> None:
        """Stop: from now on it asks for nothing, and gets no answer."""
        self._goes_on.clear()

    def go_on(self) -> None:
        """Go on."""
        self._goes_on.set()

    def _halt(self) -> bool:
        """Wait while it is stopped; returns whether it was."""
        stopped = not self._goes_on.is_set()
        assert self._goes_on.wait(within(60)), "nobody lets it go on"
        return stopped

    def head(self) -> int:
        head = super().head()
        # The answer was under way.
        self._halt()
        return head

    def news(self) -> News | None:
        self._halt()
        return super().news()

    def renew(self) -> None:
        self._halt()
        super().renew()

    def fence(self) -> Sequence[str]:
        self._halt()
        return super().fence()

    def tell(self) -> None:
        if self.hints:
            super().tell()

    @contextmanager
    def group(self, *, wait: bool = True) -> Iterator[News | None]:
        self._halt()
        with super().group(wait=wait) as news:
            yield news
            if self._optimistic:
                self._halt()
            elif not self._goes_on.is_set():
                self._be_cut_off()

    def _be_cut_off(self) -> None:
        """The database ends a transaction that does nothing, so that the others go on."""
        self._appended = []
        self._memory.turn.release()
        try:
            self._halt()
        finally:
            self._memory.turn.acquire()
        raise StorageError("the database has ended the transaction")

    def store(self) -> None:
        fate = self.fate()
        if fate is None:
            super().store()
        elif fate is Fate.NOT_SENT:
            raise StorageError("the connection broke before the group was sent")
        elif fate is Fate.UNKNOWN:
            known = self._sequence
            super().store()
            self._sequence = known
            raise OutcomeUnknownError("the connection broke, and there is no other")
        else:
            self._settle(self._sent() if fate is Fate.LATE else super().store())

    def _sent(self) -> Callable[[], None]:
        """Return a group that is under way: the log takes it if it is the next, from a server with a lease."""
        known, epoch, appended = self._sequence, self._epoch, self._appended

        def arrive() -> None:
            if self._memory.leases[self._id][0] == epoch and self._memory.sequence == known:
                for units, touched in appended:
                    self._memory.keep(units, touched, (self._id, epoch))

        return arrive

    def _settle(self, arrive: Callable[[], None] | None) -> None:
        """Find out whether a group is stored. One that is under way arrives right after it has been looked for."""
        if arrive is None:
            return
        known = self._sequence
        if self.settles_safely and self._optimistic:
            self._begin_another_epoch()
        elif self.settles_safely:
            # The lock is free when the database has done with the group, in whichever way.
            arrive()
        is_stored = self._memory.sequence > known
        arrive()
        if not is_stored:
            raise StorageError("the connection broke, and the group is not stored")
        self._sequence = self._memory.sequence

    def _begin_another_epoch(self) -> None:
        """Have nothing stored any more that was sent before; what runs here goes on."""
        before, self._epoch = self._epoch, self._epoch + 1
        self._memory.leases[self._id] = (self._epoch, time.monotonic())
        for execution_id, owner in self._memory.owners.items():
            if owner == (self._id, before):
                self._memory.owners[execution_id] = (self._id, self._epoch)


class Servers:
    """Several servers on one log. Use it in a `with` block.

    Args:
        count: How many there are.
        optimistic: Whether their log is without a lock.
        lease_s: The lease of each server, in seconds.
        sweep_s: How often each of them looks for dead ones, in seconds.
        options: The options of their sessions.
        hints: Whether they tell each other of news at once.
        log: The class of their logs.
    """

    def __init__(
        self,
        count: int,
        *,
        optimistic: bool = False,
        lease_s: float = 15.0,
        sweep_s: float = 30.0,
        options: SessionOptions | None = None,
        hints: bool = True,
        log: type[ChaoticLog] = ChaoticLog,
    ) -> None:
        self.memory = SharedMemory()
        self.logs = [log(self.memory, optimistic=optimistic, lease_s=lease_s) for _ in range(count)]
        for each in self.logs:
            each.hints = hints
        self.states = [SharedState(SharedGroups(each, options), sweep_interval_s=sweep_s) for each in self.logs]

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, *_: object) -> None:
        for log in self.logs:
            log.go_on()
        for state in self.states:
            state.close()


class Chaos:
    """Stops servers for a moment, now and then, on a thread of its own. Use it in a `with` block.

    Args:
        servers: The servers.
        seed: The seed of what happens.
        most_s: How long one stands still at most, in seconds.
        losses: How often the answer to a group is lost, from 0 to 1.
    """

    def __init__(self, servers: Servers, seed: int, *, most_s: float = 0.1, losses: float = 0.1) -> None:
        self.stops = 0
        self.lost: list[Fate] = []
        self._servers = servers
        self._random = Random(seed)
        self._fates = itertools.cycle(Fate)
        self._most_s = most_s
        self._losses = losses
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _fate(self) -> Fate | None:
        if self._random.random() >= self._losses:
            return None
        self.lost.append(next(self._fates))
        return self.lost[-1]

    def _run(self) -> None:
        while not self._over.is_set():
            log = self._random.choice(self._servers.logs)
            log.stop()
            self.stops += 1
            self._over.wait(self._random.uniform(0, self._most_s))
            log.go_on()
            self._over.wait(self._random.uniform(0, self._most_s / 2))

    def __enter__(self) -> "Chaos":
        for log in self._servers.logs:
            log.fate = self._fate
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for log in self._servers.logs:
            log.fate = lambda: None
            log.go_on()
