"""The sessions that servers hold while these are moved. The head counts their changes, which appends compare."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from dspex_persist.state.commands.sessions import MOVED
from dspex_persist.state.errors import SessionHeldError, StorageError
from dspex_persist.state.events import SessionEnded
from dspex_persist.state.shared_log import SharedHold
from dspex_persist.state.valkey import codec
from dspex_persist.state.valkey.connection import UNCERTAIN, Connection, reported
from dspex_persist.state.valkey.keys import Keys
from dspex_persist.state.valkey.leases import Leases
from dspex_persist.state.valkey.staging import BUSY, POLL_S, TURN_S

FIELD: Final = "holds"
"""What of the head counts their changes."""


class Holds:
    """The holds of all servers, as this one has seen them last.

    Args:
        reading: For what may be sent again.
        writing: For what is sent once.
        keys: The names of the keys.
        leases: The lease of this server.
        wait: Waits so many seconds, or less.

    Attributes:
        seen: The count of their changes, as the head has it.
        all: The holds by the session's id; see `SharedLog.holds`.
    """

    def __init__(
        self, reading: Connection, writing: Connection, keys: Keys, leases: Leases, wait: Callable[[float], object]
    ) -> None:
        self._reading, self._writing, self._keys, self._leases, self._wait = reading, writing, keys, leases, wait
        self.seen = b""
        self.all: Mapping[str, SharedHold] = {}
        # Whether the call that begins a hold may still arrive.
        self._is_uncertain = False

    def see(self, count: bytes | None) -> None:
        """Read the holds if they have changed.

        Args:
            count: The count of their changes. If they change again before they are read, so does this, and an append
                that compares it is refused.
        """
        count = count or b""
        if count == self.seen:
            return
        found = self._reading.client.hgetall(self._keys.holds)
        self.all = {codec.text_in(session_id): self._hold_in(content) for session_id, content in found.items()}
        self.seen = count

    def _hold_in(self, content: bytes) -> SharedHold:
        hold_id, server, _, is_full, since = json.loads(content)
        return SharedHold(hold_id, server == self._leases.server, is_full, since)

    @reported
    def begin(self, session_id: str, hold_id: str) -> None:
        """See `SharedLog.hold`."""
        try:
            words = (self._leases.token, codec.utf8(session_id), hold_id)
            answer = self._in_turn(self._writing, "hold", words)
        except UNCERTAIN:
            self._is_uncertain = True
            raise
        if answer != b"held":
            raise SessionHeldError(session_id)

    @reported
    def fill(self, hold_id: str) -> bool:
        """See `SharedLog.fill_hold`."""
        return bool(self._in_turn(self._reading, "fill", (hold_id,)) == b"held")

    def _in_turn(self, connection: Connection, function: str, words: Sequence[Any]) -> Any:
        """Call a function that is refused while another server imports."""
        keys = (*self._keys.of_leases, self._keys.turn)
        deadline = time.monotonic() + 2 * TURN_S
        while True:
            answer = connection.call(function, keys, self._leases.server, *words)
            if answer != b"turn":
                return answer
            if time.monotonic() > deadline:
                raise StorageError(BUSY)
            self._wait(POLL_S)

    @reported
    def end(self, hold_id: str) -> None:
        """See `SharedLog.end_hold`."""
        if self._is_uncertain:
            self._writing.reconnect()
            self._leases.give_up_calls(self._writing)
            self._is_uncertain = False
        self._reading.call("unhold", self._keys.of_leases, self._leases.server, hold_id)

    @reported
    def moved_to(self, session_id: str, since: int) -> str | None:
        """See `SharedLog.moved_to`."""
        client = self._reading.client
        for first in map(int, reversed(client.lrange(self._keys.lives(session_id), 0, -1))):
            (_, row), *_ = client.xrevrange(self._keys.commits(first), "+", "-", count=1)
            commit = codec.commit_in(row)
            ends = [event.reason for event in commit.events if isinstance(event, SessionEnded)]
            if ends and commit.sequence > since:
                return ends[-1].removeprefix(MOVED) if ends[-1].startswith(MOVED) else None
            if first <= since:
                break
        return None
