"""An import, which is written ahead under keys that nobody reads, while the other servers wait for its end."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import redis

from dspex_persist.state.errors import StorageError
from dspex_persist.state.model import EventKind
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import UnitOfWork
from dspex_persist.state.valkey import codec
from dspex_persist.state.valkey.batch import Batch, Commands
from dspex_persist.state.valkey.connection import Connection, reason_of
from dspex_persist.state.valkey.heads import Head
from dspex_persist.state.valkey.keys import Keys
from dspex_persist.state.valkey.leases import Leases

TURN_S: Final = 30.0
"""How long others wait for an import that does not go on."""
POLL_S: Final = 0.05
BUSY: Final = "another server is importing a session"
OVER: Final = "the import took too long, and another server has written since"


class Import:
    """An import under way.

    Args:
        connection: For what is sent once.
        keys: The names of the keys.
        leases: The lease of this server.
        on_fenced: Begins another lease, and raises `FencedError`.

    Attributes:
        commands: Those on keys that others read, which are carried out at its end.
    """

    def __init__(self, connection: Connection, keys: Keys, leases: Leases, on_fenced: Callable[[], None]) -> None:
        self._connection, self._keys, self._leases, self._on_fenced = connection, keys, leases, on_fenced
        self.commands = Commands()
        self._head: Head | None = None
        self._first: int | None = None
        self._since = self._until = 0
        self._session_id = ""
        self._has_ended = False

    def begin(self, wait: Callable[[float], object]) -> None:
        """Wait for other imports, and take the turn.

        Args:
            wait: Waits so many seconds, or less.

        Raises:
            StorageError: Another import takes too long.
        """
        deadline = time.monotonic() + 2 * TURN_S
        while True:
            answer = self._call("turn")
            if answer == b"begun":
                return
            if answer == b"fenced":
                self._on_fenced()
            if time.monotonic() > deadline:
                raise StorageError(BUSY)
            wait(POLL_S)

    def _call(self, function: str, words: Sequence[Any] = ()) -> Any:
        keys = (self._keys.servers, self._keys.turn, self._keys.staged)
        milliseconds = int(TURN_S * 1000)
        return self._connection.call(function, keys, self._leases.server, self._leases.token, milliseconds, *words)

    def stage(
        self,
        units: Sequence[UnitOfWork],
        touched: Sequence[SessionState],
        head: Head,
        new_batch: Callable[[bytes, int | None], Batch],
        part_bytes: int,
    ) -> None:
        """Write the next commits ahead.

        Args:
            units: The commits. Those before the first one of the imported session end the one that had its id.
            touched: Sessions whose expiry is to be saved.
            head: The head before the import.
            new_batch: Makes a batch after a commit with a hash, for an imported session.
            part_bytes: How large a call is at most.
        """
        if self._first is None:
            self._first = next((unit.state.session.sequence for unit in reversed(units) if unit.state), None)
        head = self._head or head
        batch = new_batch(head.hash, self._first)
        for unit in units:
            batch.add(unit)
            head = head._replace(sequence=unit.sequence, hash=batch.hash)
            self._note(unit)
        batch.finish(touched)
        self._head = head
        self.commands.extend(batch.shared)
        for part in batch.own.parts(part_bytes):
            self._send(part)

    def _note(self, unit: UnitOfWork) -> None:
        assert unit.state is not None, "a unit with changes has a session"
        if unit.state.session.sequence == self._first:
            self._since, self._until = self._since or unit.sequence, unit.sequence
            self._session_id = unit.state.session.id
            self._has_ended = any(event.kind is EventKind.SESSION_ENDED for event in unit.events)

    def _send(self, words: Sequence[Any]) -> None:
        try:
            answer = self._call("stage", words)
        except redis.RedisError as error:
            # Carried out or not: it is given up, and nobody has read any of it.
            raise StorageError(reason_of(error)) from error
        if answer == b"fenced":
            self._on_fenced()
        if answer == b"over":
            raise StorageError(OVER)

    def end(self) -> Head | None:
        """Add the entry of the log to `commands`, and return the head after it; None if nothing was imported."""
        if self._head is None or not self._until:
            return None
        facts = ("s", self._first, "i", codec.utf8(self._session_id), "h", self._head.hash, "f", self._since)
        mark = ("e", 1) if self._has_ended else ()
        self.commands.add("XADD", self._keys.log, f"{self._until}-0", *facts, *mark)
        return self._head

    def give_up(self) -> None:
        """Delete what was written ahead, and let the others write. If that fails, whoever writes next does it."""
        self._connection.reconnect()
        self._connection.call("release", (self._keys.turn, self._keys.staged), self._leases.server)
