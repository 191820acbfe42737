"""A bounded cache of sessions, with approximate LRU eviction."""

from dspex_persist.state.session_state import SessionState


class _Entry:
    __slots__ = ("state", "touched")

    def __init__(self, state: SessionState) -> None:
        self.state = state
        self.touched = False


class SessionCache:
    """Published states by session id. Any thread reads; only the writer puts, drops and evicts.

    Attributes:
        size_bytes: How much memory they take.
        hits: How often a session was found; 0 unless it is a `CountingCache`.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: dict[str, _Entry] = {}
        self.size_bytes = self.hits = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, session_id: str) -> SessionState | None:
        """Return the session's published state if it is cached."""
        entry = self._entries.get(session_id)
        if entry is None:
            return None
        entry.touched = True
        return entry.state

    def put(self, session_id: str, state: SessionState) -> None:
        """Publish a state: all later reads see it."""
        entry = self._entries.get(session_id)
        if entry is None:
            self._entries[session_id] = _Entry(state)
            self.size_bytes += state.weight_bytes
        else:
            self.size_bytes += state.weight_bytes - entry.state.weight_bytes
            entry.state = state

    def drop(self, session_id: str) -> None:
        """Remove a session from the cache."""
        entry = self._entries.pop(session_id, None)
        if entry is not None:
            self.size_bytes -= entry.state.weight_bytes

    def clear(self) -> None:
        """Remove all sessions."""
        self._entries.clear()
        self.size_bytes = 0

    def evict(self) -> None:
        """Remove sessions that were not used since the last round, until the cache is within its limit."""
        while self.size_bytes > self._limit_bytes and len(self._entries) > 1:
            session_id = next(iter(self._entries))
            entry = self._entries[session_id]
            if entry.touched:
                # Used since the last round: back to the end of the queue.
                entry.touched = False
                del self._entries[session_id]
                self._entries[session_id] = entry
            else:
                self.drop(session_id)


class CountingCache(SessionCache):
    """A cache that counts."""

    def find(self, session_id: str) -> SessionState | None:
        """See `SessionCache.find`."""
        state = super().find(session_id)
        if state is not None:
            # Without a lock: what two threads count at the very same time may count once.
            self.hits += 1
        return state
