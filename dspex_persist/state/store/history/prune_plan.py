"""Pruning: delete old history, and leave a marker in the chain that says what was deleted and what must remain.

A `Planner` finds what can be deleted, in short snapshots, and turns it into commands that are small enough for other
writers to wait only milliseconds. The writer carries out each as one commit of its session, whose only event is the
marker. The history is consistent after each of them, so pruning can stop anywhere and start again later.

Planning needs no lock. It always keeps what commits after its snapshot may need: the newest version of each variable,
and everything that a running execution may still read.
"""

import heapq
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Final, NamedTuple

from sqlalchemy import Engine

from dspex_persist.clock import to_micros
from dspex_persist.state.commands import Command
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.events import GoingEvent, GoingVersion, Pruned
from dspex_persist.state.groups import Job
from dspex_persist.state.model import (
    PINNED,
    REASON,
    RESTORED_METADATA,
    ChangeKind,
    EventKind,
    Origin,
    PrunePolicy,
    PruneReport,
    Session,
)
from dspex_persist.state.provider import Progress
from dspex_persist.state.store import denials as stored_denials
from dspex_persist.state.store.engine import driver_of, snapshot
from dspex_persist.state.store.history import times
from dspex_persist.state.store.history.answers import StoredAudit
from dspex_persist.state.store.pruned import LOCK_KINDS
from dspex_persist.state.store.variables import KIND_CODES
from dspex_persist.state.unit_of_work import UnitOfWork
from dspex_persist.state.values.json_text import stored_object

_PRUNING: Final = Origin(actor="dspex-persist", cause="pruning")
_BATCH_ROWS: Final = 1000
_BATCH_COMMANDS: Final = 64
_SNAPSHOT_S: Final = 0.5
_PAGE: Final = 1000
_VARIABLES_AT_ONCE: Final = 32
_ALL: Final = RESTORED_METADATA
"""Stands for all keys of metadata; no client can set it."""
_ROLLED_BACK: Final = KIND_CODES[ChangeKind.ROLLED_BACK]
_MERGING: Final = frozenset(code for kind, code in KIND_CODES.items() if kind.merges_metadata)


@dataclass(frozen=True, slots=True)
class PruneHistory(Command[None]):
    """Delete these versions and events of a session, live or ended, and leave a marker."""

    session_key: int
    started_sequence: int
    policy: PrunePolicy
    versions: tuple[GoingVersion, ...]
    events: tuple[GoingEvent, ...]

    writes: ClassVar[bool] = True

    def apply(self, uow: UnitOfWork) -> None:
        session = Session(self.session_id, uow.now, sequence=self.started_sequence)
        uow.prune(session, self.session_key, Pruned.planned(self.policy, self.versions, self.events))


def run(
    readers: Engine, policy: PrunePolicy, write: Callable[[list[Job]], object] | None, progress: Progress
) -> PruneReport:
    """Prune the history by a policy.

    Args:
        readers: Read-only connections to the file.
        policy: What to delete.
        write: Carries out jobs, and returns once they are durable; None to only count what would be deleted. Entries
            about refused calls are only counted: their deletion is no job, but for whoever writes.
        progress: Called with what was done so far, after each batch.

    Raises:
        InvalidArgumentError: The policy is invalid, or allows nothing to be deleted.
        NotInHistoryError: No session ever had the policy's session id.
    """
    _check(policy)
    if policy.session_id is not None:
        # Any point will do: this only checks that the session exists.
        StoredAudit(readers).resolve("0s", session=policy.session_id)
    planner = Planner(readers, policy)
    sessions: set[int] = set()
    versions = events = markers = 0
    for batch in planner.batches():
        if write is not None and batch:
            write([Job(command, _PRUNING) for command in batch])
        for command in batch:
            sessions.add(command.session_key)
            versions += len(command.versions)
            events += len(command.events)
            markers += write is not None
        progress(f"{versions:,} versions, {events:,} events", planner.done, planner.in_all)
    denials = 0
    if write is None and policy.denials_before is not None:
        with snapshot(readers) as connection:
            denials = stored_denials.count_old(connection, policy.denials_before)
    return PruneReport(write is not None, len(sessions), versions, events, markers, denials)


def _check(policy: PrunePolicy) -> None:
    if policy.keep_versions is not None and policy.keep_versions < 1:
        raise InvalidArgumentError("keep_versions", f"{policy.keep_versions} is below 1: the current version stays")
    if policy.session_id == "":
        raise InvalidArgumentError("session_id", "it is empty")
    for name in ("before", "ended_before"):
        moment: datetime | None = getattr(policy, name)
        if moment is not None and moment.tzinfo is None:
            raise InvalidArgumentError(name, f"{moment} has no time zone")
    if policy.keep_versions is None and policy.before is None and policy.ended_before is None:
        raise InvalidArgumentError("policy", "it deletes nothing: give keep_versions, before or ended_before")


_COUNT_VARIABLES: Final = "SELECT count(*) FROM variables"
_SESSIONS: Final = """
    SELECT session_key, session_id, started_sequence, ended_sequence FROM sessions
    WHERE sessions.session_key > ?1 AND (?2 IS NULL OR session_id = ?2) ORDER BY sessions.session_key LIMIT ?3
"""
_RUNNING: Final = "SELECT min(began_sequence) FROM executions WHERE session_key = ? AND ended_sequence IS NULL"
_VARIABLES: Final = """
    SELECT variable_key,
        (SELECT min(version) FROM versions WHERE versions.variable_key = variables.variable_key),
        (SELECT max(version) FROM versions WHERE versions.variable_key = variables.variable_key),
        deleted_sequence IS NOT NULL
    FROM variables INDEXED BY variables_by_session
    WHERE session_key = ? AND variable_key > ? ORDER BY variable_key LIMIT ?
"""
_FROM: Final = """
    SELECT version, sequence, kind, metadata, value_blob, binary_blob FROM versions
    WHERE variable_key = ? AND version >= ? ORDER BY version LIMIT 1
"""
_BELOW: Final = """
    SELECT version, sequence, kind, metadata, value_blob, binary_blob FROM versions
    WHERE variable_key = ? AND version < ? ORDER BY version DESC LIMIT ?
"""
_EVENTS: Final = """
    SELECT events.sequence, events.ordinal, events.kind,
        CASE WHEN events.kind IN ('execution_began', 'execution_ended') THEN
                CASE WHEN json_valid(body) THEN body ELSE mended_json(body) END ->> '$.execution_id'
            WHEN events.kind IN ('variable_registered', 'variable_constrained')
                THEN json_extract(body, '$.variable_key') END
    FROM commits INDEXED BY commits_by_session CROSS JOIN events ON events.sequence = commits.sequence
    WHERE commits.session_key = ?1 AND commits.sequence >= ?2 AND (events.sequence, events.ordinal) > (?2, ?3)
    ORDER BY events.sequence, events.ordinal LIMIT ?4
"""
_UPDATES: Final = """
    SELECT events.sequence, events.ordinal
    FROM commits INDEXED BY commits_by_session CROSS JOIN events ON events.sequence = commits.sequence
    WHERE commits.session_key = ? AND events.kind = 'session_updated' ORDER BY events.sequence, events.ordinal
"""
_GO_BY_THEMSELVES: Final = LOCK_KINDS | {
    EventKind.DEPENDENCY_ADDED,
    EventKind.TOOLS_REGISTERED,
    EventKind.RULE_ADDED,
    EventKind.RULE_REMOVED,
    EventKind.DEPENDENCY_REMOVED,
    EventKind.SESSION_RESTORED,
}


class _Session(NamedTuple):
    key: int
    id: str
    started_sequence: int
    ended_sequence: int | None


class _Item(NamedTuple):
    """Rows that are deleted together. The history is consistent after any number of items, in order."""

    versions: Sequence[GoingVersion] = ()
    events: Sequence[GoingEvent] = ()


@dataclass(slots=True)
class _Variable:
    """A variable with the range of its versions; `stay` and `pinned` are known once these have been walked through."""

    key: int
    oldest: int
    newest: int
    deleted: bool
    stay: list[GoingVersion] = field(default_factory=list)
    pinned: bool = False


class Planner:
    """Finds what a policy allows to be deleted. `done`: how many of `in_all` variables have been examined."""

    def __init__(self, readers: Engine, policy: PrunePolicy) -> None:
        self._readers = readers
        self._policy = policy
        self._more = True
        # The log's first commit after a time, by that time: finding it scans the log.
        self._younger: dict[int, int] = {}
        self.done = 0
        with snapshot(readers) as connection:
            self._connection = connection
            self.in_all: int = self._rows(_COUNT_VARIABLES)[0][0]
        self._versions_go = policy.keep_versions is not None or policy.before is not None

    def batches(self) -> Iterator[list[PruneHistory]]:
        """Yield batches of commands, each to be carried out before the next; an empty one only reports progress."""
        items = self._items()
        while self._more:
            with snapshot(self._readers) as connection:
                self._connection = connection
                batch = self._gather(items)
            yield batch

    def _gather(self, items: Iterator[tuple[_Session, _Item]]) -> list[PruneHistory]:
        pieces: dict[_Session, tuple[list[GoingVersion], list[GoingEvent]]] = {}
        rows, end = 0, time.monotonic() + _SNAPSHOT_S
        for session, item in items:
            if item.versions or item.events:
                versions, events = pieces.setdefault(session, ([], []))
                versions.extend(item.versions)
                events.extend(item.events)
                rows += len(item.versions) + len(item.events)
            if rows >= _BATCH_ROWS or len(pieces) >= _BATCH_COMMANDS or time.monotonic() > end:
                break
        else:
            self._more = False
        return [
            PruneHistory(each.id, each.key, each.started_sequence, self._policy, tuple(versions), tuple(events))
            for each, (versions, events) in pieces.items()
        ]

    def _rows(self, statement: str, *parameters: object) -> list[Any]:
        """Read all rows at once: the next page may come from another snapshot."""
        rows: list[Any] = driver_of(self._connection).execute(statement, parameters).fetchall()
        return rows

    def _items(self) -> Iterator[tuple[_Session, _Item]]:
        last = 0
        while rows := self._rows(_SESSIONS, last, self._policy.session_id, _PAGE):
            for row in rows:
                session = _Session(*row)
                last = session.key
                if self._has_ended_before(session):
                    items = self._whole_session(session)
                elif self._versions_go:
                    items = self._old_versions(session)
                else:
                    continue
                for item in items:
                    yield session, item

    def _has_ended_before(self, session: _Session) -> bool:
        moment = self._policy.ended_before
        if moment is None or session.ended_sequence is None:
            return False
        return session.ended_sequence < self._first_younger(session, moment)

    # A session whose current state stays

    def _old_versions(self, session: _Session) -> Iterator[_Item]:
        cut = self._cut_of(session)
        for variables, running in self._variables(session):
            first_kept = [(variable, self._first_kept(variable, cut, running)) for variable in variables]
            # Versions of the same commit are deleted together where possible: each deletion adds a row to `pruned`.
            going = [self._below(variable, first) for variable, first in first_kept if first > variable.oldest]
            for version in heapq.merge(*going, key=_newest_first):
                yield _Item((version,))
            self.done += len(variables)
            yield _Item()

    def _variables(self, session: _Session) -> Iterator[tuple[list[_Variable], int | None]]:
        """Its variables, some at a time, each time with the commit that began the oldest running execution."""
        last = 0
        while rows := self._rows(_VARIABLES, session.key, last, _VARIABLES_AT_ONCE):
            last = rows[-1][0]
            running: int | None = self._rows(_RUNNING, session.key)[0][0]
            yield [_Variable(*row) for row in rows if row[1] is not None], running

    def _cut_of(self, session: _Session) -> int | None:
        """The first of its commits that is too recent to be pruned; None if the policy has no age limit."""
        if self._policy.before is None:
            return None
        return self._first_younger(session, self._policy.before)

    def _first_younger(self, session: _Session, moment: datetime) -> int:
        """The session's first commit at or after `moment`."""
        micros = to_micros(moment) - 1
        if micros not in self._younger:
            self._younger[micros] = times.first_younger(self._connection, micros)
        return times.first_younger_of_session(
            self._connection, session.key, session.started_sequence, micros, self._younger[micros]
        )

    def _first_kept(self, variable: _Variable, cut: int | None, running: int | None) -> int:
        """The version from which on all are kept. The newest always is, and for a deletion the one before it."""
        first = variable.newest - variable.deleted
        if self._policy.keep_versions is not None:
            first = min(first, variable.newest - self._policy.keep_versions + 1)
        if cut is not None and first > variable.oldest:
            first = min(first, self._number_at(variable, cut))
        if running is not None and first > variable.oldest:
            # The execution may still read the version that was current when it began.
            first = min(first, self._number_at(variable, running) - 1)
        return first

    def _number_at(self, variable: _Variable, sequence: int) -> int:
        """The number of the first version of a commit from `sequence` on."""
        low, high = variable.oldest, variable.newest + 1
        while low < high:
            middle = (low + high) // 2
            if self._rows(_FROM, variable.key, middle)[0][1] < sequence:
                low = middle + 1
            else:
                high = middle
        return low

    def _below(self, variable: _Variable, first: int) -> Iterator[GoingVersion]:
        """The versions below `first` that can be deleted, newest first; `variable` collects those that are kept.

        Pinned versions are kept. So are those with metadata that was still in force at the next kept version: without
        them, the merged metadata of that version could no longer be computed.
        """
        [(number, sequence, kind, metadata, *blobs)] = self._rows(_FROM, variable.key, first)
        variable.stay.append((variable.key, number, sequence, *blobs))
        entries = stored_object(metadata)
        variable.pinned = _is_pinned(entries)
        # Keys that a kept version sets or replaces: older entries for them are no longer needed.
        settled = _settled_by(kind, entries)
        below = first
        while rows := self._rows(_BELOW, variable.key, below, _PAGE):
            below = rows[-1][0]
            for number, sequence, kind, metadata, value_blob, binary_blob in rows:
                version = (variable.key, number, sequence, value_blob, binary_blob)
                if metadata is not None:
                    entries = stored_object(metadata)
                    merged = _settled_by(kind, entries)
                    if _is_pinned(entries):
                        variable.pinned = True
                        settled = merged
                        variable.stay.append(version)
                        continue
                    if _ALL not in settled and not merged <= settled:
                        settled |= merged
                        variable.stay.append(version)
                        continue
                yield version

    # A session that is pruned as a whole

    def _whole_session(self, session: _Session) -> Iterator[_Item]:
        registered: dict[int, list[GoingEvent]] = {}
        yield from self._events(session, registered)
        for variables, _ in self._variables(session):
            for variable in variables:
                for version in self._below(variable, variable.newest):
                    yield _Item((version,))
                if not variable.pinned:
                    yield _Item(variable.stay, registered[variable.key])
                self.done += 1
            yield _Item()

    def _events(self, session: _Session, registered: dict[int, list[GoingEvent]]) -> Iterator[_Item]:
        """All events but those that the session, its markers and its variables (see `registered`) need."""
        # The last update holds the current facts of the session.
        for place in self._rows(_UPDATES, session.key)[:-1]:
            yield _Item((), (place,))
        began: dict[str, GoingEvent] = {}
        # Events of one commit, which are deleted together: rows that refer to them only need the commit's number.
        together: list[GoingEvent] = []
        last = (0, -1)
        while rows := self._rows(_EVENTS, session.key, *last, _PAGE):
            last = rows[-1][:2]
            for sequence, ordinal, kind, subject in rows:
                place = (sequence, ordinal)
                if together and together[0][0] != sequence:
                    yield _Item((), together)
                    together = []
                if kind in _GO_BY_THEMSELVES:
                    together.append(place)
                elif kind == EventKind.EXECUTION_BEGAN:
                    began[subject] = place
                elif kind == EventKind.EXECUTION_ENDED:
                    yield _Item((), (began.pop(subject), place))
                elif kind in (EventKind.VARIABLE_REGISTERED, EventKind.VARIABLE_CONSTRAINED):
                    # PostgreSQL extracts numbers as text.
                    registered.setdefault(int(subject), []).append(place)
        if together:
            yield _Item((), together)


def _settled_by(kind: int, entries: Mapping[str, Any]) -> set[str]:
    """Return the keys of the variable's metadata that a version sets; `_ALL` if it replaces all of it."""
    if kind in _MERGING:
        return set(entries) - {REASON}
    return {_ALL} if kind == _ROLLED_BACK and RESTORED_METADATA in entries else set()


def _newest_first(version: GoingVersion) -> int:
    return -version[2]


def _is_pinned(entries: dict[str, str]) -> bool:
    return entries.get(PINNED) == "true"
