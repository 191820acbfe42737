"""Read a session's log as a recording, and the state of a session as of a point to fork it from.

A recording is read page by page, each in a short snapshot, so that a server can keep writing meanwhile. It contains the
commits up to when it was begun. Memory holds one page.
"""

from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final, Generic, TypeAlias, TypeVar

from sqlalchemy import Connection, Engine

from dspex_persist.clock import nearest_time
from dspex_persist.state.access import part_of
from dspex_persist.state.commands import ForkSession, RestoreSession
from dspex_persist.state.errors import InvalidArgumentError, NotInHistoryError, SessionPrunedError, quote
from dspex_persist.state.events import (
    RuleAdded,
    RuleRemoved,
    anonymous,
    event_in,
    names_executions,
    portable,
    without_secrets,
)
from dspex_persist.state.masking import Secrets
from dspex_persist.state.model import Dependency, EventKind, Rule, Value, Variable
from dspex_persist.state.recording import (
    Content,
    ContentHash,
    Header,
    RecordedAnswer,
    RecordedCommit,
    RecordedEvent,
    RecordedVersion,
    content_of,
    content_of_version,
    renumbered,
)
from dspex_persist.state.rules import Rules
from dspex_persist.state.store import damage
from dspex_persist.state.store.engine import raw_rows, snapshot, streamed_rows
from dspex_persist.state.store.history.answers import StoredAudit
from dspex_persist.state.store.history.secrets import secrets_of
from dspex_persist.state.store.schema import is_unicode
from dspex_persist.state.store.variables import KIND_OF, SOURCE_OF, is_sensitive
from dspex_persist.state.values.json_text import stored, stored_object, stored_texts

T = TypeVar("T")

_PAGE_COMMITS: Final = 500
_PAGE_BYTES: Final = 4 * 1024 * 1024
_METADATA: Final = (
    "SELECT metadata FROM sessions WHERE session_id = ? AND started_sequence <= ? ORDER BY session_key DESC LIMIT 1"
)
_SESSIONS: Final = "SELECT session_key, started_sequence FROM sessions WHERE session_id = ? ORDER BY session_key"
_EXTENT: Final = "SELECT count(*), max(sequence) FROM commits WHERE session_key = ?"
_MARKER: Final = """
    SELECT max(pruned.marker_sequence) FROM commits INDEXED BY commits_by_session
    JOIN pruned ON pruned.sequence = commits.sequence WHERE commits.session_key = ?
"""
_SENSITIVE: Final = f"""
    SELECT variable_key FROM variables
    WHERE session_key = ? AND {is_sensitive("metadata")}
"""
_COMMITS: Final = f"""
    SELECT sequence, actor, cause, created_at,
        (SELECT max(marker_sequence) FROM pruned WHERE pruned.sequence = commits.sequence)
    FROM commits INDEXED BY commits_by_session
    WHERE session_key = ? AND sequence > ? AND sequence <= ? ORDER BY sequence LIMIT {_PAGE_COMMITS}
"""
_KNOWN: Final = """
    SELECT sequence, created_at,
        EXISTS (SELECT 1 FROM events WHERE events.sequence = commits.sequence AND kind = 'execution_began')
    FROM commits INDEXED BY commits_by_session WHERE session_key = ? ORDER BY sequence LIMIT ?
"""
_VERSIONS: Final = """
    SELECT versions.sequence, versions.variable_key, variables.variable_id, variables.name, versions.version,
        versions.kind, versions.source, versions.value, of_value.content, versions.binary, of_binary.content,
        versions.metadata
    FROM versions JOIN variables ON variables.variable_key = versions.variable_key
    LEFT JOIN blobs AS of_value ON of_value.blob_key = versions.value_blob
    LEFT JOIN blobs AS of_binary ON of_binary.blob_key = versions.binary_blob
    WHERE versions.sequence = ? ORDER BY versions.variable_key, versions.version
"""
# For commits that follow each other closely, one query for a page takes half of the time of one for each commit.
_PAGE_VERSIONS: Final = _VERSIONS.replace(
    "WHERE versions.sequence = ? ORDER BY",
    "WHERE versions.sequence BETWEEN ? AND ? AND variables.session_key = ? ORDER BY versions.sequence,",
)
_PAGE_EVENTS: Final = """
    SELECT sequence, kind, body FROM events WHERE sequence BETWEEN ? AND ? ORDER BY sequence, ordinal
"""
_SPREAD: Final = 4
"""How many commits of all sessions there may be for each commit of this one, for such a query."""
# Only a live session has answers; a later one with its id has its own.
_KEYS: Final = """
    SELECT outcomes.created_at, idempotency_key FROM outcomes JOIN sessions USING (session_id)
    WHERE session_key = ? AND ended_sequence IS NULL ORDER BY outcomes.created_at, idempotency_key
"""
_ANSWER: Final = "SELECT cause, fingerprint, result FROM outcomes WHERE session_id = ? AND idempotency_key = ?"
_COUNT: Final = "SELECT count(*) FROM commits WHERE session_key = ? AND sequence <= ?"
_LAST_COMMIT: Final = """
    SELECT max(sequence) FROM commits JOIN sessions USING (session_key)
    WHERE session_id = ? AND ended_sequence IS NULL AND sequence <= ?
"""
_EVENTS: Final = "SELECT sequence, kind, body FROM events WHERE sequence = ? ORDER BY ordinal"
_DEPENDENCIES: Final = """
    SELECT from_id, to_id, type, since_sequence FROM dependencies JOIN sessions USING (session_key)
    WHERE session_id = ?1 AND started_sequence <= ?2 AND (ended_sequence IS NULL OR ended_sequence > ?2)
        AND since_sequence <= ?2 AND (until_sequence IS NULL OR until_sequence > ?2)
    ORDER BY dependency_key
"""
_RULE_EVENTS: Final = """
    SELECT events.kind, events.body
    FROM sessions JOIN commits INDEXED BY commits_by_session USING (session_key)
    CROSS JOIN events ON events.sequence = commits.sequence
    WHERE session_id = ?1 AND started_sequence <= ?2 AND (ended_sequence IS NULL OR ended_sequence > ?2)
        AND commits.sequence <= ?2 AND events.kind IN ('rule_added', 'rule_removed')
    ORDER BY events.sequence, events.ordinal
"""


def read_session(
    readers: Engine, session_id: str, *, started: int | None = None, reveal: bool = False, after: int = 0
) -> tuple[Header, Iterator[RecordedCommit]]:
    """Read the log of a session, live or ended, up to now.

    Args:
        readers: Read-only connections to the file.
        session_id: The session.
        started: If several sessions had this id, the commit with which the wanted one began; None for the newest.
        reveal: Whether to include the values of variables that are now marked as sensitive, also where recorded LM
            calls quote them.
        after: The number within the session of a commit: those up to it are left out.

    Returns:
        The header, and an iterator that reads the commits as it goes.

    Raises:
        NotInHistoryError: No session ever had this id.
        SessionPrunedError: Part of the session was pruned. The iterator raises it, too, if that happens while it reads.
    """
    with snapshot(readers) as connection:
        key, count, last = _extent_of(connection, session_id, started)
        hidden = frozenset() if reveal else frozenset(row[0] for row in raw_rows(connection, _SENSITIVE, key))
        secrets = secrets_of(connection, key) if hidden else Secrets(())
        # An answer may quote a value that has to be left out.
        keys = deque[tuple[int, str]]() if hidden else deque(raw_rows(connection, _KEYS, key))
    header = Header(session_id, count, masked=bool(hidden))
    return header, _Commits(readers, session_id, key, last, hidden, keys, secrets).read(min(after, count))


def hash_session(readers: Engine, session_id: str, *, started: int | None = None) -> ContentHash:
    """Read the log of a session for its hash: the one that its recording has; see `read_session`."""
    with snapshot(readers) as connection:
        key, _, last = _extent_of(connection, session_id, started)
    content = ContentHash()
    for each in _Contents(readers, session_id, key, last, frozenset(), deque(), Secrets(())).read():
        content.add_content(each)
    return content


def _extent_of(connection: Connection, session_id: str, started: int | None) -> tuple[int, int, int]:
    """Return the key of a session that was not pruned, how many commits it has, and the number of its last one."""
    key = _find_session(connection, session_id, started)
    marker = _first(connection, _MARKER, key)[0]
    if marker is not None:
        raise SessionPrunedError(session_id, marker)
    count, last = _first(connection, _EXTENT, key)
    return key, count, last


def _first(connection: Connection, statement: str, *parameters: object) -> Any:
    return next(raw_rows(connection, statement, *parameters))


def _find_session(connection: Connection, session_id: str, started: int | None) -> int:
    sessions = list(raw_rows(connection, _SESSIONS, session_id)) if is_unicode(session_id) else []
    if not sessions:
        raise NotInHistoryError("session", session_id, "")
    if started is None:
        return int(sessions[-1][0])
    for key, began in sessions:
        if began == started:
            return int(key)
    commits = " and ".join(str(began) for _, began in sessions)
    raise InvalidArgumentError("started", f"session {quote(session_id)} began with commit {commits}, not {started}")


_Rows: TypeAlias = Callable[[int], Iterable[Any]]


class _Merged:
    """Rows of many commits, ordered by the numbers of the commits, which come first in each row."""

    def __init__(self, rows: Iterator[Any]) -> None:
        self._rows = rows
        self._next: Any = next(rows, None)

    def rows_of(self, sequence: int) -> list[Any]:
        """Return the rows of a commit; the commits come in order."""
        found, row, rows = [], self._next, self._rows
        while row is not None and row[0] <= sequence:
            if row[0] == sequence:
                found.append(row)
            row = next(rows, None)
        self._next = row
        return found


class _Reading(ABC, Generic[T]):
    """A recording being read, and how far it is. `T`: what is read of each commit."""

    def __init__(
        self,
        readers: Engine,
        session_id: str,
        key: int,
        last: int,
        hidden: Collection[int],
        keys: deque[tuple[int, str]],
        secrets: Secrets,
    ) -> None:
        self._readers = readers
        self._session_id = session_id
        self._key = key
        self._last = last
        self._hidden = hidden
        # The idempotency keys of requests whose commits are still to come, and when those were made.
        self._keys = keys
        self._secrets = secrets
        self._number = 0
        # The commits in which the executions so far began, by their numbers in the file and in the recording.
        self._began = array("q")
        self._numbers = array("q")

    def read(self, known: int = 0) -> Iterator[T]:
        """Yield the commits after the first `known` ones."""
        after = self._pass_over(known) if known else 0
        while after < self._last:
            with snapshot(self._readers) as connection, damage.reading(self._session_id):
                after, page = self._read_page(connection, after)
            yield from page

    @abstractmethod
    def _read_commit(self, connection: Connection, row: Any, versions: Sequence[Any], events: Sequence[Any]) -> T:
        """Read the commit in these rows."""

    def _pass_over(self, known: int) -> int:
        """Note what the later commits need to know of the first ones; return the number of the last of these."""
        sequence = 0
        with snapshot(self._readers) as connection:
            for sequence, created_at, begins in raw_rows(connection, _KNOWN, self._key, known):
                self._number += 1
                if begins:
                    self._began.append(sequence)
                    self._numbers.append(self._number)
                if self._keys and self._keys[0][0] <= created_at:
                    self._keys.popleft()
        return sequence

    def _read_page(self, connection: Connection, after: int) -> tuple[int, list[T]]:
        """Read the next commits; the number of the last one in the file, and the commits."""
        page: list[T] = []
        size_bytes = 0
        commits = list(raw_rows(connection, _COMMITS, self._key, after, self._last))
        versions_of, events_of = self._parts(connection, [row[0] for row in commits])
        for row in commits:
            if row[-1] is not None:
                raise SessionPrunedError(self._session_id, row[-1])
            self._number += 1
            after = row[0]
            versions, events = list(versions_of(after)), list(events_of(after))
            page.append(self._read_commit(connection, row, versions, events))
            for version in versions:
                size_bytes += sum(map(len, filter(None, version[7:11])))
            for event in events:
                size_bytes += len(event[-1])
            if size_bytes > _PAGE_BYTES:
                break
        return after, page

    def _parts(self, connection: Connection, sequences: Sequence[int]) -> tuple[_Rows, _Rows]:
        """Return functions from the number of a commit, in order, to the rows of its versions and of its events."""
        if not sequences or sequences[-1] - sequences[0] > _SPREAD * len(sequences):
            return partial(raw_rows, connection, _VERSIONS), partial(raw_rows, connection, _EVENTS)
        ends = (sequences[0], sequences[-1])
        return (
            _Merged(streamed_rows(connection, _PAGE_VERSIONS, *ends, self._key)).rows_of,
            _Merged(streamed_rows(connection, _PAGE_EVENTS, *ends)).rows_of,
        )

    def _commit(
        self, connection: Connection, row: Any, versions: Sequence[Any], events: Sequence[Any]
    ) -> RecordedCommit:
        sequence, actor, cause, created_at, _ = row
        commit = RecordedCommit(
            self._number,
            nearest_time(created_at),
            actor,
            cause,
            tuple(map(self._version_of, versions)),
            tuple(self._event_of(connection, *each) for each in events),
            sequence,
            self._answer_by(connection, created_at),
        )
        return renumbered(commit, self._number_of)

    def _answer_by(self, connection: Connection, created_at: int) -> RecordedAnswer | None:
        """The next answer, if it was kept by then. The table has the time of its commit, and each has at most one."""
        while self._keys and self._keys[0][0] <= created_at:
            _, key = self._keys.popleft()
            # It may have been forgotten meanwhile.
            for row in raw_rows(connection, _ANSWER, self._session_id, key):
                return RecordedAnswer(key, *row)
        return None

    def _version_of(self, row: Any) -> RecordedVersion:
        _, key, variable_id, name, version, kind, source, inline, large, binary, large_binary, metadata = row
        text = inline if large is None else large.decode()
        value = None if text is None else Value(text, binary if large_binary is None else large_binary)
        masked = value is not None and key in self._hidden
        return RecordedVersion(
            variable_id,
            name,
            version,
            KIND_OF[kind],
            SOURCE_OF[source],
            None if masked else value,
            stored_object(metadata),
            masked,
        )

    def _event_of(self, connection: Connection, sequence: int, kind: str, text: str) -> RecordedEvent:
        if kind == EventKind.SESSION_RESTORED:
            restored_to = _first(connection, _COUNT, self._key, stored(text)["sequence"])[0]
            return RecordedEvent(EventKind.SESSION_RESTORED, {"sequence": restored_to})
        if kind == EventKind.EXECUTION_BEGAN:
            self._began.append(sequence)
            self._numbers.append(self._number)
        return RecordedEvent(EventKind(kind), without_secrets(EventKind(kind), portable(stored(text)), self._secrets))

    def _number_of(self, sequence: int) -> int | None:
        place = bisect_left(self._began, sequence)
        return self._numbers[place] if place < len(self._began) and self._began[place] == sequence else None


class _Commits(_Reading[RecordedCommit]):
    """Reads the commits of a recording."""

    def _read_commit(
        self, connection: Connection, row: Any, versions: Sequence[Any], events: Sequence[Any]
    ) -> RecordedCommit:
        return self._commit(connection, row, versions, events)


class _Contents(_Reading[Content]):
    """Reads what `ContentHash` needs of the commits, most of it without their objects."""

    def _read_commit(self, connection: Connection, row: Any, versions: Sequence[Any], events: Sequence[Any]) -> Content:
        _, actor, cause, created_at, _ = row
        is_plain, bodies = not cause.startswith("exec_"), []
        for _, kind, text in events:
            body = portable(stored(text))
            is_plain = is_plain and kind not in _NUMBERED and not names_executions(body)
            bodies.append([kind, anonymous(EventKind(kind), body)])
        if not is_plain:
            # It says numbers of other commits, which are counted within the session.
            return content_of(self._commit(connection, row, versions, events))
        at = nearest_time(created_at).isoformat()
        return [at, actor, cause, [self._content_of(each) for each in versions], bodies]

    def _content_of(self, row: Any) -> Content:
        _, _, variable_id, name, version, kind, source, inline, large, binary, large_binary, metadata = row
        if binary is not None or large_binary is not None or metadata is not None:
            return content_of_version(self._version_of(row))
        text = inline if large is None else large.decode()
        return [variable_id, name, version, KIND_OF[kind].value, SOURCE_OF[source].value, text]


_NUMBERED: Final = frozenset({EventKind.SESSION_RESTORED.value, EventKind.EXECUTION_BEGAN.value})


def fork_of(readers: Engine, session_id: str, new_session_id: str, at: str) -> ForkSession:
    """Return the command that starts `new_session_id` with the state that `session_id` had at the point `at`."""
    audit = StoredAudit(readers, reveal=True)
    sequence = audit.resolve(at, session=session_id)
    variables = tuple(
        Variable(
            each.variable_id,
            each.name,
            each.type,
            each.value,
            each.version,
            each.constraints,
            each.metadata,
            each.source,
            each.updated_at,
        )
        for each in audit.state(session_id, str(sequence))
        if each.value is not None
    )
    with snapshot(readers) as connection:
        edges = tuple(Dependency(*row) for row in raw_rows(connection, _DEPENDENCIES, session_id, sequence))
        rules = rules_as_of(connection, session_id, sequence)
        row = _first(connection, _METADATA, session_id, sequence)
    access = part_of(stored_texts(row[0])) if row is not None else {}
    return ForkSession(new_session_id, session_id, sequence, variables, edges, rules, access)


def rules_as_of(connection: Connection, session_id: str, sequence: int) -> tuple[Rule, ...]:
    """Return the rules that the live session with this id had as of a commit, in the order in which it got them."""
    rules = Rules()
    for kind, body in raw_rows(connection, _RULE_EVENTS, session_id, sequence):
        event = event_in(kind, stored(body))
        if isinstance(event, RuleAdded):
            rules = rules.added(Rule(event.name, event.expression, event.description))
        elif isinstance(event, RuleRemoved):
            rules = rules.without(event.name)
    return tuple(rules.values())


def restore_of(readers: Engine, session_id: str, at: str) -> RestoreSession:
    """Return the command that brings the live session `session_id` back to what it was at the point `at`."""
    past = fork_of(readers, session_id, session_id, at)
    with snapshot(readers) as connection:
        last = _first(connection, _LAST_COMMIT, session_id, past.forked_at)
    # A session before it may have had its id.
    return RestoreSession.of(past, last[0] or 0 if last is not None else 0, at)
