"""How many live sessions, and how many stored bytes in them, an identity may have. Used by the writer alone.

A session counts for the identity that began it, whoever writes to it. Its bytes are those of the values, with binary
content and metadata, of all versions that its history keeps. They are read from the log once, when a limit is first
asked about, and then counted as they are written.
"""

from collections.abc import Callable, Mapping
from typing import Final

from dspex_persist.infra.access.tokens import Allowance
from dspex_persist.state.errors import QuotaExceededError
from dspex_persist.state.model import VariableVersion, size_of

SESSIONS, BYTES = "live sessions", "stored bytes"
_FOR: Final = " for "
_MOST_OWNERS: Final = 100_000
_ENTRY_BYTES: Final = 8
"""The quotes and separators of an entry of metadata, as JSON."""


def identity_in(actor: str) -> str:
    """Return the identity that an actor of the history names: `checkout for user:ada` is `checkout`."""
    return actor.partition(_FOR)[0]


def stored_bytes(version: VariableVersion) -> int:
    """Return how many bytes of a version count."""
    entries = version.metadata.items() if version.metadata else ()
    value = version.value.size_bytes if version.value is not None else 0
    return value + sum(size_of(key) + size_of(text) + _ENTRY_BYTES for key, text in entries)


class Quotas:
    """Counts sessions and bytes of the identities that have limits.

    Args:
        allowance_of: Returns how much an identity may have.
        actor_of: Returns who made a commit, by its number.
        usage_of: Returns the live sessions that an identity began, by the numbers of their first commits, with their
            stored bytes.
    """

    def __init__(
        self,
        allowance_of: Callable[[str], Allowance],
        actor_of: Callable[[int], str],
        usage_of: Callable[[str], Mapping[int, int]],
    ) -> None:
        self._allowance_of = allowance_of
        self._actor_of = actor_of
        self._usage_of = usage_of
        self._owners: dict[int, str] = {}
        # By identity, and session. Only of identities with a limit.
        self._usage: dict[str, dict[int, int]] = {}
        self._bytes: dict[str, int] = {}
        self._is_open = False

    def begin(self) -> None:
        """Note that a group begins."""
        if self._is_open:
            # The last one was not written: what it counted is not in the log.
            self.forget()
        self._is_open = False

    def settle(self) -> None:
        """Note that the group is written."""
        self._is_open = False

    def forget(self) -> None:
        """Read everything anew when it is next needed, because more has changed than was counted."""
        self._owners.clear()
        self._usage.clear()
        self._bytes.clear()

    def start(self, first: int, actor: str) -> bool:
        """Count a new session; returns whether `take_back` has to be called if it is not written.

        Raises:
            QuotaExceededError: Its identity has as many as it may.
        """
        owner = self._owners[first] = identity_in(actor)
        sessions = self._counted(owner)
        if sessions is None:
            return False
        most = self._allowance_of(owner).sessions
        if most is not None and len(sessions) >= most:
            raise QuotaExceededError(owner, SESSIONS, len(sessions) + 1, most)
        sessions[first] = 0
        return True

    def end(self, first: int) -> int | None:
        """Count a session that ends; returns what `take_back` needs if that is not written."""
        owner = self._owner_of(first)
        sessions = self._counted(owner)
        if sessions is None or first not in sessions:
            return None
        size_bytes = sessions.pop(first)
        self._bytes[owner] -= size_bytes
        return size_bytes

    def counts(self, first: int) -> bool:
        """Return whether the bytes of a session have to be counted."""
        sessions = self._counted(self._owner_of(first))
        return sessions is not None and first in sessions

    def add(self, first: int, size_bytes: int) -> None:
        """Count bytes of a session of which `counts` says so, or with their negative take them back.

        Raises:
            QuotaExceededError: Its identity may not have as many.
        """
        owner = self._owner_of(first)
        sessions = self._counted(owner)
        if sessions is None or first not in sessions:
            # The token file has changed meanwhile.
            return
        most, total = self._allowance_of(owner).bytes, self._bytes[owner] + size_bytes
        if size_bytes > 0 and most is not None and total > most:
            raise QuotaExceededError(owner, BYTES, total, most)
        self._bytes[owner] = total
        sessions[first] += size_bytes

    def take_back(self, first: int, size_bytes: int | None = None) -> None:
        """Forget a session that was counted, or count it again with its bytes, as its end was not written."""
        owner = self._owner_of(first)
        sessions = self._usage.get(owner)
        if sessions is None:
            return
        if size_bytes is None:
            self._bytes[owner] -= sessions.pop(first, 0)
        else:
            sessions[first] = size_bytes
            self._bytes[owner] += size_bytes

    def _owner_of(self, first: int) -> str:
        owner = self._owners.get(first)
        if owner is None:
            if len(self._owners) >= _MOST_OWNERS:
                self._owners.clear()
            owner = self._owners[first] = identity_in(self._actor_of(first))
        return owner

    def _counted(self, owner: str) -> dict[int, int] | None:
        """The sessions of an identity with a limit, or None."""
        allowance = self._allowance_of(owner)
        if allowance.sessions is None and allowance.bytes is None:
            self._usage.pop(owner, None)
            return None
        self._is_open = True
        sessions = self._usage.get(owner)
        if sessions is None:
            sessions = self._usage[owner] = dict(self._usage_of(owner))
            self._bytes[owner] = sum(sessions.values())
        return sessions
