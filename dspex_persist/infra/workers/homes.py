"""Homes: which worker had an affinity key last."""

from collections import OrderedDict
from typing import Final, Generic

from dspex_persist.infra.workers.leases import C, Member

_MOST: Final = 10_000


class Homes(Generic[C]):
    """The last worker of each key, for the newest keys."""

    def __init__(self) -> None:
        self._members: OrderedDict[str, Member[C]] = OrderedDict()

    def find(self, key: str | None) -> Member[C] | None:
        """Return the worker that had a key last."""
        return None if key is None else self._members.get(key)

    def bind(self, key: str, member: Member[C]) -> None:
        """Note that a worker has a key now."""
        self.forget(key)
        self._members[key] = member
        member.keys.add(key)
        if len(self._members) > _MOST:
            oldest, its = self._members.popitem(last=False)
            its.keys.discard(oldest)

    def forget(self, key: str) -> bool:
        """Forget who had a key; returns whether somebody had it."""
        member = self._members.pop(key, None)
        if member is not None:
            member.keys.discard(key)
        return member is not None

    def remove(self, member: Member[C]) -> None:
        """Forget a worker that is not there any more."""
        for key in member.keys:
            self._members.pop(key, None)
        member.keys.clear()
