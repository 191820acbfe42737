"""Calls that a server refused because of who made them. Independent of SQL and of the wire.

They are counted: refusals that differ in nothing but their time are one entry for each minute, and a minute has at most
`_MOST_IN_MINUTE` entries, so that nobody fills a disk by being refused. No entry has a token or a value.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from dspex_persist import clock
from dspex_persist.infra.logs import get_logger

MINUTE: Final = timedelta(minutes=1)
OTHERS: Final = "several"
"""Stands in an entry for what it does not tell apart."""
_MOST_IN_MINUTE: Final = 500
_MOST_WAITING: Final = 5_000
_LONGEST: Final = 255
_log: Final = get_logger(__name__)


class Refused(NamedTuple):
    """What was refused, to whom.

    Attributes:
        identity: Who made the call; "" if the server does not know.
        peer: The host that the call came from, such as `ipv4:10.0.0.7`; `unix` for a Unix socket.
        rpc: The full name of the rpc.
        session_id: The session that it was about; "" if that was not looked at.
        missing: What the caller lacked, such as `scope write`.
    """

    identity: str
    peer: str
    rpc: str
    session_id: str
    missing: str


@dataclass(frozen=True, slots=True)
class Denial:
    """Refusals within a minute that differ in nothing else. See `Refused` for the first fields.

    Attributes:
        at: When the first of them was.
        last_at: When the last of them was.
        count: How many there were.
    """

    at: datetime
    last_at: datetime
    identity: str
    peer: str
    rpc: str
    session_id: str
    missing: str
    count: int

    @property
    def refused(self) -> Refused:
        """What was refused, to whom."""
        return Refused(self.identity, self.peer, self.rpc, self.session_id, self.missing)

    @property
    def key(self) -> tuple[datetime, Refused]:
        """What no other entry has: the minute, and what was refused."""
        return minute_of(self.at), self.refused


def minute_of(at: datetime) -> datetime:
    """Return the beginning of the minute of a time."""
    return at.replace(second=0, microsecond=0)


class DenialLog:
    """Counts refusals until somebody takes the entries to keep them, and logs each new one. Used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._minute = minute_of(clock.now())
        # Those of the minute, so that no second log line is written for the same.
        self._seen: set[Refused] = set()
        self._waiting: dict[tuple[datetime, Refused], Denial] = {}

    def note(self, refused: Refused) -> None:
        """Count a refusal."""
        refused = Refused(*(text[:_LONGEST] for text in refused))
        now = clock.now()
        with self._lock:
            if (minute := minute_of(now)) != self._minute:
                self._minute = minute
                self._seen.clear()
            if refused not in self._seen and len(self._seen) >= _MOST_IN_MINUTE:
                refused = Refused(OTHERS, OTHERS, OTHERS, "", OTHERS)
            is_new = refused not in self._seen
            self._seen.add(refused)
            self._add(Denial(now, now, *refused, 1))
        if is_new:
            _log.warning("refused", **refused._asdict())

    @property
    def has_news(self) -> bool:
        """Whether there are entries that nobody has taken."""
        return bool(self._waiting)

    def take(self) -> list[Denial]:
        """Return the entries that nobody has kept yet; whoever takes them keeps them, or gives them back."""
        if not self._waiting:
            return []
        with self._lock:
            taken, self._waiting = self._waiting, {}
        return list(taken.values())

    def give_back(self, denials: Sequence[Denial]) -> None:
        """Take back entries that could not be kept."""
        with self._lock:
            newer, self._waiting = self._waiting, {}
            for denial in (*denials, *newer.values()):
                self._add(denial)

    def _add(self, denial: Denial) -> None:
        known = self._waiting.get(denial.key)
        if known is not None:
            # Threads, and a clock that is set back, may bring a later one first.
            last_at = max(known.last_at, denial.last_at)
            denial = replace(known, last_at=last_at, count=known.count + denial.count)
        elif len(self._waiting) >= _MOST_WAITING:
            # Nothing can be written. The log has them.
            return
        self._waiting[denial.key] = denial


NoteDenial = Callable[[Refused], None]
"""Notes a refusal; see `DenialLog.note`."""
