"""The workers of a pool that are ready: which of them a call gets. Knows neither how they start nor how they end."""

from collections.abc import Iterator
from typing import Generic

from dspex_persist.infra.workers.homes import Homes
from dspex_persist.infra.workers.leases import C, Member, Waiter
from dspex_persist.infra.workers.options import Affinity


class Members(Generic[C]):
    """The workers that are ready, until they have left the pool.

    Attributes:
        all: All of them, by their ids.
        idle: Those that can be lent, by the time of their return: the last one is the warmest.
        homes: Which of them had an affinity key last.
    """

    def __init__(self, affinity: Affinity) -> None:
        self.all: dict[str, Member[C]] = {}
        self.idle: dict[str, Member[C]] = {}
        self.homes = Homes[C]()
        self._affinity = affinity

    def __iter__(self) -> Iterator[Member[C]]:
        # A copy: whoever looks at them may be another thread, or have one leave.
        return iter(list(self.all.values()))

    @property
    def are_idle(self) -> bool:
        """Whether none of them is lent, or about to leave."""
        return len(self.idle) == len(self.all)

    def add(self, member: Member[C]) -> None:
        """Add a worker that has just got ready."""
        self.all[member.worker.id] = self.idle[member.worker.id] = member

    def remove(self, member: Member[C]) -> None:
        """Remove a worker that has left."""
        self.all.pop(member.worker.id, None)
        self.idle.pop(member.worker.id, None)
        self.homes.remove(member)

    def regular(self) -> list[Member[C]]:
        """Return those that stay, without spares; from any thread."""
        return [member for member in self if not member.spare and not member.over.done()]

    def pick(self, waiter: Waiter[C]) -> Member[C] | None:
        """Return the idle worker for a call, if there is one; no spare."""
        home = self.homes.find(waiter.key)
        if home is not None:
            if home.worker.id in self.idle:
                return home
            if self._affinity != "hint" and waiter.parent is None and not home.over.done():
                return None
        free = [member for member in self.idle.values() if not member.spare]
        if not free:
            return None
        if waiter.key is None:
            return free[-1]
        # Sessions are spread, so that each finds its worker free.
        return min(reversed(free), key=lambda member: len(member.keys))

    def idle_spare(self) -> Member[C] | None:
        """Return a spare that can be lent."""
        return next((member for member in self.idle.values() if member.spare), None)

    def are_stuck(self, depth: int) -> bool:
        """Whether all workers that are lent wait for nested calls, and no spare does a call of this depth or deeper."""
        busy = [member for member in self.all.values() if member.worker.id not in self.idle]
        if not all(member.lease is not None and member.lease.waiting for member in busy):
            return False
        return not any(member.spare and member.lease is not None and member.lease.depth >= depth for member in busy)
